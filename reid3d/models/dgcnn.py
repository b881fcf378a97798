"""DGCNN as the OG-Net paper compares with it: four EdgeConvs on one fixed graph of the nearest points in space.

No tensor over the edges is formed. What goes into batch normalisation is linear in (h_j, h_i), so its statistics over
all edges follow from the mean and the covariance of these, and those from sums over points. Normalised, an edge is a
sum A_j + D_i of one projection of either point, and the maximum over neighbours is that of A_j alone.

Source: Wang et al., "Dynamic Graph CNN for Learning on Point Clouds", TOG 2019, in the form of the code published with
OG-Net (layumi/person-reid-3d, ``DGCNN.py``), whose graph is not dynamic.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.transpose import TransposedGraph
from .cloud_net import EMBEDDING, CloudNet, flat_rows, initialise
from .head import Head, Output
from .norm import FoldedNorm, normalise
from .ognet import SLOPE


class EdgeConv(nn.Module):
    """theta(h_j - h_i) + phi(h_i) of each edge, two Linear -> BN over all edges -> max over neighbours -> LeakyReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.theta = nn.Linear(c_in, c_out)
        self.phi = nn.Linear(c_in, c_out)
        self.norm = FoldedNorm(c_out)

    def forward(self, h: Tensor, idx: Tensor, transposed: TransposedGraph) -> Tensor:
        """h (B, N, c_in), idx (B, N, k) and its transpose -> (B, N, c_out)."""
        weight = torch.cat((self.theta.weight, self.phi.weight - self.theta.weight), dim=1)  # on (h_j, h_i)
        moments = _edge_moments(h, idx, transposed) if self.training else None
        weight, offset = normalise(self.norm, weight, self.theta.bias + self.phi.bias, moments, idx.numel())
        of_j, of_i = weight.chunk(2, dim=1)
        largest = ops.group_max(F.linear(h, of_j), idx, transposed=transposed)
        return F.leaky_relu(largest + F.linear(h, of_i, offset), SLOPE)


def _edge_moments(h: Tensor, idx: Tensor, transposed: TransposedGraph) -> tuple[Tensor, Tensor]:
    """Mean (2C) and covariance (2C, 2C) of (h_j, h_i) over all edges.

    h_j counts as often as j is a neighbour, h_i always as often, and goes with the mean of its neighbours.
    """
    rows = flat_rows(idx, idx.shape[1])
    share = transposed.offsets.diff(dim=1).flatten().to(h.dtype) / idx.numel()  # of all edges, those that end in j
    mean = h.mean((0, 1))
    h = h.flatten(0, 1) - mean
    drift = share @ h  # from the mean of h_i to that of h_j
    cross = F.embedding_bag(rows, h, mode="mean").T @ h / len(h)
    above = torch.cat(((share.unsqueeze(1) * h).T @ h - drift.outer(drift), cross), dim=1)
    below = torch.cat((cross.T, h.T @ h / len(h)), dim=1)
    return torch.cat((mean + drift, mean)), torch.cat((above, below))


class DGCNN(CloudNet):
    """A coloured point cloud to a descriptor of 512 numbers of its person, by EdgeConvs on all points.

    Args:
        dims: channels after each EdgeConv; all of them are joined, 512 made of them, and those pooled.
        num_classes: training ids; 0 for no classifier.
        k: neighbours in the graph, the point itself included.
        dropout: probability in front of the classifier. That of the OG-Net recipes; the published default is 0.5.

    The descriptor is what the published code tests with: the network without its classifier, which is the output of the
    last LeakyReLU. Departure: DGL's EdgeConv, which the published code calls, takes the differences the other way
    round, and in its early versions phi of the neighbour. The functions that can be learned are the same.

    Raises:
        TypeError: k is no int. ValueError: k is below 1.

    Source: as this file; initialisation from the published code.
    """

    def __init__(self, dims: tuple[int, ...], num_classes: int = 0, *, k: int = 20, dropout: float = 0.7) -> None:
        super().__init__()
        if not isinstance(k, int):
            raise TypeError(f"k must be an int, got {k!r}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = self.min_points = k
        self.convs = nn.ModuleList(EdgeConv(*channels) for channels in zip((3, *dims), dims, strict=False))
        self.project = nn.Linear(sum(dims), EMBEDDING)
        initialise(self, lambda name: True)  # it has linear layers alone
        self.head = Head(2 * EMBEDDING, EMBEDDING, num_classes, dropout, bias=True, slope=SLOPE)

    def describe(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        idx = ops.knn(xyz, xyz, self.k).idx
        transposed = ops.transpose_graph(idx, xyz.shape[1])
        h, every = rgb, []
        for conv in self.convs:
            h = conv(h, idx, transposed)
            every.append(h)
        h = self.project(torch.cat(every, dim=2))
        return self.head(torch.cat((h.amax(1), h.mean(1)), dim=1))


def dgcnn(num_classes: int = 0, *, k: int = 20, dropout: float = 0.7) -> DGCNN:
    """DGCNN: 1.37 M parameters without the classifier."""
    return DGCNN((64, 128, 256, 512), num_classes, k=k, dropout=dropout)
