"""An index of FAISS over a gallery, for `search`: it finds a shortlist, the features themselves decide.

An index file is what FAISS writes, and read by FAISS as it is; behind it stands one line of JSON, {"format":
"reid3d-index-1", "gallery": a hash}, by which an index is known from that of another gallery.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from ..io import atomic_write
from .features import Features
from .search import unit_vectors

FORMAT = "reid3d-index-1"
_LEAST = 256  # items that a code of 8 bits is learned from
_STEP = 2048  # items, or queries, at a time
_SAMPLE = 64  # items for each list that the lists are learned from
_SEED = 0
_TRAILER = 256  # bytes that hold the last line


def build_index(g: Features, path: str | Path, *, lists: int | None = None, codes: int = 64, probes: int = 32) -> None:
    """Write a FAISS index of a gallery, IVF-PQ by inner product of unit vectors, for `search(..., index=path)`.

    An item takes codes + 8 bytes. The lists are learned from 64 items for each, drawn with a fixed seed; besides these
    and the index itself, memory holds a block of 2048 items, so that a memory map may be larger than memory.

    Args:
        lists: that the items are shared out to; None for 4 sqrt(N), or as few as N items can teach.
        codes: of 8 bits that an item is kept as; the largest divisor of the dimension that is not greater is taken.
        probes: lists that a query looks into; more miss less and take longer.

    Raises: ValueError when the gallery has less than 256 items, a number is less than 1 or lists too many for the
        gallery, or a memory map holds NaN or infinity; ImportError without FAISS; OSError naming the file.
    Source: Jegou et al., Product quantization for nearest neighbor search, TPAMI 2011; FAISS.
    """
    n, dim = g.feats.shape
    if n < _LEAST:
        raise ValueError(f"g must have at least {_LEAST} items for an index, got {n}: search without one")
    most = n // 39  # with less items for each, FAISS warns
    lists = min(4 * isqrt(n), most) if lists is None else lists
    for name, value in (("lists", lists), ("codes", codes), ("probes", probes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if lists > most:
        raise ValueError(f"lists must be at most {most}, a 39th of the items, got {lists}")
    faiss = _faiss()
    codes = next(count for count in range(min(codes, dim), 0, -1) if dim % count == 0)
    index = faiss.index_factory(dim, f"IVF{lists},PQ{codes}x8", faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(probes, lists)
    index.pq.cp.min_points_per_centroid = 1  # FAISS warns below 39 items a code, for each of the codes
    index.do_polysemous_training = False  # which takes most of the time, for a filter that is not used
    sample = min(n, max(_SAMPLE * lists, _LEAST * 39))  # as many as FAISS asks for
    rows = np.sort(np.random.default_rng(_SEED).choice(n, sample, replace=False))
    learned_from = np.empty((sample, dim), np.float32)
    for start in range(0, sample, _STEP):
        learned_from[start : start + _STEP] = _unit(g, rows[start : start + _STEP])
    index.train(learned_from)
    del learned_from
    for start in range(0, n, _STEP):
        index.add(_unit(g, slice(start, start + _STEP)))
    note = json.dumps({"format": FORMAT, "gallery": _fingerprint(g)})
    with atomic_write(path) as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))
        file.write(f"\n{note}\n".encode())


def shortlists(q: Features, g: Features, index: Any, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """(row, ascending items of g) for each query, `count` items or as many as are found; arguments as of `search`."""
    faiss = _faiss()
    file = Path(index) if isinstance(index, (str, Path)) else None
    index = index if file is None else _read(faiss, file)
    if (index.ntotal, index.d) != g.feats.shape:
        shape = f"{index.ntotal} items of dimension {index.d}"
        raise ValueError(f"index must be of the gallery's {len(g)} items of dimension {g.feats.shape[1]}, got {shape}")
    if file is not None and _gallery(file) not in (None, _fingerprint(g)):
        raise ValueError(f"index must be of this gallery, got that of another: {file}")
    for start in range(0, len(q), _STEP):
        _, found = index.search(_unit(q, slice(start, start + _STEP)), min(count, len(g)))
        for row, items in enumerate(found, start):
            yield row, np.sort(items[items >= 0])


def _read(faiss: Any, path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no such index: {path} (reid3d export-features GALLERY {path} makes it)")
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} is not an index of FAISS") from error


def _gallery(path: Path) -> str | None:
    """The fingerprint in the last line of an index file; None where it was not made here."""
    with open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - _TRAILER))
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    try:
        note = json.loads(last)
        return str(note["gallery"]) if note["format"] == FORMAT else None
    except (ValueError, TypeError, KeyError):
        return None


def _fingerprint(g: Features) -> str:
    """A hash of some of the features, since those of a large gallery take long to read."""
    some = np.unique(np.linspace(0, len(g) - 1, 256).astype(np.int64))
    digest = hashlib.sha256(json.dumps([g.made_by, *g.feats.shape]).encode())
    digest.update(np.ascontiguousarray(g.feats[some]).data)
    return digest.hexdigest()[:16]


def _unit(features: Features, rows: slice | np.ndarray) -> np.ndarray:
    part = features.feats[rows]
    return unit_vectors(part)[: len(part), : part.shape[1]].contiguous().numpy()


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("an index needs FAISS: pip install faiss-cpu") from error
    return faiss
