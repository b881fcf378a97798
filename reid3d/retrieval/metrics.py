"""CMC, mean average precision and mINP under the protocol of Market-1501."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import validate_protocol
from .features import Features
from .search import order_keys, similarity_blocks

MAX_RANK = 50
AveragePrecision = Literal["market", "mean"]


class PerQuery(NamedTuple):
    """Figures of each query, (Q,) arrays; a query without a match has rank 0 and NaN for the others.

    rank: int64, place of its first match, from 1. ap: float64 average precision. inp: float64, number of its matches
    over the place of the last one.
    """

    rank: np.ndarray
    ap: np.ndarray
    inp: np.ndarray


class Chance(NamedTuple):
    """What a random order of the gallery scores on average: exact expectations over all orders."""

    rank1: float
    mAP: float


@dataclass(frozen=True, eq=False)
class Result:
    """How well queries find their matches. Shares in [0, 1], means over the valid queries.

    cmc: (50,) float64, cmc[r - 1] the share of queries with a match among the first r. mAP: mean average precision in
    the definition `ap`. mINP: mean inverse negative penalty. per_query: see `PerQuery`. num_valid, num_query: queries
    with a match, and all. num_gallery: gallery items without junk. chance: the scores of a random order.
    """

    cmc: np.ndarray
    mAP: float
    mINP: float
    per_query: PerQuery
    ap: AveragePrecision
    num_valid: int
    num_query: int
    num_gallery: int
    chance: Chance

    def __str__(self) -> str:
        """A small table: each score, and what a random order of the gallery would score on average."""
        rows: list[tuple[str, float, float | None]] = [
            ("Rank-1", self.cmc[0], self.chance.rank1),
            ("Rank-5", self.cmc[4], None),
            ("Rank-10", self.cmc[9], None),
            (f"mAP ({self.ap})", self.mAP, self.chance.mAP),
            ("mINP", self.mINP, None),
        ]
        lines = []
        for name, value, chance in rows:
            against = f"   chance {chance:6.2%}, {value / chance:.1f} times that" if chance else ""
            lines.append(f"{name:<13}{value:7.2%}{against}")
        counts = f"{self.num_valid} of {self.num_query} queries have a match in the gallery of {self.num_gallery}"
        return "\n".join([*lines, f"single query, cross camera: {counts}"])


def evaluate(q: Features, g: Features, ap: AveragePrecision = "market") -> Result:
    """Rank the gallery for each query by cosine similarity and score the order: single query, cross camera.

    Gallery items with pid -1 (junk) are dropped. For each query the items of its pid and its camera are removed; a
    camid of -1 is unknown and removes nothing. Pid 0 (distractors) stays. A query without a match left is skipped in
    every mean and shows in num_valid. Ties go to the lower gallery index.

    ap="market": area under the precision-recall curve by trapezoids, as the original Market-1501 code (and OG-Net's
    numbers). ap="mean": the mean of the precision at each match, as torchreid and fast-reid. The two differ by a point
    or two on real sets, so a number without its definition cannot be compared.

    Memory beyond the inputs: a normalised copy of the gallery and a few blocks of 2**20 values; the similarities are
    never all held.

    Raises: ValueError for another `ap`, empty sides, dimensions that differ, or when no query has a match.
    Source: Zheng et al., ICCV 2015 (protocol, AP of its evaluation code); Ye et al., TPAMI 2021 (mINP).
    """
    if ap not in ("market", "mean"):
        raise ValueError(f"ap must be 'market' or 'mean', got {ap!r}")
    validate_protocol(q, g)
    kept = np.flatnonzero(g.pids != -1)
    pids, camids = g.pids[kept], g.camids[kept]
    by_pid = np.argsort(pids, kind="stable")
    starts = np.searchsorted(pids[by_pid], q.pids, side="left")
    counts = np.searchsorted(pids[by_pid], q.pids, side="right") - starts

    rank, last, matches, total = (np.zeros(len(q), np.int64) for _ in range(4))
    precision = np.full(len(q), np.nan)
    for rows, sim in similarity_blocks(q.feats, g.feats, kept):
        slots = np.arange(max(1, counts[rows].max()))  # one that is empty where no query of the block has a match
        same_pid = slots < counts[rows, None]
        at = by_pid[np.where(same_pid, starts[rows, None] + slots, 0)]
        same_camera = (camids[at] == q.camids[rows, None]) & (q.camids[rows, None] != -1)
        hit = torch.from_numpy(same_pid & ~same_camera)
        places = _places(order_keys(sim), torch.from_numpy(at), hit, torch.from_numpy(same_pid & same_camera)).numpy()

        matches[rows] = hit.sum(1).numpy()
        total[rows] = len(kept) - (same_pid & same_camera).sum(1)
        rows_with = np.flatnonzero(matches[rows])
        found = matches[rows][rows_with]
        rank[rows.start + rows_with] = places[rows_with, 0]
        last[rows.start + rows_with] = places[rows_with, found - 1]
        precision[rows.start + rows_with] = _average_precision(places[rows_with], found, ap)

    valid = matches > 0
    inp = np.full(len(q), np.nan)
    inp[valid] = matches[valid] / last[valid]
    reached = np.bincount(np.minimum(rank[valid], MAX_RANK + 1), minlength=MAX_RANK + 2)[1 : MAX_RANK + 1]
    return Result(
        cmc=np.cumsum(reached) / valid.sum(),
        mAP=float(precision[valid].mean()),
        mINP=float(inp[valid].mean()),
        per_query=PerQuery(rank, precision, inp),
        ap=ap,
        num_valid=int(valid.sum()),
        num_query=len(q),
        num_gallery=len(kept),
        chance=_chance(matches[valid], total[valid], ap),
    )


def _places(keys: Tensor, at: Tensor, hit: Tensor, removed: Tensor) -> Tensor:
    """Places (from 1, ascending, (B, P)) of the matches of each query among the items kept.

    keys: (B, G), changed. at: (B, P) positions in the gallery, of which `hit` are matches and `removed` do not count.
    The rest of each row of the result is arbitrary. Sorts only the matches: each gallery item is then counted, by
    binary search, into the gap between two matches that it falls into.
    """
    never = torch.iinfo(torch.int64).max
    wanted = keys.gather(1, at).masked_fill_(~hit, never).sort(1).values
    row, slot = removed.nonzero(as_tuple=True)
    keys[row, at[row, slot]] = never
    gap = torch.searchsorted(wanted, keys, right=True)
    ahead = torch.zeros(len(keys), at.shape[1] + 1, dtype=torch.int64)
    ahead.scatter_add_(1, gap, torch.ones(1, 1, dtype=torch.int64).expand_as(gap))
    return ahead.cumsum(1)[:, :-1] + 1


def _average_precision(places: np.ndarray, found: np.ndarray, ap: AveragePrecision) -> np.ndarray:
    """(B,) from the ascending places (B, P), from 1, of `found` (B,) matches."""
    order = np.arange(places.shape[1])
    precision = (order + 1) / places
    if ap == "market":  # the mean of the precision at the match and just before it, which is 1 before the first place
        precision = (precision + np.where(places > 1, order / np.maximum(places - 1, 1), 1.0)) / 2
    return np.where(order < found[:, None], precision, 0.0).sum(1) / found


def _chance(matches: np.ndarray, total: np.ndarray, ap: AveragePrecision) -> Chance:
    """Expectations over all orders of `total` items with `matches` right ones, averaged over the queries.

    Place k holds a match with probability R / N, and then (k - 1)(R - 1)/(N - 1) matches are expected ahead of it, so
    E[AP] = (H_N + (R - 1)/(N - 1) (N - H_N)) / N with the harmonic number H_N; the trapezoid's other half, the
    precision just before each match, has the expectation R / N.
    """
    harmonic = np.cumsum(1 / np.arange(1, total.max() + 1))[total - 1]
    share = matches / total
    mean = (harmonic + (matches - 1) / np.maximum(total - 1, 1) * (total - harmonic)) / total
    return Chance(float(share.mean()), float(((mean + share) / 2 if ap == "market" else mean).mean()))
