"""The places of a query's matches in its ranked list, without the list."""

import torch
from torch import Tensor


def match_places(
    sim: Tensor, matches: Tensor, removed: Tensor, junk: Tensor | None = None, *, pessimistic: bool = False
) -> Tensor:
    """Where each query's matches would stand if its row were sorted by falling similarity.

    No row is sorted: the few matches are, and the compiled kernel, which is for CPUs, then counts for each of them the
    other items ahead of it, by comparisons of vectors, or by binary search where a query has hundreds of matches. Among
    equal similarities the lower position comes first; `pessimistic` places a match after all equal items that are not
    matches. 0.0 equals -0.0, infinities have their places. A query's places depend on its own row alone, so that
    neither threads nor the size of the batch change them.

    Args:
        sim: (B,G) float32, a row for each query, larger is more similar.
        matches: (B,P) int64 positions in the row, different ones, in any order; -1 is none.
        removed: (B,R) int64 positions that do not count, none of them a match; -1 is none.
        junk: (J,) int64 positions that count for no query, none of them a match; None is none.
        pessimistic: how ties are broken.

    Returns:
        (B,P) int64, for each query the places of its matches among the items left, from 1 and ascending, then 0 for
        each -1. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape out of range. RuntimeError: a NaN in sim or a
        position out of range (on CUDA the launch fails, and it is reported at the next synchronisation).
    """
    if not isinstance(sim, Tensor) or sim.dtype != torch.float32:
        raise TypeError(f"sim must be a float32 tensor, got {getattr(sim, 'dtype', type(sim).__name__)}")
    if sim.dim() != 2:
        raise ValueError(f"sim must have shape (B, G), got {tuple(sim.shape)}")
    if junk is None:
        junk = sim.new_empty(0, dtype=torch.int64)
    rows = f"({sim.shape[0]}, "
    for name, x, shape in (
        ("matches", matches, f"{rows}P)"),
        ("removed", removed, f"{rows}R)"),
        ("junk", junk, "(J,)"),
    ):
        if not isinstance(x, Tensor) or x.dtype != torch.int64:
            raise TypeError(f"{name} must be an int64 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.device != sim.device:
            raise ValueError(f"{name} must be on the device of sim, {sim.device}, got {x.device}")
        if x.dim() != 1 if name == "junk" else x.dim() != 2 or x.shape[0] != sim.shape[0]:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    return torch.ops.reid3d.match_places(sim, matches, removed, junk, pessimistic)


def match_places_reference(
    sim: Tensor, matches: Tensor, removed: Tensor, junk: Tensor, pessimistic: bool = False
) -> Tensor:
    """`match_places` in plain torch: each item is counted, by binary search, between the two matches it falls into."""
    B, G = sim.shape
    never = torch.iinfo(torch.int64).max
    torch._assert_async(~sim.isnan().any(), "sim must not hold NaN")
    for positions in (matches, removed, junk):
        good = ((positions >= -1) & (positions < G)).all()
        torch._assert_async(good, f"matches, removed and junk must hold -1 or a position below {G}")
    # Keys ascend with falling similarity, then position: IEEE 754 order as the order of signed integers; + 0.0 makes
    # -0.0 and 0.0 equal. The last column is the item that -1 stands for.
    bits = (-sim).add_(0.0).view(torch.int32)
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
    keys = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(G, device=sim.device))
    keys = torch.cat([keys, keys.new_full((B, 1), never)], 1)
    wanted = keys.gather(1, matches.where(matches >= 0, G)).sort(1).values
    for positions in (matches, removed, junk.expand(B, -1)):
        keys.scatter_(1, positions.where(positions >= 0, G), never)
    after = wanted | 0xFFFFFFFF if pessimistic else wanted
    ahead = keys.new_zeros(B, matches.shape[1] + 1)
    gap = torch.searchsorted(after, keys, right=True)
    ahead.scatter_add_(1, gap, gap.new_ones(1, 1).expand_as(gap))
    order = torch.arange(1, matches.shape[1] + 1, device=sim.device)
    return (ahead.cumsum(1)[:, :-1] + order).where(wanted != never, 0)


torch.library.define(
    "reid3d::match_places",
    "(Tensor sim, Tensor matches, Tensor removed, Tensor junk, bool pessimistic) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("reid3d::match_places", "CompositeExplicitAutograd", match_places_reference)


@torch.library.register_fake("reid3d::match_places")
def _fake(sim: Tensor, matches: Tensor, removed: Tensor, junk: Tensor, pessimistic: bool) -> Tensor:
    return matches.new_empty(matches.shape)
