"""OG-Net: graph convolutions and PointNet++ set abstraction on coloured point clouds.

Features are channels-last, (B, N, C). Exact refactorings make the network affordable; none changes a parameter:

* the first linear layer on a pair of points, centre i and neighbour j, is a sum A_j + D_i of one projection per point;
* what batch normalisation, maximum and mean need over all edges of a graph convolution follows from maximum, minimum,
  sum and sum of squares over each neighbourhood (``ops.edge_pool``), so no tensor over the edges is formed;
* between the two normalisations of a branch all is done in tiles that stay in the cache (``ops.gated_pool``), and the
  second, like the ReLU, is monotone in each channel, so that the maximum is taken before them;
* points that were sampled are in the order of sampling, and sampling some of them takes the first.

Source: Zheng et al., "Parameter-Efficient Person Re-identification in the 3D Space", TNNLS 2022, and the code published
with it (layumi/person-reid-3d, ModelE_dense with the flags of its recipes), which decides where the two differ, unless
``preset="paper"`` is asked for.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .cloud_net import EMBEDDING, CloudNet, flat_rows, initialise
from .head import Head, Output
from .norm import FoldedNorm

SLOPE = 0.2  # of every LeakyReLU
BALLS = ((0.1, 8), (0.2, 16), (0.4, 32))  # radius in metres and points kept, the same at every stage
HOLE = 1e-3  # squared metres around the origin where the published sampler picks no point


class Form(NamedTuple):
    """What is the same everywhere in a network: see the arguments of ``OGNet``."""

    k: int
    se: bool
    mix: str
    grouping: str
    paper: bool


class Graph(NamedTuple):
    """The neighbours (B, N, k) of each point, and the same edges by where they end, for the gradient."""

    idx: Tensor
    transposed: ops.TransposedGraph | None


def sample_outside_hole(xyz: Tensor, m: int, order: Tensor | None = None) -> Tensor:
    """The published sampling: ``ops.farthest_point_sample`` from index 0, which takes no point within 3.2 cm of the
    origin while there are others.
    """
    hole = xyz.square().sum(2) <= HOLE
    hole = hole & (torch.arange(xyz.shape[1], device=xyz.device) > 0)
    # Points with a NaN are picked after all others.
    return ops.farthest_point_sample(xyz.masked_fill(hole.unsqueeze(2), torch.nan), m, order=order)


def _graph(space: Tensor, k: int, order: Tensor | None = None) -> Graph:
    idx = ops.knn(space, space, k, order=order).idx
    return Graph(idx, ops.transpose_graph(idx, space.shape[1]) if torch.is_grad_enabled() else None)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of the rows of x (B, N, C), and their number."""
    mean = x.mean((0, 1))
    return mean, (x - mean).square().mean((0, 1)), x.shape[0] * x.shape[1]


def _exactly(x: Tensor, weight: Tensor) -> Tensor:
    """Linear in the precision of x, with autocast or without: for coordinates."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype))


def _shares(idx: Tensor, a: Tensor, values: Tensor | None = None) -> Tensor:
    """For each point of a (B, N, C) the sum over the pairs it is in of ``values``, rows of (B*M*K, V), or of 1, over
    the number of pairs: (B*N, V) or (B*N,).
    """
    rows = flat_rows(idx, a.shape[1]).flatten()
    values = a.new_ones(1).expand(len(rows)) if values is None else values
    return a.new_zeros(a.shape[0] * a.shape[1], *values.shape[1:]).index_add_(0, rows, values) / len(rows)


class EdgeConv(nn.Module):
    """Graph convolution: Linear on (h_j - h_i, h_i) of each edge -> BN -> a mix of max and mean -> LeakyReLU.

    ``linear.weight`` is the published Conv2d 1x1 without its last two axes; ``mix``, the logit of the share of the
    maximum, is what the published code calls GeM, though it is no generalised mean. With k = 1, as published, there are
    no edges: Linear on h_i -> BN -> LeakyReLU. The paper's form normalises what is pooled, and ends in ReLU.
    """

    def __init__(self, c_in: int, c_out: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.linear = nn.Linear(c_in if form.k == 1 else 2 * c_in, c_out)
        self.norm = FoldedNorm(c_out)
        self.mix = nn.Parameter(torch.zeros(())) if form.mix == "learned" and form.k > 1 else None

    def forward(self, h: Tensor, graph: Graph | None) -> Tensor:
        """h (B, N, c_in) -> (B, N, c_out); without a graph where k = 1."""
        weight: Tensor = self.linear.weight
        bias: Tensor = self.linear.bias
        if not self.training:  # the norm becomes part of the weights
            scale, shift = self.norm.fold()
            weight, bias = scale.unsqueeze(1) * weight, scale * bias + shift
        wide = torch.promote_types(h.dtype, torch.float32)  # of statistics, with autocast or without
        if graph is None:
            y = F.linear(h, weight, bias).to(wide)
            if self.training:
                scale, shift = self.norm.fold(*_moments(y))
                y = y * scale + shift
            return self._activate(y)
        w_difference, w_self = weight.chunk(2, dim=1)
        a, d = F.linear(h, w_difference), F.linear(h, w_self - w_difference, bias).to(wide)
        # The largest input, in the paper's form, or output of the norm, which is of the smallest input where its scale
        # is negative; in eval mode ``a`` is scaled already.
        negative, k = self.norm.weight < 0, graph.idx.shape[2]
        if not self.training:
            pool = ops.edge_pool(a, graph.idx)
            largest = torch.where(negative, pool.min, pool.max) if self.form.paper else pool.max
            return self._activate(self._mix(largest.to(wide), pool.sum / k) + d)
        middle = a.detach().to(wide).mean((0, 1))  # so that nothing cancels in a variance from a sum of squares
        d = d + middle
        pool = ops.edge_pool((a.to(wide) - middle).to(a.dtype), graph.idx, transposed=graph.transposed)
        mean_a = pool.sum / k
        largest = pool.max if self.form.paper else torch.where(negative, pool.min, pool.max)
        pooled = self._mix(largest.to(wide), mean_a) + d
        if self.form.paper:
            scale, shift = self.norm.fold(*_moments(pooled))
        else:
            # var(A_j + D_i) = var(A_j) + var(D_i) + 2 cov(A_j, D_i) over all edges, each about its mean.
            all_a, all_d = mean_a.mean((0, 1)), d.mean((0, 1))
            dev = d - all_d
            var = pool.sumsq.mean((0, 1)) / k - all_a.square() + (dev * (dev + 2 * (mean_a - all_a))).mean((0, 1))
            scale, shift = self.norm.fold(all_a + all_d, var, graph.idx.numel())
        return self._activate(pooled * scale + shift)

    def _mix(self, largest: Tensor, mean: Tensor) -> Tensor:
        if self.form.mix == "mean":
            return mean
        return largest if self.mix is None else torch.lerp(mean, largest, self.mix.sigmoid())

    def _activate(self, y: Tensor) -> Tensor:
        return F.relu(y) if self.form.paper else F.leaky_relu(y, SLOPE)


class Gate(nn.Module):
    """The weights of a channel gate, an "SE block": h * sigmoid(Linear(Swish(Linear(h)))), for each pair of points.

    The published block has no squeeze. The paper's, as SE-Net has it, gates a whole cloud by the mean of its pairs, and
    with ReLU in place of Swish.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 24)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, squeezed: Tensor) -> Tensor:
        """The gate of the paper's form: (B, channels) in (0, 1)."""
        return self.expand(F.relu(self.reduce(squeezed))).sigmoid()

    def weights(self) -> ops.Gate:
        return ops.Gate(self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias)


class Branch(nn.Module):
    """One scale of a set abstraction, around each centre c: of some points j around it
    Linear on (xyz_j - xyz_c, h_j) -> BN -> gate -> Linear -> BN -> ReLU -> max. The paper's form has no xyz.
    """

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.linear1 = nn.Linear(channels if form.paper else 3 + channels, channels // 2, bias=False)
        self.norm1 = FoldedNorm(channels // 2)
        self.gate = Gate(channels // 2) if form.se else None
        self.linear2 = nn.Linear(channels // 2, channels, bias=False)
        self.norm2 = FoldedNorm(channels)

    def forward(self, centers: Tensor, xyz: Tensor, h: Tensor, idx: Tensor) -> Tensor:
        """centers (B, M, 3), xyz (B, N, 3), h (B, N, C), idx (B, M, K) into the N -> (B, M, C)."""
        if self.training:
            a, d = self._project(self.linear1.weight, centers, xyz, h)
            scale, shift = self.norm1.fold(*self._pair_moments(a, d, centers, idx))
            sign = torch.where(self.norm2.weight < 0, -1.0, 1.0)
            pool = self._pool(a * scale, d * scale + shift, idx, self.linear2.weight, sign)
            scale, shift = self.norm2.fold(pool.mean, pool.var, idx.numel())
            return F.relu(pool.extreme * scale + shift)
        # The norms become part of the weights.
        scale, shift = self.norm1.fold()
        a, d = self._project(scale.unsqueeze(1) * self.linear1.weight, centers, xyz, h)
        scale, shift2 = self.norm2.fold()
        return F.relu(self._pool(a, d + shift, idx, scale.unsqueeze(1) * self.linear2.weight).extreme + shift2)

    def _project(self, weight: Tensor, centers: Tensor, xyz: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """A (B, N, C/2) and D (B, M, C/2): the first linear layer on a pair is A_j + D_c."""
        if self.form.paper:
            return F.linear(h, weight).to(xyz.dtype), xyz.new_zeros(*centers.shape[:2], len(weight))
        w_xyz, w_h = weight.split((3, h.shape[2]), dim=1)
        return F.linear(h, w_h).to(xyz.dtype) + _exactly(xyz, w_xyz), -_exactly(centers, w_xyz)

    def _pool(self, a: Tensor, d: Tensor, idx: Tensor, weight: Tensor, sign: Tensor | None = None) -> ops.GatedPool:
        gate = None if self.gate is None else self.gate.weights()
        if self.gate is not None and self.form.paper:
            share = _shares(idx, a).view(a.shape[:2]) * len(a)
            whole = self.gate((share.unsqueeze(1) @ a).squeeze(1) + d.mean(1)).unsqueeze(1)
            a, d, gate = a * whole, d * whole, None
        if a.is_cuda and torch.is_autocast_enabled("cuda"):
            weight = weight.to(torch.get_autocast_dtype("cuda"))
        return ops.gated_pool(a, d, idx, weight, gate, sign=sign, moments=self.training)

    def _pair_moments(self, a: Tensor, d: Tensor, centers: Tensor, idx: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and variance over all pairs of A_j + D_c, and their number.

        As in EdgeConv, but D_c = -w xyz_c, so that cov(A_j, D_c) needs of each point only the sum of the centres it
        is grouped around: three numbers, without a gradient.
        """
        flat = a.flatten(0, 1)
        degree = _shares(idx, a)
        all_a, all_d = degree @ flat, d.mean((0, 1))
        dev = flat - all_a
        var = degree @ dev.square() + (d - all_d).square().mean((0, 1))
        if not self.form.paper:
            around = (centers.flatten(0, 1) - centers.mean((0, 1))).repeat_interleave(idx.shape[2], 0)
            var = var - 2 * ((_shares(idx, a, around).t() @ dev) * self.linear1.weight[:, :3].t()).sum(0)
        return all_a + all_d, var, idx.numel()


class SetAbstraction(nn.Module):
    """PointNet++ set abstraction with three scales: one branch a scale, summed."""

    def __init__(self, channels: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.branches = nn.ModuleList(Branch(channels, form) for _ in BALLS)

    def forward(self, centers: Tensor, xyz: Tensor, h: Tensor) -> Tensor:
        """centers (B, M, 3), xyz (B, N, 3), h (B, N, C) -> (B, M, C)."""
        if self.form.grouping != "nearest":
            groups = [ops.ball_query(centers, xyz, radius, k) for radius, k in BALLS]
        else:
            nearest = ops.knn(centers, xyz, BALLS[-1][1]).idx
            groups = [nearest[:, :, :k] for _, k in BALLS]
        branches = zip(self.branches, groups, strict=True)
        return torch.stack([branch(centers, xyz, h, idx) for branch, idx in branches]).sum(0)


class Stage(nn.Module):
    """Graph convolutions, then, when ``points`` is given, a set abstraction around as many sampled points.

    With ``shortcut`` the input joins the output through a learned convex gate (``skip``, the logit of its share), after
    Linear -> LeakyReLU where the channels change; in the paper's form it is added, after Linear. Points that were
    ``sampled`` before are in the order of sampling, so that sampling some of them takes the first.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        form: Form,
        convs: int,
        points: int | None,
        shortcut: bool,
        sampled: bool,
        features: bool,
    ) -> None:
        super().__init__()
        self.form, self.points, self.sampled, self.features = form, points, sampled, features
        self.convs = nn.ModuleList(EdgeConv(c_in if i == 0 else c_out, c_out, form) for i in range(convs))
        self.abstraction = SetAbstraction(c_out, form) if points is not None else None
        self.shortcut = shortcut
        self.project = nn.Linear(c_in, c_out) if shortcut and points is not None else None
        self.skip = nn.Parameter(torch.zeros(())) if shortcut and not form.paper else None

    def forward(self, xyz: Tensor, h: Tensor, graph: Graph | None) -> tuple[Tensor, Tensor, Graph | None]:
        """xyz (B, N, 3), h (B, N, C), the graph of xyz if it is known -> the same of the next points."""
        h_in = h
        order = None if self.sampled or self.features else ops.morton_order(xyz)  # for a search and a sampling
        for conv in self.convs:
            if self.form.k == 1:
                h = conv(h, None)
            elif self.features:  # neighbours in space and features, anew for each convolution
                h = conv(h, _graph(torch.cat((xyz, h.detach().to(xyz.dtype)), dim=2), self.form.k))
            else:
                graph = _graph(xyz, self.form.k, order) if graph is None else graph
                h = conv(h, graph)
        if self.abstraction is not None and self.points is not None:
            picked = self._sample(xyz, order)
            centers, h_in = self._take(xyz, picked), self._take(h_in, picked)
            h = self.abstraction(centers, *((centers, self._take(h, picked)) if self.form.paper else (xyz, h)))
            if self.project is not None:
                h_in = self.project(h_in) if self.form.paper else F.leaky_relu(self.project(h_in), SLOPE)
            xyz, graph = centers, None
        if self.skip is not None:
            h = torch.lerp(h, h_in.to(h.dtype), self.skip.sigmoid())
        elif self.shortcut:
            h = h + h_in
        return xyz, h, graph

    def _sample(self, xyz: Tensor, order: Tensor | None) -> Tensor | None:
        """Which points to keep, (B, points); None for the first ones."""
        if self.sampled or self.points is None:
            return None
        sample = sample_outside_hole if self.form.grouping == "ball" else ops.farthest_point_sample
        return sample(xyz, self.points, order=order)

    def _take(self, x: Tensor, picked: Tensor | None) -> Tensor:
        if picked is None:
            return x[:, : self.points]
        return x.gather(1, picked.unsqueeze(2).expand(-1, -1, x.shape[2]))


class OGNet(CloudNet):
    """Omni-scale Graph Network: a coloured point cloud to a descriptor of 512 numbers of its person.

    Args:
        dims: channels after each stage; a stage that changes them also samples points.
        num_classes: training ids; 0 for no classifier.
        k: neighbours in the graphs, the point itself included; 1 puts linear layers in place of graph convolutions.
            None: 20, or 9 with two convolutions a stage, as published; always 20 in the paper.
        convs: graph convolutions a stage.
        shortcut: join each stage's input to its output.
        init_points: points after the first sampling; each later one halves them.
        dropout: probability in front of the classifier.
        se: gate the channels in each branch ("SE block").
        nonlocal_graph: the last graph joins the nearest in (xyz, features), not in space.
        mix: of neighbours, "max", "mean" or a "learned" mix of both. None: learned, in the paper mean.
        grouping: the points around a centre. "ball": the first 8, 16, 32 in index order within 0.1, 0.2, 0.4 m.
            "spread": the same in the order of farthest point sampling, so that they are spread over the ball.
            "nearest": the nearest 8, 16, 32. For these two the points are first sorted by x, y, z and colour, so that
            the order in which they are given does not matter at all. None: ball, in the paper nearest.
        flat: all z are 0: the "2D image" of the paper's table I.
        preset: "official", the published code, or "paper", where that says something else: branches see the sampled
            points alone, and no xyz; a graph convolution is mean over the edges -> BN -> ReLU; the gate is SE-Net's,
            with its squeeze; a short-cut is a plain sum.

    With balls the order of a cloud's points matters: sampling starts at index 0 and takes no point within 3.2 cm of the
    origin (|p|^2 <= 1e-3) while there are others, and balls keep points in index order. All this is as published, but
    for exact ties, and points that coincide: ``farthest_point_sample`` never takes an index twice.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: one out of range, or fewer points left than k, or for
            "nearest" than 32, for the last stage.

    Source: as this file; initialisation from the published code.
    """

    autocast = True

    def __init__(
        self,
        dims: tuple[int, ...],
        num_classes: int = 0,
        *,
        k: int | None = None,
        convs: int = 1,
        shortcut: bool = False,
        init_points: int = 768,
        dropout: float = 0.7,
        se: bool = True,
        nonlocal_graph: bool = True,
        mix: str | None = None,
        grouping: str | None = None,
        flat: bool = False,
        preset: str = "official",
    ) -> None:
        super().__init__()
        paper = preset == "paper"
        k = (9 if convs != 1 and not paper else 20) if k is None else k
        mix = ("mean" if paper else "learned") if mix is None else mix
        grouping = ("nearest" if paper else "ball") if grouping is None else grouping
        for name, value in (("k", k), ("init_points", init_points), ("convs", convs)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
        for name, flag in (("shortcut", shortcut), ("se", se), ("nonlocal_graph", nonlocal_graph), ("flat", flat)):
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be true or false, got {flag!r}")
        if convs < 1:
            raise ValueError(f"convs must be at least 1, got {convs}")
        for name, choice, choices in (
            ("mix", mix, ("learned", "max", "mean")),
            ("grouping", grouping, ("ball", "spread", "nearest")),
            ("preset", preset, ("official", "paper")),
        ):
            if choice not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {choice!r}")
        if paper and grouping != "nearest":
            raise ValueError(f"grouping must be nearest with preset=paper, got {grouping!r}")
        form = Form(k, se, mix, grouping, paper)
        self.form, self.flat, self.min_points = form, flat, max(init_points, k)
        self.stages = nn.ModuleList()
        c_in, left, sampled = 3, 2 * init_points, grouping == "spread"
        for i, c_out in enumerate(dims):
            graph_points, samples = left, c_out != c_in
            left = left // 2 if samples else left
            points = left if samples else None
            features = nonlocal_graph and i + 1 == len(dims)
            self.stages.append(Stage(c_in, c_out, form, convs, points, shortcut, sampled, features))
            grouped = left if paper else graph_points
            if samples and grouping == "nearest" and grouped < BALLS[-1][1]:
                raise ValueError(
                    f"init_points must leave at least {BALLS[-1][1]} points for every stage, got {init_points}, which "
                    f"leaves {grouped}"
                )
            sampled = sampled or samples
            c_in = c_out
        if not 1 <= k <= graph_points or left < 1:
            raise ValueError(
                f"init_points must leave at least k points for the last graph, got init_points={init_points}, k={k}, "
                f"which leaves {graph_points}"
            )
        initialise(self, lambda name: name.endswith("project"))
        self.head = Head(2 * c_in, EMBEDDING, num_classes, dropout)

    def describe(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        """As ``forward``. Under autocast coordinates, graphs, statistics and the head stay in float32."""
        if self.flat:
            xyz = xyz * xyz.new_tensor([1, 1, 0])
        if self.form.grouping != "ball":
            xyz, rgb = _reorder(xyz, rgb, _order_of_their_own(xyz, rgb))
        if self.form.grouping == "spread":
            xyz, rgb = _reorder(xyz, rgb, ops.farthest_point_sample(xyz, xyz.shape[1]))
        h, graph = rgb, None
        for stage in self.stages:
            xyz, h, graph = stage(xyz, h, graph)
        with torch.autocast(h.device.type, enabled=False):  # it costs nothing, and batch norm shows every rounding
            return self.head(torch.cat((h.amax(1), h.mean(1)), dim=1))


def _reorder(xyz: Tensor, rgb: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    order = order.unsqueeze(2).expand_as(xyz)
    return xyz.gather(1, order), rgb.gather(1, order)


def _order_of_their_own(xyz: Tensor, rgb: Tensor) -> Tensor:
    """The indices (B, N) that sort points by x, then y, then z, then red, green and blue."""
    keys = [*rgb.unbind(2), *xyz.unbind(2)]
    order = torch.arange(xyz.shape[1], device=xyz.device).expand(xyz.shape[:2])
    for key in (*keys[2::-1], *keys[:2:-1]):  # the last key first: each sorting keeps the order of the one before
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order


ognet = partial(OGNet, (64, 128, 256, 512))  # 1.95 M parameters without the classifier
ognet_small = partial(OGNet, (48, 96, 192, 384))  # 1.20 M
ognet_deep = partial(OGNet, (48, 96, 96, 192, 192, 384, 384), convs=2, shortcut=True)  # 14 graph convolutions, 2.47 M
