"""Temporal lifting: who was near the query in its camera is likely to be near the right item in the item's camera."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data.layouts import FRAMES_PER_SESSION
from .features import Features, check_model
from .search import similarity_blocks

Clock = Literal["frames", "seconds", "market-continuous", "market-official", "duke"]
FRAME_RATE = 25.0  # of Market-1501, and of synthetic worlds
DUKE_RATE = 59.94
DUKE_START = (5542, 3606, 27243, 31181, 0, 22401, 18967, 46765)  # frames, of cameras 1 to 8
_BLOCK = 2**20  # values held at once
_SLACK = 1e-6  # seconds
_WIDTH = 0.2  # of a cosine below 1, over which a score falls to 1/e; see benchmarks/temporal.py


class Timed(Protocol):
    """What a clock reads: features, or a split."""

    @property
    def camids(self) -> np.ndarray: ...
    @property
    def times(self) -> np.ndarray | None: ...
    def __len__(self) -> int: ...


def clock_seconds(clock: Clock, *parts: Timed) -> list[np.ndarray]:
    """The times of each part in seconds, (N,) float64, by the clock of its data set.

    "frames": 25 to a second, for synthetic worlds; sessions in Market's names are 40,000 seconds apart.
    "seconds": times are seconds already.
    "market-continuous": in each camera a session begins at the last frame of the one before, of all parts: the paper
    takes train, query and gallery.
    "market-official": the same with the bug of the published code, which adds twice where the session before began:
    only the gaps between sessions grow.
    "duke": cameras 1 to 8 begin at known frames of a common clock, 59.94 frames a second.

    A session without images lasts no time.

    Raises: ValueError for another clock, times or cameras that are not known (-1), or, for "duke", another camera.
    Source: Liao & Shao, ECCV 2020, sec. 5.2 (QAConv), and its published code.
    """
    if clock not in ("frames", "seconds", "market-continuous", "market-official", "duke"):
        known = "'frames', 'seconds', 'market-continuous', 'market-official' or 'duke'"
        raise ValueError(f"clock must be {known}, got {clock!r}")
    known_times = []
    for part in parts:
        _check_cameras(part)
        if part.times is None and len(part) or part.times is not None and (part.times < 0).any():
            many = len(part) if part.times is None else (part.times < 0).sum()
            raise ValueError(f"times must be known, got {many} of {len(part)} that are not")
        known_times.append(np.empty(0, np.int64) if part.times is None else part.times)
    if clock == "seconds":
        return [times.astype(np.float64) for times in known_times]
    if clock == "frames":
        return [times / FRAME_RATE for times in known_times]
    if clock == "duke":
        for part in parts:
            if len(part) and not (1 <= part.camids.min() and part.camids.max() <= len(DUKE_START)):
                raise ValueError(f"camids must be from 1 to 8 for the clock 'duke', got {np.unique(part.camids)}")
        start = np.array((0, *DUKE_START))
        return [(times + start[part.camids]) / DUKE_RATE for part, times in zip(parts, known_times, strict=True)]

    cameras, camera = np.unique(np.concatenate([part.camids for part in parts]), return_inverse=True)
    session, frame = np.divmod(np.concatenate(known_times), FRAMES_PER_SESSION)
    last = np.full((len(cameras), session.max(initial=0) + 1), -1)
    np.maximum.at(last, (camera, session), frame)
    start = np.zeros_like(last)
    for s in range(1, last.shape[1]):
        before, length = start[:, s - 1], last[:, s - 1]
        again = before if clock == "market-official" else 0
        start[:, s] = before + np.where(length < 0, 0, length + again)
    seconds = (start[camera, session] + frame) / FRAME_RATE
    return np.split(seconds, np.cumsum([len(part) for part in parts])[:-1])


def tlift(
    q: Features,
    g: Features,
    scores: np.ndarray | None = None,
    *,
    seconds: Sequence[np.ndarray] | None = None,
    tau: float = 100.0,
    sigma: float = 200.0,
    k: int = 10,
    alpha: float = 0.2,
) -> np.ndarray:
    """Scores times (p + alpha), (Q, G) float32 in [0, 1 + alpha], p in [0, 1] how well the time fits.

    For each query A and each gallery camera: R are the queries of A's camera less than tau seconds from A, A among
    them. The k largest scores of R with that camera, taken together, are the pivots: with every other one as large as
    the smallest of them, as often as an item is found, or all where there are fewer. p of an item is the mean over the
    pivots of exp(-dt**2 / sigma**2). The query's own camera is lifted like the others. So the published code; the paper
    leaves open what is tied or found twice.

    scores: (Q, G) float32 in [0, 1], of any model, such as those of `reid3d.rerank`. The time multiplies them by alpha
    to 1 + alpha, so a match must be several times as large as another item: of cosines it is not. None takes
    exp((cos - 1) / 0.2) = exp(-d**2 / 0.4), d the distance of unit vectors; QAConv, which the method comes from, has
    sigmoids. seconds: the times of q, (Q,), and of g, (G,), which need to agree within a camera only; None is
    clock_seconds("frames", q, g).

    Identities are not looked at, so everybody in g can be a pivot: to compare with published figures leave junk out of
    g beforehand. Memory beyond inputs and result: a copy of one camera's scores, a few of those of a pair of cameras,
    and, where many scores are tied at the k-th, some 20 bytes for each of them.

    Raises: ValueError for tau or sigma <= 0, k < 1, alpha < 0, unknown cameras or times, shapes that differ, and scores
        or seconds that are not in range; TypeError for scores that are no float32 array.
    Source: Liao & Shao, ECCV 2020, sec. 4, eq. (3), and its published code.
    """
    for name, value in (("tau", tau), ("sigma", sigma)):
        if not 0 < value < np.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    _check_cameras(q)
    _check_cameras(g)
    given = clock_seconds("frames", q, g) if seconds is None else seconds
    if len(given) != 2:
        raise ValueError(f"seconds must be two arrays, of q and of g, got {len(given)}")
    q_times, g_times = (np.asarray(times, np.float64) for times in given)
    for name, times, n in (("q", q_times, len(q)), ("g", g_times, len(g))):
        if times.shape != (n,) or not np.isfinite(times).all():
            raise ValueError(f"seconds of {name} must be ({n},) finite numbers, got shape {times.shape}")
    if scores is None:
        check_model(q, g)
        out = scores = _kernel(q, g)
    else:
        _check_scores(scores, len(q), len(g))
        out = np.empty_like(scores)
    for camera in np.unique(g.camids):
        columns = np.flatnonzero(g.camids == camera)
        theirs, at = torch.from_numpy(scores.take(columns, 1)), torch.from_numpy(g_times[columns])
        for own in np.unique(q.camids):
            rows = np.flatnonzero(q.camids == own)
            rows = rows[np.argsort(q_times[rows], kind="stable")]
            for part, pivots, offsets in _pivots(theirs[rows], torch.from_numpy(q_times[rows]), tau, k):
                mine = rows[part]
                who, place = torch.unique(pivots, return_inverse=True)
                step = max(1, _BLOCK // len(who))
                for start in range(0, len(columns), step):
                    chunk = slice(start, start + step)
                    near = ((at[who, None] - at[chunk]) / sigma).float().square_().neg_().exp_()
                    p = torch.nn.functional.embedding_bag(place, near, offsets, mode="mean")
                    lifted = p.add_(alpha).mul_(theirs[mine][:, chunk])
                    out[mine[:, None], columns[chunk]] = lifted.numpy()
    return out


def _pivots(scores: Tensor, seconds: Tensor, tau: float, k: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For parts of the (n,) queries of a camera, in the order of time: the columns of their pivots, all in one, and
    where those of each query begin. scores: (n, G) with one gallery camera.
    """
    best = scores.topk(min(k, scores.shape[1])).values[:, -1:]
    row, column = (scores >= best).nonzero(as_tuple=True)  # k of each row, and ties: no other can be a pivot
    value = scores[row, column]
    begin = torch.searchsorted(row, torch.arange(len(scores) + 1))
    tau -= min(_SLACK, tau / 2)  # an item exactly tau away is not in it, however the difference is rounded
    first = begin[torch.searchsorted(seconds, seconds - tau, right=True)]
    last = begin[torch.searchsorted(seconds, seconds + tau)]
    width = int((last - first).max())
    step = max(1, _BLOCK // width)
    for start in range(0, len(scores), step):
        part = slice(start, start + step)
        entry = first[part, None] + torch.arange(width)
        is_there = entry < last[part, None]
        entry.clamp_(max=len(value) - 1)
        candidates = torch.where(is_there, value[entry], -1)
        threshold = candidates.topk(min(k, width)).values[:, -1:]
        chosen = is_there & (candidates >= threshold)
        count = chosen.sum(1)
        yield part, column[entry[chosen]], count.cumsum(0) - count


def _kernel(q: Features, g: Features) -> np.ndarray:
    out = np.empty((len(q), len(g)), np.float32)
    for rows, block in similarity_blocks(q.feats, g.feats):
        out[rows] = block.sub_(1).div_(_WIDTH).exp_().numpy()
    return out


def _check_scores(scores: np.ndarray, q: int, g: int) -> None:
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32:
        raise TypeError(f"scores must be a float32 NumPy array, got {getattr(scores, 'dtype', type(scores))}")
    if scores.shape != (q, g):
        raise ValueError(f"scores must have shape ({q}, {g}), got {scores.shape}")
    low, high = (scores.min(), scores.max()) if scores.size else (0, 0)
    if not (low >= 0 and high <= 1):
        raise ValueError(f"scores must be between 0 and 1, got values in [{low}, {high}]")


def _check_cameras(part: Timed) -> None:
    if many := int((part.camids < 0).sum()):
        raise ValueError(f"camids must be known, got {many} of {len(part)} that are not")
