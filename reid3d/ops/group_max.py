"""Grouped max pooling: gather and max in one pass."""

import torch
from torch import Tensor

from .arguments import check_not_empty, check_rows

MAX_GROUP = 32767  # the slot of the winner is kept in an int16


def group_max(feats: Tensor, idx: Tensor) -> Tensor:
    """The channel-wise maximum of every group of points, out[b,m,c] = max over k of feats[b, idx[b,m,k], c].

    The gathered (B,M,K,C) tensor is never formed. The gradient lands on the winner only, the lowest k among equal ones.
    A NaN wins, as in torch.amax. The forward pass is deterministic, and so is the gradient of the compiled kernels and
    on the CPU, for its order of summation is fixed; plain torch on CUDA adds gradients in any order.

    Args:
        feats: (B,N,C) float16, bfloat16, float32 or float64.
        idx: (B,M,K) int64 on the same device, values in [0, N), 1 <= K <= 32767.

    Returns:
        (B,M,C) in the dtype of feats, differentiable twice with respect to feats.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape out of range. RuntimeError: an index out of range
        (on CUDA the launch fails, and it is reported at the next synchronisation).

    Source: the pooling of a PointNet++ set abstraction, Qi et al., NeurIPS 2017, sec. 3.2.
    """
    check_rows("feats", feats)
    if not isinstance(idx, Tensor) or idx.dtype != torch.int64:
        raise TypeError(f"idx must be an int64 tensor, got {getattr(idx, 'dtype', type(idx).__name__)}")
    if idx.device != feats.device:
        raise ValueError(f"idx must be on the device of feats, {feats.device}, got {idx.device}")
    if idx.dim() != 3 or idx.shape[0] != feats.shape[0] or not 1 <= idx.shape[2] <= MAX_GROUP:
        raise ValueError(
            f"idx must have shape ({feats.shape[0]}, M, K) with 1 <= K <= {MAX_GROUP}, got {tuple(idx.shape)}"
        )
    if idx.numel() > 0:
        check_not_empty("feats", feats)
    return torch.ops.reid3d.group_max(feats, idx)[0]


def group_max_reference(feats: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """`group_max` in plain torch, and with it the winning slot k of every output, (B,M,C) int16."""
    B, M, K = idx.shape
    C = feats.shape[2]
    grouped = feats.gather(1, idx.reshape(B, M * K, 1).expand(-1, -1, C)).view(B, M, K, C)
    slot = grouped.argmax(2, keepdim=True)  # the first of equal ones; NaN is the greatest
    return grouped.gather(2, slot).squeeze(2), slot.squeeze(2).to(torch.int16)


def group_max_backward_reference(grad: Tensor, idx: Tensor, slot: Tensor, n: int) -> Tensor:
    """The gradient (B,n,C) of feats, summed in at least float32."""
    wide = grad if grad.dtype == torch.float64 else grad.float()
    feats = wide.new_zeros((grad.shape[0], n, grad.shape[2]))
    return feats.scatter_add_(1, _winner(idx, slot), wide).to(grad.dtype)


def _winner(idx: Tensor, slot: Tensor) -> Tensor:
    """The point (B,M,C) that won every output."""
    return idx.gather(2, slot.long())


torch.library.define(
    "reid3d::group_max", "(Tensor feats, Tensor idx) -> (Tensor, Tensor)", tags=torch.Tag.pt2_compliant_tag
)
torch.library.define(
    "reid3d::group_max_backward",
    "(Tensor grad, Tensor idx, Tensor slot, SymInt n) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("reid3d::group_max", "CompositeExplicitAutograd", group_max_reference)
torch.library.impl("reid3d::group_max_backward", "CompositeExplicitAutograd", group_max_backward_reference)


@torch.library.register_fake("reid3d::group_max")
def _fake(feats: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    shape = (idx.shape[0], idx.shape[1], feats.shape[2])
    return feats.new_empty(shape), feats.new_empty(shape, dtype=torch.int16)


@torch.library.register_fake("reid3d::group_max_backward")
def _fake_backward(grad: Tensor, idx: Tensor, slot: Tensor, n: int) -> Tensor:
    return grad.new_empty((grad.shape[0], n, grad.shape[2]))


def _setup_context(ctx, inputs, output) -> None:
    feats, idx = inputs
    ctx.save_for_backward(idx, output[1])
    ctx.n = feats.shape[1]


def _backward(ctx, grad: Tensor, _grad_slot):
    idx, slot = ctx.saved_tensors
    return torch.ops.reid3d.group_max_backward(grad, idx, slot, ctx.n), None


def _setup_context_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _backward_backward(ctx, grad_feats: Tensor):
    idx, slot = ctx.saved_tensors
    return grad_feats.gather(1, _winner(idx, slot)), None, None, None


torch.library.register_autograd("reid3d::group_max", _backward, setup_context=_setup_context)
torch.library.register_autograd("reid3d::group_max_backward", _backward_backward, setup_context=_setup_context_backward)
