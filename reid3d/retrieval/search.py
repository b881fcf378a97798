"""Cosine search, block by block: exact, or by the shortlist of a FAISS index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .features import Features, check_model

_BLOCK = 2**20  # similarities held at once, on a CPU
_FIRST = 256  # items of the first block looked at at a time
_GPU = 64  # times as many on a GPU, which waits for a block to be copied to it
# Matrix products may round the edges of a matrix, and unaligned rows, otherwise than the rest, and equal items would
# differ. They do not with items as rows, and rows and columns filled up to a multiple of this, whatever the threads.
_MULTIPLE = 16
_SHORTEST, _LONGEST = 1e-15, 1e15  # lengths whose squares float32 holds to full precision


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


def search(
    q: Features,
    g: Features,
    k: int = 20,
    *,
    cross_camera: bool = False,
    device: str | torch.device | None = None,
    index: Any = None,
    shortlist: int = 1000,
) -> Ranks:
    """Find the k gallery items of highest cosine similarity for each query; ties go to the lower gallery index.

    cross_camera leaves out, as `evaluate` does, junk (pid -1) and the query's own person seen by the query's own
    camera (a camid of -1 is unknown and leaves nothing out). Memory beyond inputs and result: a few blocks of 2**20
    values (2**26 on a GPU), or of the features of 2 k items where those are more, however large the gallery is; a
    memory map (`Features.load`) is read once for every 2**20 values of the queries.

    Args:
        device: where the similarities are computed, a block of the gallery at a time; None for the CPU.
        index: a file of `build_index`, or an index of FAISS over the unit vectors of the gallery in its order. Only
            the `shortlist` items it finds for a query are then looked at, by their own features: similarities are as
            exact as without, and what the index does not find is missed. None looks at all items.
        shortlist: items that an index is asked for, k at least; more miss less and take longer.

    Raises: ValueError when k < 1, the feature dimensions differ, the features are those of different
        models (made_by), a memory map holds NaN or infinity, or the index is one of another gallery; ImportError
        without FAISS.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    _check_dimensions(q.feats, g.feats)
    check_model(q, g)
    where = torch.device(device or "cpu")
    idx = np.full((len(q), k), -1, np.int64)
    sim = np.full((len(q), k), -np.inf, np.float32)
    if index is None:
        most = min(k, len(g))
        size = _BLOCK if where.type == "cpu" else _GPU * _BLOCK
        width = max(2 * most, size // max(512, q.feats.shape[1]))  # items in a block
        step = max(1, size // max(width + most, q.feats.shape[1]))  # queries in a block
        for start in range(0, len(q), step):
            rows = slice(start, min(start + step, len(q)))
            found = _nearest(q, rows, g, most, cross_camera, where, width)
            idx[rows, :most], sim[rows, :most] = (part.cpu().numpy() for part in found)
    else:
        from .index import shortlists

        for row, items in shortlists(q, g, index, max(k, shortlist)):
            most = min(k, len(items))
            best = _nearest(q, slice(row, row + 1), g.subset(items), most, cross_camera, where, max(1, len(items)))
            places, sim[row, :most] = (part[0].cpu().numpy() for part in best)
            idx[row, :most] = np.where(places < 0, -1, items[places])
    return Ranks(q, g, idx, sim)


def _nearest(
    q: Features, rows: slice, g: Features, k: int, cross_camera: bool, device: torch.device, width: int
) -> tuple[Tensor, Tensor]:
    """idx and sim (n, k) of the n queries in `rows`, `width` items at a time.

    Items come in their order, so that only one of greater similarity can still take the place of the last that was
    found. A block has few of these, and only they are sorted.
    """
    n = rows.stop - rows.start
    query = unit_vectors(q.feats[rows]).to(device)
    idx = torch.full((n, k), -1, device=device)
    sim = torch.full((n, k), -torch.inf, device=device)
    pids, camids = (torch.from_numpy(values[rows].copy()).to(device) for values in (q.pids, q.camids))
    for start in range(0, len(g), width):
        items = slice(start, min(start + width, len(g)))
        # The last block is as wide as the others, since products of other shapes may round otherwise.
        block = unit_vectors(g.feats[items], least=min(width, len(g))).to(device)
        near = (block @ query.T)[: items.stop - start, :n]
        # While nothing is known every item is a candidate: the first block is looked at bit by bit.
        for at, part in enumerate(near.split(width if start else max(k, _FIRST))):
            base = start + at * max(k, _FIRST)
            hit = (part.amax(0) > sim[:, -1]).nonzero()[:, 0]  # queries that find better here, soon few
            part = part.T[hit]
            row, item = (part > sim[hit, -1:]).nonzero(as_tuple=True)
            if cross_camera:
                places = (item.cpu() + base).numpy()
                g_pids, g_camids = (torch.from_numpy(values[places]).to(device) for values in (g.pids, g.camids))
                same = (pids[hit][row] == g_pids) & (camids[hit][row] == g_camids) & (g_camids != -1)
                counts = ~same & (g_pids != -1)
                row, item = row[counts], item[counts]
            if not len(row):
                continue
            found, place, many = row.unique_consecutive(return_inverse=True, return_counts=True)
            slot = k + torch.arange(len(row), device=device) - (many.cumsum(0) - many)[place]
            better = hit[found]
            both = torch.full((len(better), k + int(many.max())), -torch.inf, device=device)
            known = torch.full(both.shape, -1, device=device)
            both[:, :k], known[:, :k] = sim[better], idx[better]
            both[place, slot], known[place, slot] = part[row, item].clamp(-1, 1), item + base
            first = order_keys(both).topk(k, largest=False).values & 0xFFFFFFFF
            sim[better], idx[better] = both.gather(1, first), known.gather(1, first)
    return idx, sim


def similarity_blocks(q: np.ndarray, g: np.ndarray, kept: np.ndarray | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, cosine similarities (len(rows), G) float32 in [-1, 1]) until all rows of q are done; `kept` are the
    G rows of g to compare with, None all. Equal rows of g get equal similarities. Holds one float32 copy of them.

    Raises: ValueError when the feature dimensions differ, or a memory map holds NaN or infinity.
    """
    _check_dimensions(q, g)
    count = len(g) if kept is None else len(kept)
    gallery = torch.zeros(_filled(count), _filled(g.shape[1]))
    step = max(_MULTIPLE, _filled(_BLOCK // max(1, g.shape[1])))
    for start in range(0, count, step):
        items = slice(start, min(start + step, count))
        gallery[start : _filled(items.stop)] = unit_vectors(g[items if kept is None else kept[items]])
    step = max(1, _BLOCK // max(1, count))
    for start in range(0, len(q), step):
        rows = slice(start, min(start + step, len(q)))
        near = gallery @ unit_vectors(q[rows]).T
        yield rows, near[:count, : rows.stop - start].T.contiguous().clamp_(-1, 1)


def order_keys(sim: Tensor) -> Tensor:
    """(B, G) float32 without NaN -> (B, G) int64, all different within a row: smaller is more similar, ties to the
    lower index, which is the key's lower half. Any sort of the keys is then a stable sort of the similarities.
    """
    bits = (-sim).add_(0.0).view(torch.int32)  # + 0.0 makes -0.0 and 0.0 equal
    bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))  # IEEE 754 order as the order of signed integers
    return bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(sim.shape[1], device=sim.device))


def unit_vectors(part: np.ndarray, least: int = 0) -> Tensor:
    """part (n, D) float32 as unit vectors; 0 stays 0. Rows of 0 are added until there are `least`, and both rows and
    columns of 0 until they are a multiple of 16.

    Raises: ValueError for NaN or infinity.
    """
    unit = torch.empty(_filled(max(least, len(part))), _filled(part.shape[1]))
    unit.numpy()[: len(part), : part.shape[1]] = part
    unit[len(part) :], unit[:, part.shape[1] :] = 0, 0
    length = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    odd = ~((length >= _SHORTEST) & (length <= _LONGEST))[:, 0]
    if odd.any():
        wide = unit[odd].double()
        true = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        if not true.isfinite().all():
            raise ValueError("feats must be finite, got NaN or infinity")
        unit[odd] = (wide / true.clamp_min(torch.finfo(torch.float64).tiny)).float()
        length[odd] = 1.0
    return unit.div_(length)


def _filled(size: int) -> int:
    return -(-size // _MULTIPLE) * _MULTIPLE


def _check_dimensions(q: np.ndarray, g: np.ndarray) -> None:
    if q.shape[1] != g.shape[1]:
        raise ValueError(f"q and g must have features of the same dimension, got {q.shape[1]} and {g.shape[1]}")
