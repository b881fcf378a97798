"""Calibration: from which similarity on two images are said to show the same person.

A false match is a pair of different people at or above the threshold. Pairs are far from independent, for each person
is in many of them, so that intervals come from drawing people anew, with all their pairs, not pairs.

A calibration file is JSON: {"format": "reid3d-calibration-1", "made_by", "source", "people", "same", "different",
"thresholds": [one object a threshold]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..io import atomic_write
from .features import Features
from .pairs import Pairs

FORMAT = "reid3d-calibration-1"
LEAST_FALSE = 30  # pairs: fewer tell a rate to no better than a third of it
LEAST_PEOPLE = 10
_STEPS = 1 << 16  # of the similarities from -1 to 1
_RESAMPLES = 2000
_AT_ONCE = 256  # of them


@dataclass(frozen=True)
class Threshold:
    """One similarity, and what it does to pairs of images; intervals hold 95 %.

    fmr: the false-match rate that was asked for. similarity: cosine, in [-1, 1]; pairs at or above it are said to be
    the same person. false_match, false_match_interval: share of pairs of different people that are, at most `fmr`.
    match, match_interval: share of the pairs of one person that are.
    """

    fmr: float
    similarity: float
    false_match: float
    false_match_interval: tuple[float, float]
    match: float
    match_interval: tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    """Thresholds for the features of one model.

    thresholds: by falling `fmr`. people: that were drawn from. same, different: pairs. made_by: of the features, see
    `Features`. source: where their clouds were.
    """

    thresholds: tuple[Threshold, ...]
    people: int
    same: int
    different: int
    made_by: str = ""
    source: str = ""

    def threshold(self, fmr: float | None = None) -> Threshold:
        """That of a false-match rate; None takes the lowest. Raises: ValueError for one that was not measured."""
        for threshold in self.thresholds if fmr is not None else self.thresholds[-1:]:
            if fmr is None or threshold.fmr == fmr:
                return threshold
        known = ", ".join(f"{threshold.fmr:g}" for threshold in self.thresholds)
        raise ValueError(f"fmr must be one that was calibrated ({known}), got {fmr:g}")

    def __str__(self) -> str:
        lines = [f"{'false matches':>13}  {'similarity':>10}  {'measured, 95 %':^28}  {'matches found, 95 %':^24}"]
        for row in self.thresholds:
            false, match = (
                f"{share:{form}} ({low:{form}} - {high:{form}})"
                for share, (low, high), form in (
                    (row.false_match, row.false_match_interval, ".3g"),
                    (row.match, row.match_interval, ".1%"),
                )
            )
            lines.append(f"{row.fmr:>13g}  {row.similarity:>10.4f}  {false:^28}  {match:^24}")
        return "\n".join([*lines, f"{self.different:,} pairs of {self.people:,} people, {self.same:,} of one person"])

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises: OSError naming the file."""
        with atomic_write(path) as file:
            file.write(json.dumps({"format": FORMAT, **asdict(self)}, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote. Raises: FileNotFoundError; ValueError when it is another file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such calibration: {path}")
        try:
            data = json.loads(Path(path).read_text())
            if data.pop("format") != FORMAT:
                raise ValueError("its format is another")
            rows = tuple(Threshold(**{key: _numbers(row[key]) for key in row}) for row in data.pop("thresholds"))
            if not rows:
                raise ValueError("it has no thresholds")
            return cls(thresholds=rows, **data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a reid3d calibration: {error}") from error


def _numbers(value: Any) -> Any:
    return tuple(map(float, value)) if isinstance(value, list) else float(value)


def calibrate(q: Features, g: Features, fmr: Sequence[float] = (1e-2, 1e-3), *, seed: int = 0) -> Calibration:
    """The lowest thresholds that keep the share of false matches among query-gallery pairs of different people at or
    below each of `fmr`, to 1/32768.

    Pairs are those of `evaluate`, of queries that show a person: no junk (pid -1), no pair of one person in one camera.
    Distractors (pid 0) are nobody's match. The people should not have been trained on, and as like as possible to those
    that will be searched: rates hold for galleries where pairs come about as they do here. Intervals are percentiles of
    2,000 draws of as many people, with replacement, distractors left as they are.

    Time is twice that of `evaluate`; memory beyond its own is some 32 kB a person and 100 bytes a false match at the
    highest rate.

    Raises: as `evaluate`; ValueError for no rates or rates outside (0, 1), a rate that would rest on fewer than 30
        false matches, and fewer than 10 people.
    Source: Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems - the subsets bootstrap", CVIU 2004;
        for the least number Doddington et al., "The NIST speaker recognition evaluation", Speech Communication 2000.
    """
    rates = sorted(set(map(float, fmr)), reverse=True)
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise ValueError(f"fmr must hold rates above 0 and below 1, got {list(fmr)}")
    pairs = Pairs(q, g)
    pids = g.pids[pairs.kept]
    people = np.union1d(q.pids, pids)
    people = people[people > 0]
    if len(people) < LEAST_PEOPLE:
        raise ValueError(f"at least {LEAST_PEOPLE} people are needed for intervals, got {len(people)}")
    if not pairs.found[q.pids > 0].any():
        raise ValueError("no query that shows a person (pid > 0) has a match")
    a, b = _places(people, q.pids), _places(people, pids)

    def blocks() -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """People of the queries (B,), steps (B, G), which pairs are of different people; row and column of matches."""
        for rows, sim in pairs.blocks():
            at, match, away = pairs.of(rows)
            match &= q.pids[rows, None] > 0
            other = torch.from_numpy(q.pids[rows] > 0).unsqueeze(1).repeat(1, sim.shape[1])
            row, slot = (match | away).nonzero()
            other[row, at[row, slot]] = False
            row, slot = match.nonzero()
            step = ((sim + 1) * (_STEPS / 2)).int().clamp_(max=_STEPS - 1)
            yield a[rows], step, other, torch.from_numpy(row), torch.from_numpy(at[row, slot])

    counts = torch.zeros(_STEPS, dtype=torch.int64)
    for _, step, other, *_ in blocks():
        counts += torch.bincount(step[other], minlength=_STEPS)
    different = int(counts.sum())
    if different * rates[-1] < LEAST_FALSE:
        raise ValueError(
            f"fmr must be at least {LEAST_FALSE} of the {different:,} pairs of different people, got {rates[-1]:g}"
        )
    above = counts.flip(0).cumsum(0).flip(0)  # pairs at or above each step
    limits = [int((above > rate * different).sum()) for rate in rates]
    if limits[-1] == _STEPS:
        raise ValueError(
            f"no threshold can be found: more than {rates[-1]:g} of the pairs of different people are alike"
        )

    matches = torch.zeros(len(rates) + 1, len(people) + 1, dtype=torch.float64)  # of each person; the last row: all
    false = []
    for who, step, other, row, column in blocks():
        for n, limit in enumerate([*limits, 0]):
            matches[n].index_add_(0, who[row], (step[row, column] >= limit).double())
        row, column = (other & (step >= limits[0])).nonzero(as_tuple=True)
        false.append(torch.stack((who[row], b[column], step[row, column])))
    ends = torch.cat(false, dim=1)
    del false

    # How often each person is in each draw; the first one is everybody once. Distractors always are.
    draws = torch.ones(_RESAMPLES + 1, len(people) + 1, dtype=torch.float64)
    anew = np.random.default_rng(seed).multinomial(len(people), np.full(len(people), 1 / len(people)), _RESAMPLES)
    draws[1:, :-1] = torch.from_numpy(anew)
    of_q, of_g = (torch.bincount(place, minlength=len(people) + 1).double() for place in (a, b))
    of_q[-1] = 0
    total = torch.cat([part @ of_q * (part @ of_g) - part.square() @ (of_q * of_g) for part in draws.split(_AT_ONCE)])
    thresholds = []
    for rate, limit, matched in zip(rates, limits, matches, strict=False):
        pair = ends[:2, ends[2] >= limit]
        ones = torch.ones(pair.shape[1], dtype=torch.float64)
        table = torch.sparse_coo_tensor(pair, ones, (len(people) + 1,) * 2, check_invariants=True)
        found = torch.cat([(part.T * (table @ part.T)).sum(0) for part in draws.split(_AT_ONCE)])
        measured = [_with_interval(share) for share in (found / total, draws @ matched / (draws @ matches[-1]))]
        thresholds.append(Threshold(rate, 2 * limit / _STEPS - 1, *measured[0], *measured[1]))
    return Calibration(tuple(thresholds), len(people), int(matches[-1].sum()), different, g.made_by, q.source)


def _places(people: np.ndarray, pids: np.ndarray) -> Tensor:
    """Of each pid its place among the people, and behind them for those that are nobody's."""
    return torch.from_numpy(np.where(pids > 0, np.searchsorted(people, pids), len(people)))


def _with_interval(shares: Tensor) -> tuple[float, tuple[float, float]]:
    """The first, and 95 % of the others; a draw of people without a match has none."""
    low, high = np.nanquantile(shares[1:].numpy(), (0.025, 0.975))
    return float(shares[0]), (float(low), float(high))
