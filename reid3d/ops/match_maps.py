"""The best match of every position of a feature map in another map, for all pairs of two sets of maps."""

from typing import NoReturn

import torch
from torch import Tensor

from .arguments import FLOATS

MAX_POSITIONS = 32767  # of a map: winners are int16


def match_maps(query: Tensor, gallery: Tensor) -> Tensor:
    """Both ways' best matches of each query map with each gallery map.

    With s[i,j] = <query[q,:,i], gallery[g,:,j]>, out[q,g,0,i] = max over j of s[i,j], what position i of the query map
    finds in the gallery map, and out[q,g,1,j] = max over i of s[i,j]. Maps (C,h,w) are flattened by the caller. The
    compiled kernels, which take a map at a time into the cache, never write the similarities to memory; plain torch
    does so some pairs at a time. Where a gradient is wanted, the winners are kept: 4 L bytes a pair.

    The gradient lands on the winner only, the lowest position among equal ones; a NaN wins, as in torch.amax. A pair's
    result depends on its two maps alone, and from the compiled kernels match_maps(b, a) is
    match_maps(a, b).transpose(0, 1).flip(2) to the last bit. They are deterministic; the last bits differ between sets
    of instructions and devices. The gradient of plain torch, and so that on CUDA, is summed by a matrix product.

    Args:
        query: (Q,C,L) float16, bfloat16, float32 or float64, 1 <= C, 1 <= L <= 32767. Half types are read as float32, a
            map at a time on the CPU.
        gallery: (G,C,L) on the same device; float64 goes with float64 only, the others with each other.

    Returns:
        (Q,G,2,L) float32, or float64, differentiable once with respect to both.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape out of range.

    Source: the query-adaptive convolution and global max pooling of Liao and Shao, "Interpretable and Generalizable
    Person Re-Identification with Query-Adaptive Convolution and Temporal Lifting", ECCV 2020, sec. 3.2.
    """
    for name, x in (("query", query), ("gallery", gallery)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if (query.dtype == torch.float64) != (gallery.dtype == torch.float64):
        raise TypeError(f"query and gallery must both be float64, or neither, got {query.dtype} and {gallery.dtype}")
    if query.device != gallery.device:
        raise ValueError(f"gallery must be on the device of query, {query.device}, got {gallery.device}")
    if query.dim() != 3 or query.shape[1] < 1 or not 1 <= query.shape[2] <= MAX_POSITIONS:
        limits = f"with 1 <= C and 1 <= L <= {MAX_POSITIONS}"
        raise ValueError(f"query must have shape (Q, C, L) {limits}, got {tuple(query.shape)}")
    if gallery.dim() != 3 or gallery.shape[1:] != query.shape[1:]:
        C, L = query.shape[1:]
        raise ValueError(f"gallery must have shape (G, {C}, {L}), as query, got {tuple(gallery.shape)}")
    winners = torch.is_grad_enabled() and (query.requires_grad or gallery.requires_grad)
    with torch.autocast(query.device.type, enabled=False):
        return torch.ops.reid3d.match_maps(query, gallery, winners)[0]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _blocks(x: Tensor, other: int) -> list[tuple[int, Tensor]]:
    """x (G,C,L) in pieces of which `other` maps have not too many similarities, each with the number of its first map:
    as many as stay in the cache on the CPU, and fit in memory elsewhere.
    """
    numbers = 1 << 21 if x.device.type == "cpu" else 1 << 26
    size = max(1, numbers // max(1, other * x.shape[2] ** 2))
    return [(first, _wide(x[first : first + size])) for first in range(0, x.shape[0], size)]


def match_maps_reference(query: Tensor, gallery: Tensor, winners: bool = True) -> tuple[Tensor, Tensor]:
    """`match_maps` in plain torch, and the winning positions (Q,G,2,L) int16, of no query without `winners`."""
    (Q, C, L), G = query.shape, gallery.shape[0]
    best = query.new_empty((Q, G, 2, L), dtype=_wide(query[:0]).dtype)
    winner = query.new_empty((Q if winners else 0, G, 2, L), dtype=torch.int16)
    for q, mine in _blocks(query, 8):
        rows = mine.transpose(1, 2).reshape(-1, C)
        for g, theirs in _blocks(gallery, len(mine)):
            sim = (rows @ theirs.transpose(0, 1).reshape(C, -1)).view(len(mine), L, len(theirs), L)
            block = (slice(q, q + len(mine)), slice(g, g + len(theirs)))
            # of equal ones argmax is the first, and a NaN is the greatest
            best[block][:, :, 0] = sim.amax(3).transpose(1, 2)
            best[block][:, :, 1] = sim.amax(1)
            if winners:
                winner[block][:, :, 0] = sim.argmax(3).transpose(1, 2)
                winner[block][:, :, 1] = sim.argmax(1)
    return best, winner


def match_maps_backward_reference(grad: Tensor, winner: Tensor, gallery: Tensor) -> Tensor:
    """The gradient (Q,C,L) of the query maps: of each pair a matrix with what goes from a position to a position, times
    the gallery map.
    """
    if winner.shape != grad.shape:
        raise RuntimeError("match_maps: there is no gradient without winners")
    Q, G, _, L = grad.shape
    out = grad.new_zeros((Q, gallery.shape[1], L))
    for q in range(0, Q, 8):
        for g, theirs in _blocks(gallery, min(8, Q - q)):
            block = (slice(q, q + 8), slice(g, g + len(theirs)))
            (mine, other), (at, of) = grad[block].unbind(2), winner[block].long().unbind(2)
            pairs = mine.new_zeros((len(mine), L, len(theirs), L))  # position i of a query map, position j of a map
            pairs.scatter_(3, at.transpose(1, 2).unsqueeze(3), mine.transpose(1, 2).unsqueeze(3))
            pairs.scatter_add_(1, of.unsqueeze(1), other.unsqueeze(1))  # to every place at most once: in no order
            rows = theirs.transpose(1, 2).reshape(len(theirs) * L, -1)
            out[q : q + 8] += (pairs.flatten(2) @ rows).transpose(1, 2)
    return out


torch.library.define(
    "reid3d::match_maps",
    "(Tensor query, Tensor gallery, bool winners) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "reid3d::match_maps_backward",
    "(Tensor grad, Tensor winner, Tensor gallery) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("reid3d::match_maps", "CompositeExplicitAutograd", match_maps_reference)
torch.library.impl("reid3d::match_maps_backward", "CompositeExplicitAutograd", match_maps_backward_reference)


@torch.library.register_fake("reid3d::match_maps")
def _fake(query: Tensor, gallery: Tensor, winners: bool) -> tuple[Tensor, Tensor]:
    (Q, _, L), G = query.shape, gallery.shape[0]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    best = query.new_empty((Q, G, 2, L), dtype=wide)
    return best, query.new_empty((Q if winners else 0, G, 2, L), dtype=torch.int16)


@torch.library.register_fake("reid3d::match_maps_backward")
def _fake_backward(grad: Tensor, winner: Tensor, gallery: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[0], gallery.shape[1], grad.shape[3]))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2], output[1])


def _backward(ctx, grad: Tensor, _grad_winner):
    query, gallery, winner = ctx.saved_tensors
    of_query = of_gallery = None
    with torch.autocast(grad.device.type, enabled=False):
        if ctx.needs_input_grad[0]:
            of_query = torch.ops.reid3d.match_maps_backward(grad, winner, gallery).to(query.dtype)
        if ctx.needs_input_grad[1]:
            grad, winner = (x.transpose(0, 1).flip(2) for x in (grad, winner))
            of_gallery = torch.ops.reid3d.match_maps_backward(grad, winner, query).to(gallery.dtype)
    return of_query, of_gallery, None


def _second_backward(ctx, *grads: Tensor) -> NoReturn:
    raise RuntimeError("match_maps can be differentiated once only")


torch.library.register_autograd("reid3d::match_maps", _backward, setup_context=_setup_context)
torch.library.register_autograd("reid3d::match_maps_backward", _second_backward)
