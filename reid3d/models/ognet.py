"""OG-Net: graph convolutions and PointNet++ set abstraction on coloured point clouds.

Features are channels-last, (B, N, C). Three exact refactorings make the network affordable; none changes a parameter:

* the first linear layer on a pair of points, centre i and neighbour j, is a sum A_j + D_i of one projection per point;
* the statistics that batch normalisation needs over all pairs follow from sums over points, since each A_j counts as
  often as j is somebody's neighbour; so a graph convolution never forms a tensor over the edges;
* batch normalisation and ReLU are monotone in each channel, so the maximum over neighbours is taken before them.

Source: Zheng et al., "Parameter-Efficient Person Re-identification in the 3D Space", TNNLS 2022, and the code published
with it (layumi/person-reid-3d, ModelE_dense with the flags of its recipes), which decides where the two differ.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import ops
from .head import Head, Output

SLOPE = 0.2  # of every LeakyReLU
BALLS = ((0.1, 8), (0.2, 16), (0.4, 32))  # radius in metres and points kept, the same at every stage
EMBEDDING = 512
PAIRS = 1 << 22  # numbers in a tensor over pairs of points, about


class FoldedNorm(nn.BatchNorm1d):
    """BatchNorm as a (scale, shift) to apply elsewhere; parameters, buffers and their updates are BatchNorm1d's."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def fold(self, mean: Tensor | None = None, var: Tensor | None = None, count: int = 0) -> tuple[Tensor, Tensor]:
        """From the mean and biased variance of ``count`` rows, which move the running ones; from those without.

        ``var`` may be a little below 0, rounded from a sum of terms that cancel: it is 0 then.
        """
        if mean is None or var is None:
            mean, var = self.running_mean, self.running_var
        else:
            var = var.clamp_min(0)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var * (count / (count - 1)), 0.1)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale, self.bias - mean * scale

    def signs(self) -> Tensor:
        """-1 where the scale is negative, so that the largest output comes from the smallest input; else 1."""
        return torch.where(self.weight < 0, -1.0, 1.0).to(self.weight.dtype)


def _rows(idx: Tensor, n: int) -> Tensor:
    """Indices (B, M, k) into clouds of n points -> rows (B*M, k) of all their points one below the other."""
    return (idx + n * torch.arange(idx.shape[0], device=idx.device).view(-1, 1, 1)).flatten(0, 1)


def _degree(rows: Tensor, like: Tensor) -> Tensor:
    """The share of all pairs in which each row of ``like`` (n, C) is the neighbour: (n,), of sum 1."""
    return torch.bincount(rows.flatten(), minlength=like.shape[0]).to(like.dtype) / rows.numel()


class EdgeConv(nn.Module):
    """Graph convolution: Linear on (h_j - h_i, h_i) of each edge -> BN -> a learned mix of max and mean -> LeakyReLU.

    ``linear.weight`` is the published Conv2d 1x1 without its last two axes; ``mix``, the logit of the share of the
    maximum, is what the published code calls GeM, though it is no generalised mean.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * c_in, c_out)
        self.norm = FoldedNorm(c_out)
        self.mix = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor, idx: Tensor) -> Tensor:
        """h (B, N, c_in), idx (B, N, k) -> (B, N, c_out)."""
        rows = _rows(idx, h.shape[1])
        w_difference, w_self = self.linear.weight.chunk(2, dim=1)
        a = F.linear(h, w_difference)
        d = F.linear(h, w_self - w_difference, self.linear.bias).flatten(0, 1)
        mean_a = F.embedding_bag(rows, a.flatten(0, 1), mode="mean")  # over each neighbourhood
        if self.training:
            # var(A_j + D_i) = var(A_j) + var(D_i) + 2 cov(A_j, D_i), each about its mean. What is left to cancel is A
            # against D: where all h_j - h_i are small beside h_i, and so are the weights of h_i.
            all_a, all_d = mean_a.mean(0), d.mean(0)
            power_a = _degree(rows, mean_a) @ (a.flatten(0, 1) - all_a).square()
            var = power_a + ((d - all_d) * (d - all_d + 2 * (mean_a - all_a))).mean(0)
            scale, shift = self.norm.fold(all_a + all_d, var, rows.numel())
        else:
            scale, shift = self.norm.fold()
        sign = self.norm.signs()
        max_a = sign * ops.group_max(sign * a, idx).flatten(0, 1)
        mixed = torch.lerp(mean_a, max_a, self.mix.sigmoid()) + d
        return F.leaky_relu(mixed * scale + shift, SLOPE).view_as(a)


class Gate(nn.Module):
    """Per-point channel gate, an "SE block" without the squeeze: h * sigmoid(Linear(Swish(Linear(h))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 24)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, h: Tensor) -> Tensor:
        return h * self.expand(F.silu(self.reduce(h))).sigmoid()


class _MaxAndPower(torch.autograd.Function):
    """e (R, k, C) -> its maximum over k (R, C), and its mean square over R and k (C); one dense pass backwards."""

    @staticmethod
    def forward(ctx: Any, e: Tensor) -> tuple[Tensor, Tensor]:
        largest, slot = e.max(1)
        ctx.save_for_backward(e, slot)
        return largest, e.square().mean((0, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_largest: Tensor, grad_power: Tensor) -> Tensor:
        e, slot = ctx.saved_tensors
        grad = e * (grad_power * (2 / (e.shape[0] * e.shape[1])))
        return grad.scatter_add_(1, slot.unsqueeze(1), grad_largest.unsqueeze(1))


class Branch(nn.Module):
    """One scale of a set abstraction, around each centre c: the points j of its ball, first ``k`` in index order,
    Linear on (xyz_j - xyz_c, h_j) -> BN -> gate -> Linear -> BN -> ReLU -> max over the ball.
    """

    def __init__(self, channels: int, radius: float, k: int) -> None:
        super().__init__()
        self.radius, self.k = radius, k
        self.linear1 = nn.Linear(3 + channels, channels // 2, bias=False)
        self.norm1 = FoldedNorm(channels // 2)
        self.gate = Gate(channels // 2)
        self.linear2 = nn.Linear(channels // 2, channels, bias=False)
        self.norm2 = FoldedNorm(channels)

    def forward(self, centers: Tensor, xyz: Tensor, h: Tensor) -> Tensor:
        """centers (B, M, 3), xyz (B, N, 3), h (B, N, C) -> (B, M, C)."""
        idx = ops.ball_query(centers, xyz, self.radius, self.k)
        w_xyz, w_h = self.linear1.weight.split((3, h.shape[2]), dim=1)
        a = F.linear(xyz, w_xyz) + F.linear(h, w_h)
        d = -F.linear(centers, w_xyz)
        if self.training:
            # As in EdgeConv, but D_c is linear in the centre, so cov(A_j, D_c) needs of each point only the sum of the
            # centres of the balls it lies in: three numbers, without a gradient.
            rows, flat_a = _rows(idx, xyz.shape[1]), a.flatten(0, 1)
            degree, all_d = _degree(rows, flat_a), d.mean((0, 1))
            all_a = degree @ flat_a
            dev_c = centers.flatten(0, 1) - centers.mean((0, 1))
            owners = torch.zeros_like(xyz).flatten(0, 1)
            owners.index_add_(0, rows.flatten(), dev_c.repeat_interleave(self.k, 0) / rows.numel())
            cov = -((flat_a - all_a) * F.linear(owners, w_xyz)).sum(0)
            var = degree @ (flat_a - all_a).square() + (d - all_d).square().mean((0, 1)) + 2 * cov
            scale, shift = self.norm1.fold(all_a + all_d, var, rows.numel())
        else:
            scale, shift = self.norm1.fold()
        # A few clouds at a time: tensors of this size stay in the cache, and the C library keeps their memory, where
        # larger ones are mapped from and returned to the system at each use.
        clouds = max(1, PAIRS // (idx[0].numel() * h.shape[2])) if len(idx) else 1
        groups = zip((a * scale).split(clouds), (d * scale + shift).split(clouds), idx.split(clouds), strict=True)
        largest, *moments = (list(part) for part in zip(*(self._balls(*group) for group in groups), strict=True))
        if self.training:
            share = h.new_tensor([len(part) for part in largest]).unsqueeze(1) / len(h)
            means, variances = (torch.stack(part) for part in moments)
            mean = (share * means).sum(0)
            var = (share * (variances + (means - mean).square())).sum(0)
            scale, shift = self.norm2.fold(mean, var, idx.numel())
        else:
            scale, shift = self.norm2.fold()
        return F.relu(torch.cat(largest) * (self.norm2.signs() * scale) + shift)

    def _balls(self, a: Tensor, d: Tensor, idx: Tensor) -> tuple[Tensor, ...]:
        """Gate -> Linear on the pairs A_j + D_c of some clouds, times the sign of norm2's scale -> max over each ball.

        Returns the maximum (B, M, C) and, in training mode, without that sign, mean and variance over all pairs (C).
        """
        pairs = self.gate(F.embedding(_rows(idx, a.shape[1]), a.flatten(0, 1)) + d.flatten(0, 1).unsqueeze(1))
        sign = self.norm2.signs()
        weight = sign.unsqueeze(1) * self.linear2.weight
        if not self.training:
            return (F.linear(pairs, weight).amax(1).unflatten(0, idx.shape[:2]),)
        mean = F.linear(pairs.mean((0, 1)), weight)
        largest, var = _MaxAndPower.apply(F.linear(pairs, weight, -mean))  # about the mean, so that nothing cancels
        return (largest + mean).unflatten(0, idx.shape[:2]), sign * mean, var


class SetAbstraction(nn.Module):
    """PointNet++ set abstraction with three scales: one branch a ball size, summed."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(channels, radius, k) for radius, k in BALLS)

    def forward(self, centers: Tensor, xyz: Tensor, h: Tensor) -> Tensor:
        """centers (B, M, 3), xyz (B, N, 3), h (B, N, C) -> (B, M, C)."""
        return torch.stack([branch(centers, xyz, h) for branch in self.branches]).sum(0)


class Stage(nn.Module):
    """Graph convolutions, then, when ``points`` is given, a set abstraction around as many sampled points.

    With ``shortcut`` the input joins the output through a learned convex gate (``skip``, the logit of its share), after
    Linear -> LeakyReLU where the channels change. Points that were ``sampled`` before are in the order of sampling, so
    that sampling some of them takes the first.
    """

    def __init__(
        self, c_in: int, c_out: int, convs: int, points: int | None, shortcut: bool, sampled: bool, last: bool
    ) -> None:
        super().__init__()
        self.points, self.sampled, self.last = points, sampled, last
        self.convs = nn.ModuleList(EdgeConv(c_in if i == 0 else c_out, c_out) for i in range(convs))
        self.abstraction = SetAbstraction(c_out) if points is not None else None
        self.project = nn.Linear(c_in, c_out) if shortcut and points is not None else None
        self.skip = nn.Parameter(torch.zeros(())) if shortcut else None

    def forward(self, xyz: Tensor, h: Tensor, k: int, graph: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """xyz (B, N, 3), h (B, N, C), the graph of xyz if it is known -> the same of the next points."""
        h_in = h
        order = None if self.sampled or self.last else ops.morton_order(xyz)  # for a search and a sampling
        for conv in self.convs:
            if self.last:  # neighbours in space and features, anew for each convolution
                space = torch.cat((xyz, h.detach()), dim=2)
                h = conv(h, ops.knn(space, space, k).idx)
            else:
                graph = ops.knn(xyz, xyz, k, order=order).idx if graph is None else graph
                h = conv(h, graph)
        if self.abstraction is not None and self.points is not None:
            if self.sampled:
                centers, h_in = xyz[:, : self.points], h_in[:, : self.points]
            else:
                sample = ops.farthest_point_sample(xyz, self.points, order=order).unsqueeze(2)
                centers, h_in = (x.gather(1, sample.expand(-1, -1, x.shape[2])) for x in (xyz, h_in))
            h = self.abstraction(centers, xyz, h)
            if self.project is not None:
                h_in = F.leaky_relu(self.project(h_in), SLOPE)
            xyz, graph = centers, None
        if self.skip is not None:
            h = torch.lerp(h, h_in, self.skip.sigmoid())
        return xyz, h, graph


class OGNet(nn.Module):
    """Omni-scale Graph Network: a coloured point cloud to a descriptor of 512 numbers of its person.

    Args:
        dims: channels after each stage; a stage that changes them also samples points.
        num_classes: training ids; 0 for no classifier.
        k: neighbours in the graphs, the point itself included.
        convs: graph convolutions a stage.
        shortcut: join each stage's input to its output.
        init_points: points after the first sampling; each later one halves them.
        dropout: probability in front of the classifier.

    Graphs join the nearest points in space, in the last stage the nearest in (xyz, features). Sampling starts at index
    0 and balls keep points in index order, so the order of a cloud's points matters. Departure: the published sampling
    never takes a point within 3.2 cm of the origin (|p|^2 <= 1e-3); ``farthest_point_sample`` has no such rule.

    Raises:
        TypeError: k or init_points is no int. ValueError: an argument out of range, or fewer points than k left for
            the last graph.

    Source: as this file; initialisation from the published code.
    """

    inputs = "cloud"

    def __init__(
        self,
        dims: tuple[int, ...],
        num_classes: int = 0,
        *,
        k: int = 20,
        convs: int = 1,
        shortcut: bool = False,
        init_points: int = 768,
        dropout: float = 0.7,
    ) -> None:
        super().__init__()
        for name, value in (("k", k), ("init_points", init_points)):
            if not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
        self.k, self.min_points = k, max(init_points, k)
        self.stages = nn.ModuleList()
        c_in, left, sampled = 3, 2 * init_points, False
        for i, c_out in enumerate(dims):
            graph_points, samples = left, c_out != c_in
            left = left // 2 if samples else left
            points = left if samples else None
            self.stages.append(Stage(c_in, c_out, convs, points, shortcut, sampled, last=i + 1 == len(dims)))
            sampled = sampled or samples
            c_in = c_out
        if not 1 <= k <= graph_points or left < 1:
            raise ValueError(
                f"init_points must leave at least k points for the last graph, got init_points={init_points}, k={k}, "
                f"which leaves {graph_points}"
            )
        # The published code's convolutions, Linear here, are Kaiming normal by fan-in, its linear layers by fan-out.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out" if name.endswith("project") else "fan_in")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                nn.init.normal_(module.weight, 1.0, 0.02)
        self.head = Head(2 * c_in, EMBEDDING, num_classes, dropout)

    def forward(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        """Describe B clouds of N points each. Autocast is left out: neighbours and statistics need whole float32.

        Args:
            xyz: (B, N, 3) metres, about the mean of the cloud, N >= init_points and N >= k.
            rgb: (B, N, 3) in [-0.5, 0.5].

        Returns:
            In eval mode feats (B, 512), not normalised; in training mode, where B >= 2, Output(feats, logits).
        """
        if xyz.dim() != 3 or xyz.shape[2] != 3 or xyz.shape != rgb.shape:
            raise ValueError(f"xyz and rgb must both be (B, N, 3), got {tuple(xyz.shape)} and {tuple(rgb.shape)}")
        if xyz.shape[1] < self.min_points:
            raise ValueError(f"xyz must have N >= {self.min_points} points, got {xyz.shape[1]}")
        if torch.is_autocast_enabled(xyz.device.type):
            dtype = torch.promote_types(xyz.dtype, torch.float32)
            with torch.autocast(xyz.device.type, enabled=False):
                return self._describe(xyz.to(dtype), rgb.to(dtype))
        return self._describe(xyz, rgb)

    def _describe(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        h, graph = rgb, None
        for stage in self.stages:
            xyz, h, graph = stage(xyz, h, self.k, graph)
        return self.head(torch.cat((h.amax(1), h.mean(1)), dim=1))


def ognet(num_classes: int = 0, *, k: int = 20, init_points: int = 768, dropout: float = 0.7) -> OGNet:
    """OG-Net: 1.95 M parameters without the classifier."""
    return OGNet((64, 128, 256, 512), num_classes, k=k, init_points=init_points, dropout=dropout)


def ognet_small(num_classes: int = 0, *, k: int = 20, init_points: int = 768, dropout: float = 0.7) -> OGNet:
    """OG-Net-Small: 1.20 M parameters without the classifier."""
    return OGNet((48, 96, 192, 384), num_classes, k=k, init_points=init_points, dropout=dropout)


def ognet_deep(num_classes: int = 0, *, k: int = 9, init_points: int = 768, dropout: float = 0.7) -> OGNet:
    """OG-Net-Deep: 14 graph convolutions, gated short-cuts, 2.47 M parameters without the classifier."""
    dims = (48, 96, 96, 192, 192, 384, 384)
    return OGNet(dims, num_classes, k=k, convs=2, shortcut=True, init_points=init_points, dropout=dropout)
