"""Neighbourhood maximum, minimum, sum and sum of squares in one pass: the base of an exact EdgeConv."""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .arguments import check_idx, check_rows
from .group_max import grouped_rows, slot_dtype, sum_at_winners
from .transpose import TransposedGraph, check_transposed


class EdgePool(NamedTuple):
    """Over the K neighbours of every group and channel, all (B,M,C): `max` and `min` in the dtype of feats, `sum` and
    `sumsq`, the sum of squares, in float32, or float64 where feats is.
    """

    max: Tensor
    min: Tensor
    sum: Tensor
    sumsq: Tensor


def edge_pool(feats: Tensor, idx: Tensor, *, transposed: TransposedGraph | None = None) -> EdgePool:
    """The maximum, minimum, sum and sum of squares of feats[b, idx[b,m,k], c] over k.

    They are all that batch normalisation and a maximum over edges need where an edge is a sum of a row of feats and a
    term of the group: no tensor over the edges is formed, neither forwards nor backwards. Where feats is far from 0,
    take its mean off first: a variance from a sum of squares is the difference of two large numbers.

    Sums run over k in order. The gradient of max and min lands on the winner only, the lowest k among equal ones; a NaN
    wins. All is deterministic as in `group_max`.

    Args:
        feats: (B,N,C) float16, bfloat16, float32 or float64.
        idx: (B,M,K) int64 on the same device, values in [0, N), 1 <= K <= 32767, M * K < 2^31.
        transposed: `transpose_graph(idx, N)`, where several ops share idx; it changes the time, never a result.

    Returns:
        EdgePool(max, min, sum, sumsq), differentiable once with respect to feats.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape out of range. RuntimeError: an index out of range
        (on CUDA the launch fails, and it is reported at the next synchronisation).

    Source: the edge function of EdgeConv, Wang et al., "Dynamic Graph CNN for Learning on Point Clouds", TOG 2019, is
    linear before its normalisation, so that it splits into a term of the point and one of the neighbour.
    """
    check_rows("feats", feats)
    check_idx(idx, feats)
    return EdgePool(*torch.ops.reid3d.edge_pool(feats, idx, *check_transposed(transposed, idx, feats.shape[1]))[:4])


def _sum_dtype(feats: Tensor) -> torch.dtype:
    return torch.float64 if feats.dtype == torch.float64 else torch.float32


def edge_pool_reference(
    feats: Tensor, idx: Tensor, offsets: Tensor | None = None, edges: Tensor | None = None
) -> tuple[Tensor, ...]:
    """`edge_pool` in plain torch, and with it the slots k of maximum and minimum, (B,M,C) of `slot_dtype`.

    Rounded as the kernels do (`knn.squared_distances`): a float32 square is added to its sum in one rounding.
    """
    grouped = grouped_rows(feats, idx)
    slots = grouped.argmax(2, keepdim=True), grouped.argmin(2, keepdim=True)  # the first of equal ones; NaN wins
    largest, smallest = (grouped.gather(2, slot).squeeze(2) for slot in slots)
    total = torch.zeros_like(largest, dtype=_sum_dtype(feats))
    power = torch.zeros_like(total)
    for row in grouped.unbind(2):
        total += row
        power = row.double().square_().add_(power).to(power.dtype)
    return largest, smallest, total, power, *(slot.squeeze(2).to(slot_dtype(idx.shape[2])) for slot in slots)


def edge_pool_backward_reference(
    grad_max: Tensor,
    grad_min: Tensor,
    grad_sum: Tensor,
    grad_sumsq: Tensor,
    feats: Tensor,
    idx: Tensor,
    max_slot: Tensor,
    min_slot: Tensor,
    offsets: Tensor | None,
    edges: Tensor | None,
) -> Tensor:
    """The gradient (B,N,C) of feats: four sums over the edges into a point, each in their order, then added up."""
    N, K = feats.shape[1], idx.shape[2]
    dtype = _sum_dtype(feats)

    def over_edges(grad: Tensor) -> Tensor:
        rows = idx.flatten(1).unsqueeze(2).expand(-1, -1, grad.shape[2])
        return torch.zeros_like(feats, dtype=dtype).scatter_add_(1, rows, grad.repeat_interleave(K, 1))

    winners = sum_at_winners(grad_max.to(dtype), idx, max_slot, N) + sum_at_winners(
        grad_min.to(dtype), idx, min_slot, N
    )
    return (winners + over_edges(grad_sum) + 2 * feats.to(dtype) * over_edges(grad_sumsq)).to(feats.dtype)


torch.library.define(
    "reid3d::edge_pool",
    "(Tensor feats, Tensor idx, Tensor? offsets, Tensor? edges) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "reid3d::edge_pool_backward",
    "(Tensor grad_max, Tensor grad_min, Tensor grad_sum, Tensor grad_sumsq, Tensor feats, Tensor idx, Tensor max_slot, "
    "Tensor min_slot, Tensor? offsets, Tensor? edges) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("reid3d::edge_pool", "CompositeExplicitAutograd", edge_pool_reference)
torch.library.impl("reid3d::edge_pool_backward", "CompositeExplicitAutograd", edge_pool_backward_reference)


@torch.library.register_fake("reid3d::edge_pool")
def _fake(feats: Tensor, idx: Tensor, offsets: Tensor | None, edges: Tensor | None) -> tuple[Tensor, ...]:
    shape = (idx.shape[0], idx.shape[1], feats.shape[2])
    dtypes = (feats.dtype,) * 2 + (_sum_dtype(feats),) * 2 + (slot_dtype(idx.shape[2]),) * 2
    return tuple(feats.new_empty(shape, dtype=dtype) for dtype in dtypes)


@torch.library.register_fake("reid3d::edge_pool_backward")
def _fake_backward(
    grad_max: Tensor,
    grad_min: Tensor,
    grad_sum: Tensor,
    grad_sumsq: Tensor,
    feats: Tensor,
    idx: Tensor,
    max_slot: Tensor,
    min_slot: Tensor,
    offsets: Tensor | None,
    edges: Tensor | None,
) -> Tensor:
    return feats.new_empty(feats.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], *output[4:], *inputs[2:])


def _backward(ctx, *grads: Tensor):
    return torch.ops.reid3d.edge_pool_backward(*grads[:4], *ctx.saved_tensors), None, None, None


def _second_backward(ctx, grad_feats: Tensor) -> NoReturn:
    raise RuntimeError("edge_pool can be differentiated once only")


torch.library.register_autograd("reid3d::edge_pool", _backward, setup_context=_setup_context)
torch.library.register_autograd("reid3d::edge_pool_backward", _second_backward)
