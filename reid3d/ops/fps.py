"""Farthest point sampling."""

import torch
from torch import Tensor

from .arguments import check_int, check_not_empty, check_points
from .knn import squared_distances
from .morton import check_order, check_permutation


def farthest_point_sample(xyz: Tensor, m: int, start: int = 0, *, order: Tensor | None = None) -> Tensor:
    """Picks m points of every cloud, each the farthest from those already picked.

    No index is repeated, whatever duplicates the cloud holds; equal distances go to the lowest index. Points with a NaN
    coordinate are picked after all others. There is no distance at which it stops working: clouds in millimetres and
    points near the origin are points like any other.

    The first m of a longer sample are the sample of m, and a sampled cloud needs no sampling again: of its m points, in
    the order of picking, the first m' are what sampling them from their first point would give.

    Args:
        xyz: (B,N,3) floating point, N >= 1. float16 and bfloat16 are read as float32.
        m: number of points to pick, 0 <= m <= N.
        start: index of the first point picked, 0 <= start < N.
        order: what `morton_order` gave for xyz, to save its computation. It changes no result.

    Returns:
        (B,m) int64 indices, in the order of picking. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape, m or start out of range. RuntimeError: order is
        no permutation (on CUDA: an index out of range, reported at the next synchronisation).

    Source: Qi et al., "PointNet++", NeurIPS 2017, sec. 3.2. Departs from its published code, which passes over points
    within 3 cm of the origin and repeats indices when points coincide.
    """
    xyz = check_points("xyz", xyz, dims=3)
    check_not_empty("xyz", xyz)
    m = check_int("m", m, 0, xyz.shape[1], "the number of points")
    start = check_int("start", start, 0, xyz.shape[1] - 1, "the last point")
    check_order(order, xyz)
    return torch.ops.reid3d.farthest_point_sample(xyz, order, m, start)


def farthest_point_sample_reference(xyz: Tensor, m: int, start: int) -> Tensor:
    """`farthest_point_sample` in plain torch, for float32 and float64."""
    B, N, _ = xyz.shape
    picked = torch.empty((B, m), dtype=torch.int64, device=xyz.device)
    # Squared distance to the nearest picked point: +inf before the first, -1 for NaN points, -inf once picked.
    dist2 = xyz.new_full((B, N), torch.inf).masked_fill_(xyz.isnan().any(2), -1)
    current = torch.full((B, 1), start, device=xyz.device)
    for i in range(m):
        picked[:, i : i + 1] = current
        dist2.scatter_(1, current, -torch.inf)
        point = xyz.gather(1, current[..., None].expand(-1, -1, xyz.shape[2]))
        dist2 = torch.minimum(dist2, squared_distances(point, xyz)[:, 0])
        current = dist2.argmax(1, keepdim=True)  # the first of equal ones
    return picked


torch.library.define(
    "reid3d::farthest_point_sample",
    "(Tensor xyz, Tensor? order, int m, int start) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("reid3d::farthest_point_sample", "CompositeExplicitAutograd")
def _plain(xyz: Tensor, order: Tensor | None, m: int, start: int) -> Tensor:
    check_permutation(order)
    return farthest_point_sample_reference(xyz, m, start)


@torch.library.register_fake("reid3d::farthest_point_sample")
def _fake(xyz: Tensor, order: Tensor | None, m: int, start: int) -> Tensor:
    return xyz.new_empty((xyz.shape[0], m), dtype=torch.int64)
