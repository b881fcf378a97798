"""Gated pooling: gather, gate, linear and maximum over groups in one pass, with the moments for a batch norm."""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .arguments import check_idx, check_rows
from .group_max import grouped_rows, slot_dtype


class Gate(NamedTuple):
    """Weights of a channel gate y * sigmoid(expand silu(reduce y + reduce_bias) + expand_bias), of r hidden channels:
    reduce (r,H), reduce_bias (r,), expand (H,r), expand_bias (H,).
    """

    reduce: Tensor
    reduce_bias: Tensor
    expand: Tensor
    expand_bias: Tensor


class GatedPool(NamedTuple):
    """`extreme` (B,M,C) over each group, `mean` and biased `var` (C,) over all pairs; None where not asked for."""

    extreme: Tensor
    mean: Tensor | None
    var: Tensor | None


def gated_pool(
    points: Tensor,
    centers: Tensor,
    idx: Tensor,
    weight: Tensor,
    gate: Gate | None = None,
    *,
    sign: Tensor | None = None,
    moments: bool = False,
) -> GatedPool:
    """Of e = gate(points[b, idx[b,m,k]] + centers[b,m]) weight^T for all pairs (b,m,k): the maximum over k.

    What a branch of a set abstraction does between its two batch norms, and before the second one's monotone rest: no
    tensor over the pairs is kept for the gradient, which computes them anew; the compiled kernels, which are for CPUs,
    form them some groups at a time, and plain torch all at once. The gradient of the moments is affine in e, and so
    costs no product with the weights of every pair. Moments of no pairs are NaN.

    The gradient of the maximum lands on the winner only, the lowest k among equal ones; a NaN wins. The compiled
    kernels are deterministic: the order of their sums follows from the shapes, and not from the threads. Unlike the
    other ops this one rounds as the processor does: the last bits differ between sets of instructions.

    Args:
        points: (B,N,H) float32 or float64; half types are read as float32.
        centers: (B,M,H) of the same dtype.
        idx: (B,M,K) int64, values in [0, N), 1 <= K <= 32767.
        weight: (C,H). A half type on CUDA has the products with it computed in that.
        gate: None leaves it out.
        sign: (C,), of 1 and -1; where it is -1, `extreme` is the minimum. None is 1 everywhere.
        moments: whether mean and var are wanted.

    Returns:
        GatedPool(extreme, mean, var), differentiable once with respect to all but idx and sign.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape out of range. RuntimeError: an index out of range.

    Source: Zheng et al., TNNLS 2022, fig. 4, and its published code: PointNet++'s set abstraction with a gate.
    """
    check_rows("points", points)
    check_rows("centers", centers)
    check_idx(idx, points, "points")
    (B, _, H), M = points.shape, idx.shape[1]
    if centers.dtype != points.dtype:
        raise TypeError(f"centers must have the dtype of points, {points.dtype}, got {centers.dtype}")
    _check("centers", centers, (B, M, H))
    _check("weight", weight, (len(weight) if isinstance(weight, Tensor) and weight.dim() else 0, H))
    sign = weight.new_ones(len(weight)) if sign is None else sign
    _check("sign", sign, (len(weight),))
    wide = torch.float64 if points.dtype == torch.float64 else torch.float32
    weights: list[Tensor | None] = [None] * 4
    if gate is not None:
        if not isinstance(gate, Gate):
            raise TypeError(f"gate must be an ops.Gate, got {type(gate).__name__}")
        r = len(gate.reduce_bias) if isinstance(gate.reduce_bias, Tensor) and gate.reduce_bias.dim() else 0
        if r < 1:
            raise ValueError("gate.reduce_bias must have at least one number")
        for name, x, shape in zip(Gate._fields, gate, ((r, H), (r,), (H, r), (H,)), strict=True):
            _check(f"gate.{name}", x, shape)
        weights = [gate.reduce.to(wide), gate.reduce_bias.to(wide), gate.expand.t().to(wide), gate.expand_bias.to(wide)]
    weight = weight if weight.is_cuda and wide == torch.float32 else weight.to(wide)
    with torch.autocast(points.device.type, enabled=False):
        extreme, mean, var, _, _ = torch.ops.reid3d.gated_pool(
            points.to(wide), centers.to(wide), idx, *weights, weight, sign.to(wide), moments
        )
    return GatedPool(extreme, mean, var) if moments else GatedPool(extreme, None, None)


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")


class _Pairs(NamedTuple):
    """Of all pairs (B,M,K,·): y = points + centers, the hidden channels of the gate, the gate and p = y * gate."""

    y: Tensor
    hidden: Tensor | None
    gate: Tensor | None
    p: Tensor


def _pairs(
    points: Tensor,
    centers: Tensor,
    idx: Tensor,
    reduce: Tensor | None,
    reduce_bias: Tensor | None,
    expand: Tensor | None,
    expand_bias: Tensor | None,
) -> _Pairs:
    y = grouped_rows(points, idx) + centers.unsqueeze(2)
    if reduce is None or reduce_bias is None or expand is None or expand_bias is None:
        return _Pairs(y, None, None, y)
    hidden = y @ reduce.t() + reduce_bias
    gate = ((hidden * hidden.sigmoid()) @ expand + expand_bias).sigmoid()
    return _Pairs(y, hidden, gate, y * gate)


def gated_pool_reference(
    points: Tensor,
    centers: Tensor,
    idx: Tensor,
    reduce: Tensor | None,
    reduce_bias: Tensor | None,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    weight: Tensor,
    sign: Tensor,
    moments: bool,
) -> tuple[Tensor, ...]:
    """`gated_pool` in plain torch, all pairs at a time, `expand` transposed: extreme, mean, var (0 long without
    `moments`), and for the gradient the mean of the inner channels (H,), 0 of none, and the slot k of every extreme.
    """
    p = _pairs(points, centers, idx, reduce, reduce_bias, expand, expand_bias).p
    e = (p.to(weight.dtype) @ weight.t()).to(p.dtype)
    slot = (e * sign).argmax(2, keepdim=True)  # the first of equal ones; NaN is the greatest
    extreme = e.gather(2, slot).squeeze(2)
    slot = slot.squeeze(2).to(slot_dtype(idx.shape[2]))
    if not moments:
        none = e.new_empty(0)
        return extreme, none, none.clone(), none.clone(), slot
    every = (0, 1, 2)
    inner_mean = p.sum(every) / max(1, idx.numel())
    return extreme, e.mean(every), e.var(every, correction=0), inner_mean, slot


def gated_pool_backward_reference(
    grad: Tensor,
    points: Tensor,
    centers: Tensor,
    idx: Tensor,
    reduce: Tensor | None,
    reduce_bias: Tensor | None,
    expand: Tensor | None,
    expand_bias: Tensor | None,
    weight: Tensor,
    slot: Tensor,
    inner_mean: Tensor,
    q: Tensor,
    q0: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients of points, centers, reduce, reduce_bias, expand (transposed), expand_bias, that of weight from the
    winners alone, and the sum of (p - inner_mean)^T (p - inner_mean) over all pairs, (H,H), for the rest of it.

    The moments' gradient with respect to p is q0 + (p - inner_mean) q; where q is 0 long they have none.
    """
    y, hidden, gate, p = _pairs(points, centers, idx, reduce, reduce_bias, expand, expand_bias)
    winners = grad.new_zeros(*idx.shape, grad.shape[2]).scatter_(2, slot.long().unsqueeze(2), grad.unsqueeze(2))
    grad_weight = winners.flatten(0, 2).t() @ p.flatten(0, 2)
    grad_p = (winners.to(weight.dtype) @ weight).to(p.dtype)
    square = q
    if q.numel():
        centred = p - inner_mean
        grad_p = grad_p + q0 + (centred.to(weight.dtype) @ q.to(weight.dtype)).to(p.dtype)
        square = centred.flatten(0, 2).t() @ centred.flatten(0, 2)
    none = grad.new_empty(0)
    gates = (none.view(0, p.shape[3]), none.clone(), none.view(0, p.shape[3]).clone(), none.clone())
    grad_y = grad_p
    if gate is not None and hidden is not None and expand is not None and reduce is not None:
        s = hidden.sigmoid()
        grad_inside = grad_p * y * gate * (1 - gate)
        grad_hidden = (grad_inside @ expand.t()) * (s + hidden * s * (1 - s))
        grad_y = grad_p * gate + grad_hidden @ reduce
        gates = (
            grad_hidden.flatten(0, 2).t() @ y.flatten(0, 2),
            grad_hidden.sum((0, 1, 2)),
            (hidden * s).flatten(0, 2).t() @ grad_inside.flatten(0, 2),
            grad_inside.sum((0, 1, 2)),
        )
    rows = idx.flatten(1).unsqueeze(2).expand(-1, -1, y.shape[3])
    grad_points = torch.zeros_like(points).scatter_add_(1, rows, grad_y.flatten(1, 2))
    return grad_points, grad_y.sum(2), *gates, grad_weight, square.clone()


torch.library.define(
    "reid3d::gated_pool",
    "(Tensor points, Tensor centers, Tensor idx, Tensor? reduce, Tensor? reduce_bias, Tensor? expand, "
    "Tensor? expand_bias, Tensor weight, Tensor sign, bool moments) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "reid3d::gated_pool_backward",
    "(Tensor grad, Tensor points, Tensor centers, Tensor idx, Tensor? reduce, Tensor? reduce_bias, Tensor? expand, "
    "Tensor? expand_bias, Tensor weight, Tensor slot, Tensor inner_mean, Tensor q, Tensor q0) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("reid3d::gated_pool", "CompositeExplicitAutograd", gated_pool_reference)
torch.library.impl("reid3d::gated_pool_backward", "CompositeExplicitAutograd", gated_pool_backward_reference)


@torch.library.register_fake("reid3d::gated_pool")
def _fake(points, centers, idx, reduce, reduce_bias, expand, expand_bias, weight, sign, moments):
    B, M, K = idx.shape
    (C, H), last = weight.shape, 1 if moments else 0
    return (
        points.new_empty((B, M, C)),
        points.new_empty((last * C,)),
        points.new_empty((last * C,)),
        points.new_empty((last * H,)),
        points.new_empty((B, M, C), dtype=slot_dtype(K)),
    )


@torch.library.register_fake("reid3d::gated_pool_backward")
def _fake_backward(
    grad, points, centers, idx, reduce, reduce_bias, expand, expand_bias, weight, slot, inner_mean, q, q0
):
    H, r = weight.shape[1], 0 if reduce is None else reduce.shape[0]
    shapes = ((r, H), (r,), (r, H), (0 if reduce is None else H,), weight.shape, q.shape)
    return points.new_empty(points.shape), points.new_empty(centers.shape), *(points.new_empty(s) for s in shapes)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:8], output[4], output[3])
    ctx.gated, ctx.moments = inputs[3] is not None, inputs[9]


def _backward(ctx, grad: Tensor, grad_mean: Tensor, grad_var: Tensor, _grad_inner: Tensor, _grad_slot: Tensor):
    *inputs, weight, slot, inner_mean = ctx.saved_tensors
    q = q0 = scale = grad_mean.new_empty(0)
    if ctx.moments:
        pairs = max(1, inputs[2].numel())
        exact = weight.to(grad_var.dtype)
        scale = (2 / pairs) * grad_var.unsqueeze(1) * exact
        q, q0 = exact.t() @ scale, (grad_mean / pairs) @ exact
    *grads, grad_weight, square = torch.ops.reid3d.gated_pool_backward(grad, *inputs, weight, slot, inner_mean, q, q0)
    if ctx.moments:
        grad_weight = grad_weight + scale @ square + torch.outer(grad_mean, inner_mean)
    gates = grads[2:] if ctx.gated else [None] * 4
    return *grads[:2], None, *gates, grad_weight.to(weight.dtype), None, None


def _second_backward(ctx, *grads: Tensor) -> NoReturn:
    raise RuntimeError("gated_pool can be differentiated once only")


torch.library.register_autograd("reid3d::gated_pool", _backward, setup_context=_setup_context)
torch.library.register_autograd("reid3d::gated_pool_backward", _second_backward)
