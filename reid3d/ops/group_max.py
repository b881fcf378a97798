"""Grouped max pooling: gather and max in one pass."""

import torch
from torch import Tensor

from .arguments import check_idx, check_range, check_rows
from .transpose import TransposedGraph, check_transposed


def group_max(feats: Tensor, idx: Tensor, *, transposed: TransposedGraph | None = None) -> Tensor:
    """The channel-wise maximum of every group of points, out[b,m,c] = max over k of feats[b, idx[b,m,k], c].

    The gathered (B,M,K,C) tensor is never formed; what the gradient needs is one slot an output, a byte where K <= 256.
    The gradient lands on the winner only, the lowest k among equal ones. A NaN wins, as in torch.amax. The forward pass
    is deterministic, and so is the gradient of the compiled kernels and on the CPU, for its order of summation is
    fixed; plain torch on CUDA adds gradients in any order.

    Args:
        feats: (B,N,C) float16, bfloat16, float32 or float64.
        idx: (B,M,K) int64 on the same device, values in [0, N), 1 <= K <= 32767, M * K < 2^31.
        transposed: `transpose_graph(idx, N)`, where several ops share idx; it changes the time, never a result.

    Returns:
        (B,M,C) in the dtype of feats, differentiable twice with respect to feats.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape out of range. RuntimeError: an index out of range
        (on CUDA the launch fails, and it is reported at the next synchronisation).

    Source: the pooling of a PointNet++ set abstraction, Qi et al., NeurIPS 2017, sec. 3.2.
    """
    check_rows("feats", feats)
    check_idx(idx, feats)
    return torch.ops.reid3d.group_max(feats, idx, *check_transposed(transposed, idx, feats.shape[1]))[0]


def slot_dtype(k: int) -> torch.dtype:
    """The dtype of a slot of a group of k."""
    return torch.uint8 if k <= 256 else torch.int16


def grouped_rows(feats: Tensor, idx: Tensor) -> Tensor:
    """The gathered (B,M,K,C) tensor, which only the references form."""
    check_range(idx, feats.shape[1])
    rows = idx.flatten(1).unsqueeze(2).expand(-1, -1, feats.shape[2])
    return feats.gather(1, rows).view(*idx.shape, feats.shape[2])


def group_max_reference(
    feats: Tensor, idx: Tensor, offsets: Tensor | None = None, edges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`group_max` in plain torch, and with it the winning slot k of every output, (B,M,C) of `slot_dtype`."""
    grouped = grouped_rows(feats, idx)
    slot = grouped.argmax(2, keepdim=True)  # the first of equal ones; NaN is the greatest
    return grouped.gather(2, slot).squeeze(2), slot.squeeze(2).to(slot_dtype(idx.shape[2]))


def group_max_backward_reference(
    grad: Tensor, idx: Tensor, slot: Tensor, offsets: Tensor | None, edges: Tensor | None, n: int
) -> Tensor:
    """The gradient (B,n,C) of feats, summed in at least float32."""
    wide = grad if grad.dtype == torch.float64 else grad.float()
    return sum_at_winners(wide, idx, slot, n).to(grad.dtype)


def sum_at_winners(grad: Tensor, idx: Tensor, slot: Tensor, n: int) -> Tensor:
    """grad (B,M,C) added up at the points that won, (B,n,C)."""
    return grad.new_zeros((grad.shape[0], n, grad.shape[2])).scatter_add_(1, _winner(idx, slot), grad)


def _winner(idx: Tensor, slot: Tensor) -> Tensor:
    """The point (B,M,C) that won every output."""
    return idx.gather(2, slot.long())


torch.library.define(
    "reid3d::group_max",
    "(Tensor feats, Tensor idx, Tensor? offsets, Tensor? edges) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "reid3d::group_max_backward",
    "(Tensor grad, Tensor idx, Tensor slot, Tensor? offsets, Tensor? edges, SymInt n) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("reid3d::group_max", "CompositeExplicitAutograd", group_max_reference)
torch.library.impl("reid3d::group_max_backward", "CompositeExplicitAutograd", group_max_backward_reference)


@torch.library.register_fake("reid3d::group_max")
def _fake(feats: Tensor, idx: Tensor, offsets: Tensor | None, edges: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (idx.shape[0], idx.shape[1], feats.shape[2])
    return feats.new_empty(shape), feats.new_empty(shape, dtype=slot_dtype(idx.shape[2]))


@torch.library.register_fake("reid3d::group_max_backward")
def _fake_backward(
    grad: Tensor, idx: Tensor, slot: Tensor, offsets: Tensor | None, edges: Tensor | None, n: int
) -> Tensor:
    return grad.new_empty((grad.shape[0], n, grad.shape[2]))


def _setup_context(ctx, inputs, output) -> None:
    feats, *graph = inputs
    ctx.save_for_backward(*graph, output[1])
    ctx.n = feats.shape[1]


def _backward(ctx, grad: Tensor, _grad_slot):
    idx, offsets, edges, slot = ctx.saved_tensors
    return torch.ops.reid3d.group_max_backward(grad, idx, slot, offsets, edges, ctx.n), None, None, None


def _setup_context_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward_backward(ctx, grad_feats: Tensor):
    idx, slot = ctx.saved_tensors
    return grad_feats.gather(1, _winner(idx, slot)), None, None, None, None, None


torch.library.register_autograd("reid3d::group_max", _backward, setup_context=_setup_context)
torch.library.register_autograd("reid3d::group_max_backward", _backward_backward, setup_context=_setup_context_backward)
