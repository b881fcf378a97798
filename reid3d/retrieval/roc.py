"""Same person or not: the share of true pairs found at a share of false alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .features import Features
from .pairs import Pairs


@dataclass(frozen=True, eq=False)
class ROC:
    """Points of the receiver operating characteristic, (K,) float64 arrays.

    A pair is said to be one person when its similarity is at least `threshold`, which is the lowest similarity of a
    matching pair at which no more than the share `fpr` of the other pairs is; `tpr` is the share of the matching pairs
    that are then found. Where there is none, threshold is inf and tpr 0. num_match, num_other: the pairs.
    """

    fpr: np.ndarray
    tpr: np.ndarray
    threshold: np.ndarray
    num_match: int
    num_other: int


def roc(
    q: Features,
    g: Features,
    fpr: Sequence[float] = (1e-4, 1e-3, 1e-2),
    *,
    scores: np.ndarray | None = None,
    cross_camera: bool = True,
) -> ROC:
    """True positive rates at the given false positive rates, over all pairs that count for `evaluate`.

    Those are the pairs of a query with each gallery item that is neither junk nor removed for it, of queries without a
    match too; junk queries (pid -1) have none. Exact: the matching pairs are held and sorted, and the others counted
    between them in a second pass over the similarities.

    Args:
        q, g, scores, cross_camera: as for `evaluate`.
        fpr: shares in [0, 1].

    Memory beyond the inputs: some numbers for each matching pair, and what `evaluate` takes.

    Raises: as `evaluate`; ValueError for fpr outside [0, 1], or when all pairs match.
    """
    wanted = np.array(fpr, np.float64)
    if wanted.ndim != 1 or not ((wanted >= 0) & (wanted <= 1)).all():
        raise ValueError(f"fpr must be a list of shares between 0 and 1, got {fpr}")
    pairs = Pairs(q, g, scores, cross_camera=cross_camera)
    matching: list[np.ndarray] = []
    for rows, sim in pairs.blocks():
        at, match, _ = pairs.of(rows)
        row, slot = match.nonzero()
        matching.append(sim.numpy()[row, at[row, slot]])
    threshold = np.sort(np.concatenate(matching))
    above, num_other = np.zeros(len(threshold), np.int64), 0  # other pairs at or above each
    for rows, sim in pairs.blocks():
        at, match, away = pairs.of(rows)
        row, slot = (match | away).nonzero()
        others = sim.numpy().copy()
        others[row, at[row, slot]] = np.nan
        others[:, pairs.junk] = np.nan
        others = others[pairs.query.pids[rows] != -1].ravel()
        others.sort()  # NaN last
        others = others[: len(others) - np.count_nonzero(np.isnan(others))]
        above += len(others) - np.searchsorted(others, threshold, side="left")
        num_other += len(others)
    if not num_other:
        raise ValueError("there must be pairs of different people, but all pairs match")
    first = np.searchsorted(-above / num_other, -wanted, side="left")  # `above` falls as the threshold rises
    return ROC(
        fpr=wanted,
        tpr=(len(threshold) - first) / len(threshold),
        threshold=np.append(threshold, np.inf)[first].astype(np.float64),
        num_match=len(threshold),
        num_other=num_other,
    )
