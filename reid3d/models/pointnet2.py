"""PointNet++ with one scale (SSG) and with several (MSG), as the OG-Net paper compares with them.

Features are channels-last, (B, N, C). An MLP acts on pairs of a centre c and a point j of its ball, and up to its first
ReLU it is affine in them. So that part, batch normalisation included, is folded into one matrix, which acts once on
each point and once on each centre; the statistics over all pairs of all its layers follow from the mean and the
covariance of what goes in, and those from sums over points. In the published form, which has no ReLU but the last,
that part is the whole MLP, and no tensor over the pairs has more than three channels.

Source: Qi et al., "PointNet++", NeurIPS 2017, in the form of the code published with OG-Net (layumi/person-reid-3d,
``pointnet2_model.py``).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .cloud_net import EMBEDDING, CloudNet, flat_rows, initialise
from .head import Head, Output
from .norm import BatchNorm, FoldedNorm, normalise
from .ognet import SLOPE, sample_outside_hole

PAIRS = 1 << 22  # numbers in a tensor over pairs of points, about
Scale = tuple[float | None, int, tuple[int, ...]]  # radius in metres, points kept, channels of the MLP
SSG: tuple[tuple[Scale, ...], ...] = (
    ((0.2, 64, (64, 64, 128)),),
    ((0.4, 64, (128, 128, 256)),),
)
MSG: tuple[tuple[Scale, ...], ...] = (
    ((0.1, 16, (32, 32, 64)), (0.2, 32, (64, 64, 128)), (0.4, 128, (64, 96, 128))),
    ((0.2, 32, (64, 64, 128)), (0.4, 64, (128, 128, 256)), (0.8, 128, (128, 128, 256))),
)
WHOLE: Scale = (None, 0, (256, 512, 1024))  # one group of all points, about the origin


class Branch(nn.Module):
    """One scale of a set abstraction, around each centre c: the points j of its ball, first ``k`` in index order, a
    shared MLP of Linear -> BN, with ReLU after the last or after each, on (xyz_j - xyz_c, h_j), and the maximum over
    the ball. Without a radius all points are in each ball.
    """

    def __init__(self, c_in: int, scale: Scale, relu: bool) -> None:
        super().__init__()
        self.radius, self.k, self.widths = scale
        self.affine = 1 if relu else len(self.widths)  # layers in front of the first ReLU
        self.linears = nn.ModuleList(
            nn.Linear(*channels, bias=False) for channels in zip((3 + c_in, *self.widths), self.widths, strict=False)
        )
        self.norms = nn.ModuleList(map(FoldedNorm, self.widths))

    def forward(self, centers: Tensor, xyz: Tensor, h: Tensor) -> Tensor:
        """centers (B, M, 3), xyz (B, N, 3), h (B, N, C) -> (B, M, widths[-1])."""
        if self.radius is None:
            idx = torch.arange(xyz.shape[1], device=xyz.device).expand(*centers.shape[:2], -1)
        else:
            idx = ops.ball_query(centers, xyz, self.radius, self.k)
        layers = cast("list[tuple[nn.Linear, FoldedNorm]]", list(zip(self.linears, self.norms, strict=True)))
        (first, norm), *inner = layers[: self.affine]
        w_xyz, w_h = first.weight.split((3, h.shape[2]), dim=1)
        if len(w_h) < h.shape[2]:  # go on with the narrower side of it
            h, w_h = F.linear(h, w_h), torch.eye(len(w_h), dtype=h.dtype, device=h.device)
        moments = _ball_moments(centers, xyz, h, idx) if self.training else None
        weight, offset = normalise(norm, torch.cat((w_xyz, w_h), dim=1), 0.0, moments, idx.numel())
        for linear, norm in inner:
            weight, offset = normalise(norm, linear.weight @ weight, linear.weight @ offset, moments, idx.numel())
        w_xyz, w_h = weight.split((3, h.shape[2]), dim=1)
        a = F.linear(xyz, w_xyz) + F.linear(h, w_h)
        d = offset - F.linear(centers, w_xyz)
        if self.affine == len(layers):
            return F.relu(ops.group_max(a, idx) + d)
        # The statistics of training need all pairs at once; else a few clouds at a time stay in the cache.
        clouds = len(idx) if self.training else max(1, PAIRS // (idx.shape[1] * idx.shape[2] * self.widths[-1]))
        parts = zip(a.split(clouds), d.split(clouds), idx.split(clouds), strict=True)
        return torch.cat([_balls(layers[self.affine :], *part) for part in parts])


def _balls(layers: list[tuple[nn.Linear, FoldedNorm]], a: Tensor, d: Tensor, idx: Tensor) -> Tensor:
    """The layers behind a ReLU, on the pairs A_j + D_c of some clouds, and the maximum over each ball."""
    pairs = F.relu(F.embedding(flat_rows(idx, a.shape[1]), a.flatten(0, 1)) + d.flatten(0, 1).unsqueeze(1)).flatten(
        0, 1
    )
    for linear, norm in layers:
        moments = None
        if norm.training:
            mean = pairs.mean(0)
            deviation = pairs - mean
            moments = mean, deviation.T @ deviation / len(pairs)
        pairs = F.relu(F.linear(pairs, *normalise(norm, linear.weight, 0.0, moments, len(pairs))))
    slots = torch.arange(idx.shape[1] * idx.shape[2], device=idx.device)  # pair after pair
    return ops.group_max(pairs.unflatten(0, (len(idx), len(slots))), slots.view(idx.shape[1:]).expand_as(idx))


def _ball_moments(centers: Tensor, xyz: Tensor, h: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (3 + C) and covariance (3 + C, 3 + C) of (xyz_j - xyz_c, h_j) over all pairs.

    h_j counts as often as j lies in a ball, and goes with the sum of xyz_j - xyz_c over these.
    """
    rows, h = flat_rows(idx, xyz.shape[1]).flatten(), h.flatten(0, 1)
    relative = xyz.flatten(0, 1)[rows] - centers.flatten(0, 1).repeat_interleave(idx.shape[2], 0)
    share = h.new_zeros(len(h)).index_add_(0, rows, h.new_ones(1).expand(len(rows))) / len(rows)  # bincount would wait
    mean_xyz, mean_h = relative.mean(0), share @ h
    relative, h = relative - mean_xyz, h - mean_h
    cross = torch.zeros_like(xyz).flatten(0, 1).index_add(0, rows, relative / len(rows)).T @ h
    above = torch.cat((relative.T @ relative / len(rows), cross), dim=1)
    below = torch.cat((cross.T, h.T @ (share.unsqueeze(1) * h)), dim=1)
    return torch.cat((mean_xyz, mean_h)), torch.cat((above, below))


class SetAbstraction(nn.Module):
    """PointNet++ set abstraction: the branches of all its scales, joined."""

    def __init__(self, c_in: int, scales: tuple[Scale, ...], relu: bool) -> None:
        super().__init__()
        self.branches = nn.ModuleList(Branch(c_in, scale, relu) for scale in scales)

    def forward(self, centers: Tensor, xyz: Tensor, h: Tensor) -> Tensor:
        """centers (B, M, 3), xyz (B, N, 3), h (B, N, C) -> (B, M, widths[-1] of all scales)."""
        return torch.cat([branch(centers, xyz, h) for branch in self.branches], dim=2)


class PointNet2(CloudNet):
    """A coloured point cloud to a descriptor of 512 numbers of its person, by two set abstractions and one of the rest.

    Args:
        scales: of each of the two set abstractions.
        num_classes: training ids; 0 for no classifier.
        points: left after each of the two; the clouds must have as many as the first.
        relu: whether there is a ReLU after every layer of the MLPs, as in the PointNet++ paper. The published code has
            it after the last alone, which makes a weaker network of the same size.
        dropout: probability in front of the classifier. That of the OG-Net recipes; the published default is 0.5.

    The descriptor is what the published code tests with: the network without its classifier, which is the output of the
    last BatchNorm. Sampling starts at index 0, takes no point within 3.2 cm of the origin while there are others, and
    balls keep points in index order, so the order of a cloud's points matters.

    Raises:
        TypeError: points are no two ints. ValueError: points are below 1 or grow.

    Source: as this file; initialisation from the published code.
    """

    def __init__(
        self,
        scales: tuple[tuple[Scale, ...], ...],
        num_classes: int = 0,
        *,
        points: tuple[int, int] = (512, 128),
        relu: bool = False,
        dropout: float = 0.7,
    ) -> None:
        super().__init__()
        if not isinstance(points, (tuple, list)) or [type(p) for p in points] != [int, int]:
            raise TypeError(f"points must be two ints, got {points!r}")
        if not points[0] >= points[1] >= 1:
            raise ValueError(f"points must fall and be at least 1, got {tuple(points)}")
        self.points_left, self.min_points = tuple(points), points[0]
        self.abstractions = nn.ModuleList()
        c_in = 3
        for stage in (*scales, (WHOLE,)):
            self.abstractions.append(SetAbstraction(c_in, stage, relu))
            c_in = sum(widths[-1] for *_, widths in stage)
        self.hidden = nn.Sequential(nn.Linear(c_in, EMBEDDING), BatchNorm(EMBEDDING), nn.LeakyReLU(SLOPE))
        initialise(self, lambda name: name.startswith("hidden"))
        self.head = Head(EMBEDDING, EMBEDDING, num_classes, dropout, bias=True)

    def describe(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        many, few = self.points_left
        sample = sample_outside_hole(xyz, many).unsqueeze(2)
        centers = xyz.gather(1, sample.expand(-1, -1, 3))  # the first few of them are what sampling them would give
        first, second, whole = self.abstractions
        h = first(centers, xyz, rgb)
        h = second(centers[:, :few], centers, h)
        h = whole(torch.zeros_like(centers[:, :1]), centers[:, :few], h)
        return self.head(self.hidden(h.squeeze(1)))


def pointnet2_ssg(
    num_classes: int = 0, *, points: tuple[int, int] = (512, 128), relu: bool = False, dropout: float = 0.7
) -> PointNet2:
    """PointNet++ with one ball size: 1.59 M parameters without the classifier."""
    return PointNet2(SSG, num_classes, points=points, relu=relu, dropout=dropout)


def pointnet2_msg(
    num_classes: int = 0, *, points: tuple[int, int] = (512, 128), relu: bool = False, dropout: float = 0.7
) -> PointNet2:
    """PointNet++ with three ball sizes: 1.87 M parameters without the classifier."""
    return PointNet2(MSG, num_classes, points=points, relu=relu, dropout=dropout)
