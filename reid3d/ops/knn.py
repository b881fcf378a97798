"""k nearest neighbours, exact, by direct differences."""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_int, check_not_empty, check_points, check_same_cloud_batch
from .morton import check_order, check_permutation


class KNN(NamedTuple):
    """Neighbours of every query: `dist2` (B,M,k) squared distances, ascending; `idx` (B,M,k) int64 into points."""

    dist2: Tensor
    idx: Tensor


def knn(query: Tensor, points: Tensor, k: int, *, order: Tensor | None = None) -> KNN:
    """The k nearest points of every query, exactly.

    Distances are differences of coordinates, never |q|^2 + |p|^2 - 2qp, so clouds far from the origin keep their
    neighbours. Equal distances are ordered by index, on every device. A point finds itself when query is points.
    A squared distance that is NaN or overflows counts as +inf, so such points come last. The compiled kernels give the
    same bits on every device; without them a float32 distance can rarely differ in its last bit
    (`squared_distances`), and with it the order of points that are as near.

    Args:
        query: (B,M,D) floating point. float16 and bfloat16 are read as float32.
        points: (B,N,D), same dtype and device, N >= 1.
        k: number of neighbours, 1 <= k <= N.
        order: what `morton_order` gave for points, to save its computation. It changes no result.

    Returns:
        KNN(dist2, idx), both (B,M,k), ascending; dist2 is float32 or float64 and differentiable with respect to query
        and points (the choice of neighbours is a constant), in the squared unit of the input.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or k out of range. RuntimeError: order is no
        permutation (on CUDA: an index out of range, reported at the next synchronisation).

    Source: the k-NN graph of EdgeConv, Wang et al., "Dynamic Graph CNN for Learning on Point Clouds", TOG 2019.
    """
    own = query is points  # a half type is widened once, so that the kernel still sees a cloud's own graph
    query = check_points("query", query)
    points = query if own else check_points("points", points)
    check_same_cloud_batch("query", query, "points", points)
    check_not_empty("points", points)
    k = check_int("k", k, 1, points.shape[1], "the number of points")
    check_order(order, points)
    return KNN(*torch.ops.reid3d.knn(query, points, order, k))


def squared_distances(query: Tensor, points: Tensor) -> Tensor:
    """All squared distances (B,M,D) x (B,N,D) -> (B,M,N), in the dtype of the input; NaN becomes +inf.

    The roundings of the compiled kernels: coordinate after coordinate, acc = d * d + acc, where float32 is fused
    (rounded once) and float64 is not. Here d * d of float32 is exact in float64, and the sum is rounded to float64 and
    then to float32. The result is the fused one, except where the float64 sum lies exactly midway between two float32
    numbers and the true sum does not, which is rare: then the last bit may differ.
    """
    acc = query.new_zeros((query.shape[0], query.shape[1], points.shape[1]))
    for q, p in zip(query.unbind(2), points.unbind(2), strict=True):
        difference = (q[:, :, None] - p[:, None, :]).double()
        acc = difference.square_().add_(acc).to(acc.dtype)
    return acc.nan_to_num_(nan=torch.inf, posinf=torch.inf)


def query_blocks(query: Tensor, points: Tensor) -> tuple[Tensor, ...]:
    """query in pieces (B,·,D) small enough for a matrix of distances: in cache on the CPU, in memory elsewhere."""
    pairs = 1 << 16 if query.device.type == "cpu" else 1 << 24
    return query.split(max(1, pairs // max(1, points.shape[0] * points.shape[1])), dim=1)


def _smallest(dist2: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of the last dimension in ascending order, equal values in index order."""
    if dist2.dtype == torch.float64:
        values, idx = dist2.sort(stable=True)
        return values[..., :k].clone(), idx[..., :k].clone()  # no view that keeps all the others in memory
    # Bits of non-negative floats order as the floats do. With the index below them no two keys are equal, so that topk,
    # which leaves the order of equal values open, has no choice.
    key = dist2.view(torch.int32).long().bitwise_left_shift_(32)
    key |= torch.arange(dist2.shape[-1], device=dist2.device)
    key = key.topk(k, largest=False).values
    return (key >> 32).int().view(torch.float32), key & 0xFFFFFFFF


def knn_reference(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`knn` in plain torch, for float32 and float64: oracle of the tests, and the kernel where none was compiled."""
    blocks = [_smallest(squared_distances(block, points), k) for block in query_blocks(query, points)]
    return torch.cat([dist2 for dist2, _ in blocks], dim=1), torch.cat([idx for _, idx in blocks], dim=1)


torch.library.define(
    "reid3d::knn",
    "(Tensor query, Tensor points, Tensor? order, int k) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("reid3d::knn", "CompositeExplicitAutograd")
def _plain(query: Tensor, points: Tensor, order: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    check_permutation(order)
    return knn_reference(query, points, k)


@torch.library.register_fake("reid3d::knn")
def _fake(query: Tensor, points: Tensor, order: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], query.shape[1], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx, inputs, output) -> None:
    query, points, *_ = inputs
    ctx.save_for_backward(query, points, output[1])


def _backward(ctx, grad_dist2: Tensor, _grad_idx):
    query, points, idx = ctx.saved_tensors
    B, M, k = idx.shape
    rows = idx.reshape(B, M * k, 1).expand(-1, -1, points.shape[2])
    neighbours = points.gather(1, rows).view(B, M, k, -1)
    grad = 2 * grad_dist2[..., None] * (query[:, :, None] - neighbours)  # d|q-p|^2/dq = 2(q-p) = -d|q-p|^2/dp
    grad_points = torch.zeros_like(points).scatter_add(1, rows, -grad.reshape(B, M * k, -1))
    return grad.sum(2), grad_points, None, None


torch.library.register_autograd("reid3d::knn", _backward, setup_context=_setup_context)
