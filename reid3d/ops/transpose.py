"""The transpose of a neighbourhood graph: for every point, in which groups it is and where."""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_idx, check_int, check_range


class TransposedGraph(NamedTuple):
    """Edge e = m * K + k says that point idx[b,m,k] is the k-th of group m.

    The edges that end in point j are edges[b, offsets[b,j]:offsets[b,j+1]], ascending: `offsets` (B,n+1) int32,
    `edges` (B,M*K) int32.
    """

    offsets: Tensor
    edges: Tensor


def transpose_graph(idx: Tensor, n: int) -> TransposedGraph:
    """The edges of a graph by the point in which they end.

    A gradient with respect to the points is a sum over these edges. `group_max` and `edge_pool` take the result as
    `transposed`, so that ops on the same graph share it.

    Args:
        idx: (B,M,K) int64, values in [0, n), 1 <= K <= 32767, M * K < 2^31.
        n: number of points of a cloud.

    Returns:
        TransposedGraph(offsets, edges), int32.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or n out of range. RuntimeError: an index out of
        range (on CUDA the launch fails, and it is reported at the next synchronisation).

    Source: a counting sort, Knuth, The Art of Computer Programming 3, sec. 5.2.
    """
    check_idx(idx)
    n = check_int("n", n, 1 if idx.numel() > 0 else 0)
    return TransposedGraph(*torch.ops.reid3d.transpose_graph(idx, n))


def check_transposed(transposed: TransposedGraph | None, idx: Tensor, n: int) -> tuple[Tensor | None, Tensor | None]:
    """(offsets, edges), or Nones: of the kind and shapes of transpose_graph(idx, n). The values are not looked at."""
    if transposed is None:
        return None, None
    if not isinstance(transposed, TransposedGraph):
        raise TypeError(f"transposed must be a TransposedGraph, got {type(transposed).__name__}")
    B, M, K = idx.shape
    for name, x, shape in zip(transposed._fields, transposed, ((B, n + 1), (B, M * K)), strict=True):
        if not isinstance(x, Tensor) or x.dtype != torch.int32:
            kind = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"transposed.{name} must be an int32 tensor, got {kind}")
        if x.device != idx.device:
            raise ValueError(f"transposed.{name} must be on the device of idx, {idx.device}, got {x.device}")
        if x.shape != shape:
            raise ValueError(f"transposed.{name} must have shape {shape}, got {tuple(x.shape)}")
    return transposed.offsets, transposed.edges


def transpose_graph_reference(idx: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """`transpose_graph` in plain torch."""
    check_range(idx, n)
    ends, edges = idx.flatten(1).sort(dim=1, stable=True)
    points = torch.arange(n + 1, device=idx.device).expand(idx.shape[0], -1).contiguous()
    return torch.searchsorted(ends, points, out_int32=True), edges.int()


torch.library.define(
    "reid3d::transpose_graph", "(Tensor idx, SymInt n) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
torch.library.impl("reid3d::transpose_graph", "CompositeExplicitAutograd", transpose_graph_reference)


@torch.library.register_fake("reid3d::transpose_graph")
def _fake(idx: Tensor, n: int) -> tuple[Tensor, Tensor]:
    B, M, K = idx.shape
    return idx.new_empty((B, n + 1), dtype=torch.int32), idx.new_empty((B, M * K), dtype=torch.int32)
