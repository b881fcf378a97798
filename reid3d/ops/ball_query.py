"""Ball query: the neighbours within a radius."""

from numbers import Real

import torch
from torch import Tensor

from .arguments import check_int, check_not_empty, check_points, check_same_cloud_batch
from .knn import query_blocks, squared_distances


def ball_query(centers: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """The first k points, in index order, strictly within a radius of every center.

    First, not nearest: what PointNet++ and OG-Net's published code do. A ball with fewer than k points repeats its
    first one; an empty ball (possible only when the center is not among the points) gives index 0 k times. The radius
    is rounded to the dtype of the points before it is squared. A NaN coordinate is in no ball.

    Args:
        centers: (B,M,3) floating point. float16 and bfloat16 are read as float32.
        points: (B,N,3), same dtype and device, N >= 1.
        radius: > 0, in the unit of the points.
        k: neighbours per center, >= 1; may exceed N.

    Returns:
        (B,M,k) int64 indices of points. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape, radius or k out of range.

    Source: Qi et al., "PointNet++", NeurIPS 2017, sec. 3.2 and its published code.
    """
    centers = check_points("centers", centers, dims=3)
    points = check_points("points", points, dims=3)
    check_same_cloud_batch("centers", centers, "points", points)
    if not isinstance(radius, Real) or isinstance(radius, bool):
        raise TypeError(f"radius must be a float, got {type(radius).__name__}")
    if not radius > 0:
        raise ValueError(f"radius must be greater than 0, got {radius}")
    check_not_empty("points", points)
    k = check_int("k", k, 1)
    return torch.ops.reid3d.ball_query(centers, points, float(radius), k)[0]


def ball_query_reference(centers: Tensor, points: Tensor, radius: float, k: int) -> tuple[Tensor, Tensor]:
    """`ball_query` in plain torch, for float32 and float64, and the hits in every ball, at most k, (B,M) int32."""
    N = points.shape[1]
    radius2 = torch.tensor(radius, dtype=points.dtype, device=points.device).square()
    order = torch.arange(N, device=points.device)
    blocks = []
    for block in query_blocks(centers, points):
        hits = torch.where(squared_distances(block, points) < radius2, order, N)
        hits = hits.topk(min(k, N), largest=False).values
        blocks.append(torch.nn.functional.pad(hits, (0, k - hits.shape[2]), value=N))
    idx = torch.cat(blocks, dim=1)
    first = idx[..., :1] % N  # an empty ball has N here: index 0
    return torch.where(idx == N, first, idx), (idx < N).sum(2, dtype=torch.int32)


torch.library.define(
    "reid3d::ball_query",
    "(Tensor centers, Tensor points, float radius, int k) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("reid3d::ball_query", "CompositeExplicitAutograd", ball_query_reference)


@torch.library.register_fake("reid3d::ball_query")
def _fake(centers: Tensor, points: Tensor, radius: float, k: int) -> tuple[Tensor, Tensor]:
    B, M, _ = centers.shape
    return centers.new_empty((B, M, k), dtype=torch.int64), centers.new_empty((B, M), dtype=torch.int32)
