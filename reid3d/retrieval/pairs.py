"""Pairs of queries and gallery items: which match, which do not count, and how similar they are, block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .features import Features, check_model
from .search import similarity_blocks

_BLOCK = 2**20  # scores, or slots for matches, looked at at once


class Pairs:
    """All pairs of two sides, by the rules of `evaluate`, which also says what is refused.

    query: the queries, pooled for multi_query. kept: gallery items that are not junk, (K,) ascending. junk: columns of
    the blocks that hold junk, (J,). found, removed: how many items match each query, and how many of its pid do not
    count, (Q,).
    """

    def __init__(
        self,
        q: Features,
        g: Features,
        scores: np.ndarray | None = None,
        *,
        cross_camera: bool = True,
        multi_query: bool = False,
    ) -> None:
        for name, side in (("query", q), ("gallery", g)):
            if not len(side):
                raise ValueError(f"{name} must not be empty")
            if len(set(side.names)) < len(side):
                twice = Counter(side.names).most_common(1)[0][0]
                raise ValueError(f"{name} must name each image once, got {twice} more than once")
        if scores is not None:
            _check_scores(scores, len(q), len(g), multi_query)
        else:
            check_model(q, g)
        self.kept = np.flatnonzero(g.pids != -1)
        if not len(self.kept):
            raise ValueError(f"gallery must not be all junk (pid -1), got {len(g)} of {len(g)} items")
        itself = None if cross_camera else _same_image(q, g)
        if multi_query:
            q, pool = _pooled(q, cross_camera)
            itself = None if itself is None else np.where(itself >= 0, pool[itself], -1)
        self.query, self._gallery, self._scores, self._itself = q, g, scores, itself
        # The columns of a block are all gallery items where scores are given, and those kept where they are computed.
        if scores is None:
            self._column, self.junk = np.cumsum(g.pids != -1) - 1, np.empty(0, np.int64)
        else:
            self._column, self.junk = np.arange(len(g)), np.flatnonzero(g.pids == -1)
        self._by_pid = self.kept[np.argsort(g.pids[self.kept], kind="stable")]
        pids = g.pids[self._by_pid]
        self._start = np.searchsorted(pids, q.pids, side="left")
        self._count = np.searchsorted(pids, q.pids, side="right") - self._start

        self.found, self.removed = np.zeros(len(q), np.int64), np.zeros(len(q), np.int64)
        step = max(1, _BLOCK // max(1, self._count.max()))
        for rows in (slice(start, start + step) for start in range(0, len(q), step)):
            _, match, away = self.of(rows)
            self.found[rows], self.removed[rows] = match.sum(1), away.sum(1)
        if not self.found.any():
            absent = len(np.unique(q.pids[self._count == 0]))
            rule = "the same-camera rule" if cross_camera else "the rule that no image matches itself"
            raise ValueError(
                f"{len(q)} of {len(q)} queries have no match: {absent} of {len(np.unique(q.pids))} ids are not in the "
                f"gallery, {self.removed.sum()} matches of the others were taken by {rule}"
            )

    def of(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(at, match, away) of some queries, (B,P): columns of items, which of them match, and which do not count.

        The rest of the slots are empty.
        """
        slots = np.arange(max(1, self._count[rows].max()))  # one that is empty where no query of the block has a match
        there = slots < self._count[rows, None]
        items = self._by_pid[np.where(there, self._start[rows, None] + slots, 0)]
        if self._itself is None:
            camids = self.query.camids[rows, None]
            away = (self._gallery.camids[items] == camids) & (camids != -1)
        else:
            away = self._itself[items] == np.arange(len(self.query))[rows, None]
        return self._column[items], there & ~away, there & away

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, similarities (B,C) float32) until all queries are done; not to be written to."""
        if self._scores is None:
            yield from similarity_blocks(self.query.feats, self._gallery.feats, self.kept)
            return
        step = max(1, _BLOCK // self._scores.shape[1])
        for rows in (slice(start, start + step) for start in range(0, len(self._scores), step)):
            block = np.require(self._scores[rows], requirements=["C", "W"])  # a copy only of what torch cannot read
            sim = torch.from_numpy(block)
            if sim.amin().isnan():
                row, column = np.argwhere(np.isnan(block))[0].tolist()
                pair = f"{self.query.names[rows.start + row]} and {self._gallery.names[column]}"
                raise ValueError(f"scores must not hold NaN, got one for {pair}")
            yield rows, sim

    def by_person(self) -> tuple[np.ndarray, np.ndarray]:
        """(columns, starts): all columns that are not junk, person by person, and where each person begins among them.

        Distractors (pid 0) are all different people.
        """
        pids = self._gallery.pids[self._by_pid]
        starts = np.flatnonzero((pids == 0) | (np.diff(pids, prepend=-1) != 0))
        return self._column[self._by_pid], starts


def _check_scores(scores: np.ndarray, queries: int, items: int, multi_query: bool) -> None:
    if multi_query:
        raise ValueError("multi_query pools features, which scores do not have: give one or the other")
    if not isinstance(scores, np.ndarray) or scores.dtype != np.float32:
        raise TypeError(f"scores must be a float32 NumPy array, got {getattr(scores, 'dtype', type(scores).__name__)}")
    if scores.shape != (queries, items):
        raise ValueError(f"scores must have shape (Q, G) = {(queries, items)}, got {scores.shape}")


def _same_image(q: Features, g: Features) -> np.ndarray:
    """(G,) the query that is the same image, -1 where none is: of the same name, from the same source."""
    number = {name: i for i, name in enumerate(q.names)} if q.source == g.source else {}
    return np.array([number.get(name, -1) for name in g.names])


def _pooled(q: Features, cross_camera: bool) -> tuple[Features, np.ndarray]:
    """Queries of one pid and camera (any camera without cross_camera) as one, in the order of their first images, and
    (Q,) which of them each query is in. An unknown camera (-1) is no other query's.
    """
    alone = np.where(q.camids == -1, -1 - np.arange(len(q)), q.camids)
    keys = np.stack([q.pids, alone if cross_camera else np.zeros_like(alone)], 1)
    _, first, pool = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    pool, first = place[pool.reshape(-1)], np.sort(first)
    unit = q.feats.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    sizes = np.bincount(pool)
    order = np.argsort(pool, kind="stable")
    means = np.add.reduceat(unit[order], np.cumsum(sizes) - sizes) / sizes[:, None]
    names = [q.names[i] for i in first.tolist()]
    pooled = replace(
        q, feats=means.astype(np.float32), pids=q.pids[first], camids=q.camids[first], names=names, times=None
    )
    return pooled, pool
