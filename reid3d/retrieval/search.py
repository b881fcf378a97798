"""Exact cosine search, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .features import Features

_BLOCK = 2**20  # similarities held at once
_LEAST_ROWS = 4  # with fewer, matrix products may round columns at the edge otherwise, and equal items would differ


@dataclass(frozen=True, eq=False)
class Ranks:
    """The k gallery items most similar to each query, best first.

    query, gallery: the features that were compared. idx: (Q, k) int64 into the gallery, -1 where there are fewer than
    k items. sim: (Q, k) float32 cosine similarity in [-1, 1], -inf where idx is -1.
    """

    query: Features
    gallery: Features
    idx: np.ndarray
    sim: np.ndarray


def search(q: Features, g: Features, k: int = 20, *, cross_camera: bool = False) -> Ranks:
    """Find the k gallery items of highest cosine similarity for each query; ties go to the lower gallery index.

    cross_camera leaves out, as `evaluate` does, junk (pid -1) and the query's own person seen by the query's own
    camera (a camid of -1 is unknown and leaves nothing out). Memory beyond inputs and result: a normalised copy of the
    gallery and a few blocks of 2**20 values.

    Raises: ValueError when k < 1 or the feature dimensions differ.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    idx = np.full((len(q), k), -1, np.int64)
    sim = np.full((len(q), k), -np.inf, np.float32)
    g_pids, g_camids = torch.from_numpy(g.pids), torch.from_numpy(g.camids)
    for rows, block in similarity_blocks(q.feats, g.feats):
        if cross_camera:
            pids, camids = (torch.from_numpy(values[rows]).unsqueeze(1) for values in (q.pids, q.camids))
            block[(g_pids == -1) | ((pids == g_pids) & (camids == g_camids) & (camids != -1))] = -torch.inf
        best = order_keys(block).topk(min(k, len(g)), largest=False).values & 0xFFFFFFFF
        found = block.gather(1, best)
        idx[rows, : best.shape[1]] = torch.where(found == -torch.inf, -1, best).numpy()
        sim[rows, : best.shape[1]] = found.numpy()
    return Ranks(q, g, idx, sim)


def similarity_blocks(q: np.ndarray, g: np.ndarray, kept: np.ndarray | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, cosine similarities (len(rows), G) float32 in [-1, 1]) until all rows of q are done; `kept` are the
    G rows of g to compare with, None all. Equal rows of g get equal similarities. Holds one float32 copy of them.

    Raises: ValueError when the feature dimensions differ.
    """
    if q.shape[1] != g.shape[1]:
        raise ValueError(f"q and g must have features of the same dimension, got {q.shape[1]} and {g.shape[1]}")
    gallery = _unit(g, np.arange(len(g)) if kept is None else kept).T
    step = max(_LEAST_ROWS, _BLOCK // max(1, gallery.shape[1]))
    for start in range(0, len(q), step):
        rows = np.arange(start, min(start + step, len(q)))
        query = torch.zeros(max(_LEAST_ROWS, len(rows)), q.shape[1])
        query[: len(rows)] = _unit(q, rows)
        yield slice(start, start + len(rows)), (query @ gallery)[: len(rows)].clamp_(-1, 1)


def order_keys(sim: Tensor) -> Tensor:
    """(B, G) float32 without NaN -> (B, G) int64, all different within a row: smaller is more similar, ties to the
    lower index, which is the key's lower half. Any sort of the keys is then a stable sort of the similarities.
    """
    bits = (-sim).add_(0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 equal
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))  # IEEE 754 order as the order of signed integers
    return bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(sim.shape[1]))


def _unit(feats: np.ndarray, rows: np.ndarray) -> Tensor:
    """Those rows of feats (N, D) float32 as unit vectors; 0 stays 0."""
    unit = torch.empty(len(rows), feats.shape[1])
    step = max(1, _BLOCK // max(1, feats.shape[1]))
    for start in range(0, len(rows), step):
        part = torch.from_numpy(feats[rows[start : start + step]]).double()  # float32 squares may overflow
        length = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        unit[start : start + step] = part / length.clamp_min(torch.finfo(torch.float64).tiny)
    return unit
