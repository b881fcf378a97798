"""CMC, mean average precision and mINP under the protocols of Market-1501 and CUHK03."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops import match_places
from .features import Features
from .pairs import Pairs

MAX_RANK = 50
_BLOCK = 2**20  # comparisons held at once
AveragePrecision = Literal["market", "mean"]
Ties = Literal["stable", "pessimistic"]


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
    with a match, and all. num_gallery: gallery items without junk. chance: the scores of a random order. ties,
    protocol: how they were broken, and the rules in words.
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
    ties: Ties
    protocol: str

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
        return "\n".join([*lines, f"{self.protocol}: {counts}"])


def evaluate(
    q: Features,
    g: Features,
    ap: AveragePrecision = "market",
    *,
    scores: np.ndarray | None = None,
    ties: Ties = "stable",
    cross_camera: bool = True,
    multi_query: bool = False,
    single_gallery_shot: bool = False,
) -> Result:
    """Rank the gallery for each query by similarity and score the order.

    Gallery items with pid -1 (junk) are dropped. For each query the items of its pid and its camera are removed; a
    camid of -1 is unknown and removes nothing. Pid 0 (distractors) stays; queries should have none. A query
    without a match left is skipped in every mean and shows in num_valid.

    Args:
        q, g: queries and gallery. Their features are compared by cosine.
        ap: "market" is the area under the precision-recall curve by trapezoids, as the original Market-1501 code (and
            OG-Net's numbers). "mean" is the mean of the precision at each match, as torchreid and fast-reid. The two
            differ by a point or two on real sets, so a number without its definition cannot be compared.
        scores: (Q,G) float32 similarities, larger is more similar, in place of the cosines: of a re-ranking or a pair
            matcher. Infinities have their places. Never copied whole.
        ties: "stable" puts the lower gallery index first, "pessimistic" a match after all equal items that are not
            matches. A large difference between the two means that many similarities are equal.
        cross_camera: False is for data without cameras: only the query image itself, an item of the same pid, name and
            source, is removed.
        multi_query: queries of one pid and camera (without cross_camera: of one pid) become one query, the mean of
            their features of unit length. Results are those of the pooled queries, in the order of their first images.
        single_gallery_shot: CMC as on the classic CUHK03: each query sees one item of each person in the gallery, drawn
            at random, and `cmc` is the expectation over all draws, computed, not sampled: a match competes with other
            people who are drawn independently, each ahead of it with the share of his items that are. Distractors are
            different people. All else, per_query.rank too, is of the full gallery.

    Memory beyond the inputs: a few blocks of 2**20 values, and without scores a normalised copy of the gallery; the
    similarities are never all held. Of given similarities neither threads nor blocks change a bit of the result.

    Raises: TypeError for scores of another kind. ValueError for unknown options, empty sides, names that are not
        unique, dimensions that differ, features of two models, scores of another shape or with NaN, multi_query with
        scores, or when no query has a match, with the rule that took them.
    Source: Zheng et al., ICCV 2015 (protocols, AP of its evaluation code); Ye et al., TPAMI 2021 (mINP); Li et al.,
        CVPR 2014 (single gallery shot).
    """
    for name, value, known in (("ap", ap, ("market", "mean")), ("ties", ties, ("stable", "pessimistic"))):
        if value not in known:
            raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}")
    pairs = Pairs(q, g, scores, cross_camera=cross_camera, multi_query=multi_query)
    num_query, valid = len(pairs.found), pairs.found > 0
    draws = _SingleShot(pairs, ties) if single_gallery_shot else None

    rank, last = np.zeros(num_query, np.int64), np.zeros(num_query, np.int64)
    precision = np.full(num_query, np.nan)
    junk = torch.from_numpy(pairs.junk)
    for rows, sim in pairs.blocks():
        at, match, away = pairs.of(rows)
        matches, removed = (torch.from_numpy(np.where(which, at, -1)) for which in (match, away))
        places = match_places(sim, matches, removed, junk, pessimistic=ties == "pessimistic").numpy()
        with_match = np.flatnonzero(valid[rows])
        found, places, at_query = pairs.found[rows][with_match], places[with_match], rows.start + with_match
        rank[at_query] = places[:, 0]
        last[at_query] = places[np.arange(len(places)), found - 1]
        precision[at_query] = _average_precision(places, found, ap)
        if draws:
            draws.add(rows, sim, at, match)

    inp = np.full(num_query, np.nan)
    inp[valid] = pairs.found[valid] / last[valid]
    reached = np.bincount(np.minimum(rank[valid], MAX_RANK + 1), minlength=MAX_RANK + 2)[1 : MAX_RANK + 1]
    chance = _chance(pairs.found[valid], (len(pairs.kept) - pairs.removed)[valid], ap)
    words = ["multi query" if multi_query else "single query", "cross camera" if cross_camera else "any camera"]
    return Result(
        cmc=draws.cmc[valid].mean(0) if draws else np.cumsum(reached) / valid.sum(),
        mAP=float(precision[valid].mean()),
        mINP=float(inp[valid].mean()),
        per_query=PerQuery(rank, precision, inp),
        ap=ap,
        num_valid=int(valid.sum()),
        num_query=num_query,
        num_gallery=len(pairs.kept),
        chance=chance._replace(rank1=1 / len(draws.starts)) if draws else chance,
        ties=ties,
        protocol=", ".join([*words, *["single gallery shot"] * single_gallery_shot]),
    )


class _SingleShot:
    """The expected CMC of each query, `cmc` (Q,50), where one item of each person is drawn.

    Of the match that is drawn, the number of people ahead is a sum of independent draws of yes or no, one a person,
    whose distribution is built up person by person (the Poisson binomial distribution); expectations of a query's
    matches, each of them drawn as often as the others, are averaged.
    """

    def __init__(self, pairs: Pairs, ties: Ties) -> None:
        self.columns, self.starts = pairs.by_person()
        self.cmc = np.zeros((len(pairs.found), MAX_RANK))
        self._found = pairs.found
        self._pessimistic = ties == "pessimistic"
        self._sizes = np.diff(self.starts, append=len(self.columns))
        place = np.zeros(self.columns.max() + 1, np.int64)
        place[self.columns] = np.repeat(np.arange(len(self.starts)), self._sizes)
        self._person = place  # of each column

    def add(self, rows: slice, sim: Tensor, at: np.ndarray, match: np.ndarray) -> None:
        """Queries of a block: sim (B,C); at, match (B,P), as `Pairs.of` gives them."""
        every, slots = match.nonzero()
        step = max(1, _BLOCK // len(self.columns))
        for start in range(0, len(every), step):
            row = every[start : start + step]
            column = at[row, slots[start : start + step]]
            others = sim.numpy()[row[:, None], self.columns]
            own = sim.numpy()[row, column][:, None]
            ahead = others > own
            ahead |= (others == own) & (self._pessimistic | (self.columns < column[:, None]))
            share = np.add.reduceat(ahead, self.starts, axis=1, dtype=np.float64) / self._sizes
            share[np.arange(len(row)), self._person[column]] = 0  # the match is what was drawn of its person
            number = np.zeros((len(row), MAX_RANK))  # of people ahead: the chance of each, as far as it is asked for
            number[:, 0] = 1
            for likely in share.T[share.any(0)]:
                moved = number * likely[:, None]
                number -= moved
                number[:, 1:] += moved[:, :-1]
            query = rows.start + row
            np.add.at(self.cmc, query, number.cumsum(1) / self._found[query, None])


def _average_precision(places: np.ndarray, found: np.ndarray, ap: AveragePrecision) -> np.ndarray:
    """(B,) from the places (B, P) of `found` (B,) matches, as `match_places` gives them."""
    order = np.arange(places.shape[1])
    places = np.maximum(places, 1)  # 0 where there is no match
    precision = (order + 1) / places
    if ap == "market":  # the mean of the precision at the match and just before it, which is 1 before the first place
        precision = (precision + np.where(places > 1, order / np.maximum(places - 1, 1), 1.0)) / 2
    # In the order of the places: a sum's last bits would depend on the width of the block.
    return np.where(order < found[:, None], precision, 0.0).cumsum(1)[:, -1] / found


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
