"""k-reciprocal re-ranking without a matrix of all pairs, of whole splits or query by query, and query expansion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .features import Features, check_model
from .search import search, unit_vectors

_BLOCK = 2**22  # distances, or entries of what is computed from them, held at once
_TILE = 2**11  # items whose distances from as many others are one matrix product: wider ones miss the cache
_NOISE = 1e-6  # of 1 - cos; distances that are all below it count as 0
_LEAST_ROWS = 16  # of a product: fewer may round the last columns otherwise, and equal items would differ


def rerank(
    q: Features,
    g: Features,
    *,
    k1: int = 20,
    k2: int = 6,
    weight: float = 0.3,
    distances: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> np.ndarray:
    """Scores by how far the neighbourhoods of query and gallery item overlap, (Q, G) float32 in [0, 1].

    A score is (1 - weight) * s + weight * (1 - d): s the Jaccard similarity of the two k-reciprocal neighbourhoods,
    d the distance over the largest one from that query to any item. That is 1 - the final distance of the paper.

    Distances are squared Euclidean between unit vectors, as in the paper; or `distances`, used as they are given:
    (qq (Q, Q), qg (Q, G), gg (G, G)) float32, from 0, such as 1 - scores. torchreid squares what it is given, fast-reid
    and QAConv do not: give squares to have the numbers of torchreid. Where qq or gg is not symmetric an item's
    distances are its column, as in the published code. Ties go to the lower index, queries before the gallery.

    k1: neighbours, the item itself not counted. k2: items, itself counted, whose neighbourhoods are averaged. As in the
    published code, a neighbour's own neighbourhood (of round(k1 / 2)) joins if more than 2/3 of it is there already;
    the paper takes 2/3 itself too.

    No label is looked at: to compare with published figures leave junk out of g beforehand. Memory beyond inputs and
    result: unit vectors of all items, about 1 KiB an item, and some blocks of 2**22 values.

    Raises: ValueError for k1 or k2 out of range, a weight outside [0, 1], dimensions or shapes that differ, and
        distances that are negative or not finite; TypeError for distances that are no float32 arrays.
    Source: Zhong et al., CVPR 2017, and its published code.
    """
    _check(k1, k2, weight)
    items = _vectors(q, g) if distances is None else _Given(distances, len(q), len(g))
    direct = np.empty((len(q), len(g)), np.float32)
    if not direct.size:
        return direct
    near = _neighbours(items, k1 + 1, direct)
    everyone = torch.arange(len(near.idx))
    members = _memberships(items, near, _mutual(near.idx, k1, everyone), everyone)
    members = _averaged(members, near.idx, k2, everyone)
    columns = _Columns(members, everyone[len(q) :])
    for rows in _blocks(len(q), len(g)):
        queries = everyone[rows]
        shared = columns.shared(members, queries)[:, len(q) :]
        direct[rows] = _scores(shared, torch.from_numpy(direct[rows]), near.farthest[queries], weight).numpy()
    return direct


class GalleryGraph:
    """What re-ranking knows of a gallery before a query comes: made once, then a query takes milliseconds.

    `rerank(q)` re-ranks each query as if it alone had been added to the gallery: row i is `reid3d.rerank` of query i
    and the gallery, whatever other queries there are, with features and parameters as there. What the query changes is
    computed again: the neighbourhoods of a few hundred items near it, and of those to whom nobody is as far as it is,
    which are all where the query is like nobody. Keeps unit vectors of the gallery and about 2 KiB an item more; not
    for several threads at once.

    Raises: ValueError for an empty gallery, and k1, k2, weight out of range.
    Source: as `reid3d.rerank`.
    """

    def __init__(self, g: Features, *, k1: int = 20, k2: int = 6, weight: float = 0.3) -> None:
        _check(k1, k2, weight)
        if not len(g):
            raise ValueError("g must not be empty")
        self.k1, self.k2, self.weight, self._made_by = k1, k2, weight, g.made_by
        # The query is item 0, as in rerank, and the gallery follows. Until it comes it is nobody's neighbour.
        unit = torch.zeros(len(g) + 1, g.feats.shape[1])
        unit[1:] = _unit(g.feats)
        self._items = _Vectors(unit)
        gallery = _neighbours(_Vectors(unit[1:]), k1 + 1)
        missing = min(k1 + 1, len(unit)) - gallery.idx.shape[1]  # 1 where the gallery is that small
        pad = torch.nn.functional.pad
        self._near = _Near(
            pad(gallery.idx + 1, (0, missing, 1, 0)),
            pad(gallery.distance, (0, missing, 1, 0), value=torch.inf),
            pad(gallery.farthest, (1, 0)),
        )
        everyone = torch.arange(len(unit))
        self._mutual = _mutual(self._near.idx, k1, everyone)
        self._members = _memberships(self._items, self._near, self._mutual, everyone)
        self._columns = _Columns(_averaged(self._members, self._near.idx, k2, everyone), everyone[1:])

    def rerank(self, q: Features) -> np.ndarray:
        """(Q, G) float32 scores in [0, 1]. Raises: ValueError when the feature dimensions differ."""
        if self._made_by and q.made_by and q.made_by != self._made_by:
            raise ValueError(f"q must be features of the model of the gallery, got {q.made_by} and {self._made_by}")
        if q.feats.shape[1] != self._items.unit.shape[1]:
            dims = f"{q.feats.shape[1]} and {self._items.unit.shape[1]}"
            raise ValueError(f"q must have features of the dimension of the gallery, got {dims}")
        out = np.empty((len(q), len(self._items.unit) - 1), np.float32)
        for i, query in enumerate(_unit(q.feats)):
            self._items.unit[0] = query
            out[i] = self._with_query().numpy()
        return out

    def _with_query(self) -> Tensor:
        """(G,) scores: all that the query changes is computed again, the rest is kept."""
        direct = (1 + self._items.block(slice(0, _LEAST_ROWS), slice(None))[0]).clamp_(min=0)
        near = _Near(self._near.idx.clone(), self._near.distance.clone(), torch.maximum(self._near.farthest, direct))
        near.farthest[0] = direct.max()
        new = direct <= near.distance[:, -1]  # whose neighbour it becomes; it comes before who is as far
        new[0] = False
        distance = torch.cat([direct[new, None], near.distance[new]], 1)
        idx = torch.nn.functional.pad(near.idx[new], (1, 0))
        distance, order = distance.sort(dim=1, stable=True)
        near.distance[new], near.idx[new] = distance[:, :-1], idx.gather(1, order)[:, :-1]
        near.distance[:1], near.idx[:1] = _smallest(direct[None], near.idx.shape[1])

        new[0] = True
        nearer = new | new[near.idx[:, : self._mutual.shape[1]]].any(1)
        mutual = self._mutual.clone()
        mutual[nearer] = _mutual(near.idx, self.k1, nearer.nonzero()[:, 0])
        changed = new | nearer[near.idx].any(1) | (near.farthest > self._near.farthest)
        rows = changed.nonzero()[:, 0]
        members = self._members.replaced(rows, _memberships(self._items, near, mutual, rows))
        if self.k2 > 1:
            rows = (changed | changed[near.idx[:, : self.k2]].any(1)).nonzero()[:, 0]
        averaged = _averaged(members, near.idx, self.k2, rows)
        shared = self._columns.shared(averaged, rows[:1])[0]  # the query is the first of rows
        query = torch.zeros(len(shared))
        query[averaged.columns[: averaged.size[0]]] = averaged.values[: averaged.size[0]]
        entry = torch.repeat_interleave(averaged.size)
        overlap = torch.minimum(averaged.values, query[averaged.columns])
        shared[rows] = torch.zeros(len(rows)).index_add_(0, entry, overlap)
        return _scores(shared[None, 1:], direct[None, 1:], near.farthest[:1], self.weight)[0]


def expand(q: Features, g: Features, *, k: int = 5, alpha: float = 3.0) -> Features:
    """The queries, moved towards their k nearest gallery items: to unit vectors along q + sum of s**alpha * g.

    q and g are unit vectors here, s their cosine similarity; an item of negative s adds nothing. All else of q stays.

    Raises: ValueError when k < 1, alpha is negative or not finite, or the feature dimensions differ.
    Source: Radenovic et al., TPAMI 2019, alpha-weighted query expansion; defaults of fast-reid.
    """
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha must be at least 0 and finite, got {alpha}")
    ranks = search(q, g, k)
    feats = _unit(q.feats)
    gallery = _unit(g.feats)
    for idx, sim in zip(torch.from_numpy(ranks.idx).T, torch.from_numpy(ranks.sim).T, strict=True):
        near = (sim > 0).nonzero()[:, 0]  # -inf where there are fewer than k
        feats[near] += sim[near, None] ** alpha * gallery[idx[near]]
    return replace(q, feats=_unit(feats.numpy()).numpy())


def _unit(feats: np.ndarray) -> Tensor:
    return unit_vectors(feats)[: len(feats), : feats.shape[1]]


def _check(k1: int, k2: int, weight: float) -> None:
    if k1 < 1:
        raise ValueError(f"k1 must be at least 1, got {k1}")
    if not 1 <= k2 <= k1 + 1:
        raise ValueError(f"k2 must be between 1 and k1 + 1 = {k1 + 1}, got {k2}")
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be between 0 and 1, got {weight}")


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(_LEAST_ROWS, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


# Distances of N items from each other, float32 from 0, up to a factor


class _Items(Protocol):
    beyond: float

    def __len__(self) -> int: ...

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, distances less `beyond`), row by row: a pass over all pairs is saved."""

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """(P,): those of a[i] and b[i]."""


class _Vectors:
    """By the cosine: 1 - cos is half the squared distance of unit vectors (N, D)."""

    beyond = 1.0

    def __init__(self, unit: Tensor) -> None:
        self.unit = unit

    def __len__(self) -> int:
        return len(self.unit)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        # Of almost one size: a last product of a row or two may round otherwise, and equal items would differ.
        ends = np.linspace(0, len(self), -(-len(self) // _TILE) + 1).astype(int).tolist()
        tiles = [slice(*pair) for pair in zip(ends, ends[1:], strict=False)]
        for rows in tiles:
            for columns in tiles:
                yield rows, columns, self.block(rows, columns)

    def block(self, rows: slice, columns: slice) -> Tensor:
        a, b = self.unit[rows], self.unit[columns]
        if min(len(a), len(b)) < _LEAST_ROWS:
            pad = [torch.nn.functional.pad(x, (0, 0, 0, max(0, _LEAST_ROWS - len(x)))) for x in (a, b)]
            return (-pad[0] @ pad[1].T)[: len(a), : len(b)]
        return -a @ b.T

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(len(a))
        step = max(1, 2**20 // max(1, self.unit.shape[1]))
        for start in range(0, len(a), step):
            part = slice(start, start + step)
            out[part] = 1 - (self.unit[a[part]] * self.unit[b[part]]).sum(1)
        return out.clamp_(min=0)


def _vectors(q: Features, g: Features) -> _Vectors:
    check_model(q, g)
    if q.feats.shape[1] != g.feats.shape[1]:
        dims = f"{q.feats.shape[1]} and {g.feats.shape[1]}"
        raise ValueError(f"q and g must have features of the same dimension, got {dims}")
    unit = torch.empty(len(q) + len(g), q.feats.shape[1])
    unit[: len(q)] = _unit(q.feats)
    unit[len(q) :] = _unit(g.feats)
    return _Vectors(unit)


class _Given:
    """The columns of ((qq, qg), (qg^T, gg))."""

    beyond = 0.0

    def __init__(self, distances: tuple[np.ndarray, np.ndarray, np.ndarray], q: int, g: int) -> None:
        shapes = {"qq": (q, q), "qg": (q, g), "gg": (g, g)}
        if len(distances) != len(shapes):
            raise ValueError(f"distances must be three arrays, qq, qg and gg, got {len(distances)}")
        for (name, shape), array in zip(shapes.items(), distances, strict=True):
            if not isinstance(array, np.ndarray) or array.dtype != np.float32:
                raise TypeError(
                    f"distances: {name} must be a float32 array, got {getattr(array, 'dtype', type(array))}"
                )
            if array.shape != shape:
                raise ValueError(f"distances: {name} must have shape {shape}, got {array.shape}")
            low, high = (array.min(), array.max()) if array.size else (0, 0)
            if not (low >= 0 and high < np.inf):
                raise ValueError(f"distances: {name} must be finite and at least 0, got values in [{low}, {high}]")
        self.qq, self.qg, self.gg = map(torch.from_numpy, distances)

    def __len__(self) -> int:
        return len(self.qq) + len(self.gg)

    def blocks(self) -> Iterator[tuple[slice, slice, Tensor]]:
        q, n = len(self.qq), len(self)
        for rows in _blocks(n, n):
            of_q, of_g = slice(rows.start, min(rows.stop, q)), slice(max(rows.start - q, 0), max(rows.stop - q, 0))
            first = max(of_q.stop - of_q.start, 0)
            block = torch.empty(rows.stop - rows.start, n)
            block[:first, :q], block[:first, q:] = self.qq[:, of_q].T, self.qg[of_q]
            block[first:, :q], block[first:, q:] = self.qg[:, of_g].T, self.gg[:, of_g].T
            yield rows, slice(0, n), block

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        q = len(self.qq)
        out = torch.empty(len(a))
        for is_q, other_is_q, block in ((True, True, self.qq.T), (True, False, self.qg), (False, True, self.qg.T)):
            here = ((a < q) == is_q) & ((b < q) == other_is_q)
            out[here] = block[a[here] - q * (not is_q), b[here] - q * (not other_is_q)]
        here = (a >= q) & (b >= q)
        out[here] = self.gg[b[here] - q, a[here] - q]
        return out


# Neighbourhoods


class _Near(NamedTuple):
    """The neighbours of N items, nearest first: idx, distance (N, k). farthest (N,): the largest distance of each."""

    idx: Tensor
    distance: Tensor
    farthest: Tensor


def _neighbours(items: _Items, k: int, direct: np.ndarray | None = None) -> _Near:
    """Of all items, themselves among them. direct (Q, G) receives the distances of the first Q from the last G."""
    n, q = len(items), 0 if direct is None else len(direct)
    k = min(k, n)
    near = _Near(torch.empty(n, k, dtype=torch.int64), torch.empty(n, k), torch.full((n,), -torch.inf))
    nearest: list[tuple[Tensor, Tensor]] = []
    for rows, columns, block in items.blocks():
        distance, idx = _smallest(block, min(k, block.shape[1]))
        nearest.append((distance, idx + columns.start))
        torch.maximum(near.farthest[rows], block.amax(1), out=near.farthest[rows])
        if columns.stop == n:
            distance, idx = (torch.cat(found, 1) for found in zip(*nearest, strict=True))
            near.distance[rows], slot = _smallest(distance, k)  # slots are in the order of ties
            near.idx[rows] = idx.gather(1, slot)
            nearest = []
        if direct is not None and rows.start < q and columns.stop > q:
            start = max(q - columns.start, 0)
            values = block[: q - rows.start, start:] + items.beyond
            direct[rows, columns.start + start - q : columns.stop - q] = values.clamp_(min=0).numpy()
    for distances in (near.distance, near.farthest):
        distances.add_(items.beyond).clamp_(min=0)
    return near


def _smallest(block: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k smallest of each row, ascending, and where they are; ties to the lower index."""
    values, idx = block.topk(min(k + 1, block.shape[1]), largest=False)
    if values.shape[1] > k:  # topk leaves open which of equal ones it takes
        for row in (values[:, k - 1] == values[:, k]).nonzero()[:, 0]:
            idx[row, :k] = block[row].sort(stable=True).indices[:k]
    idx = idx[:, :k].sort(1).values
    values, order = block.gather(1, idx).sort(dim=1, stable=True)
    return values, idx.gather(1, order)


def _mutual(idx: Tensor, k1: int, rows: Tensor) -> Tensor:
    """Which of the nearest round(k1 / 2) of these rows have the row among theirs: (len(rows), round(k1 / 2) + 1)."""
    near = idx[:, : round(k1 / 2) + 1].contiguous()
    out = torch.empty(len(rows), near.shape[1], dtype=torch.bool)
    for part in _blocks(len(rows), near.shape[1] ** 2):
        out[part] = (near[near[rows[part]]] == rows[part, None, None]).any(2)
    return out


class _Sparse(NamedTuple):
    """Rows of a matrix: values that are not 0 and their columns, ascending; row r is the `size[r]` from `start[r]`."""

    start: Tensor
    size: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, size: Tensor, columns: Tensor, values: Tensor) -> _Sparse:
        return cls(size.cumsum(0) - size, size, columns, values)

    def entries(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(E,), (E,): where the entries of these rows are, and the position in `rows` that each belongs to."""
        of = torch.repeat_interleave(self.size[rows])
        before = self.size[rows].cumsum(0) - self.size[rows]
        return torch.arange(len(of)) + (self.start[rows] - before)[of], of

    def replaced(self, rows: Tensor, new: _Sparse) -> _Sparse:
        """With `new` in place of these rows."""
        start, size = self.start.clone(), self.size.clone()
        start[rows], size[rows] = new.start + len(self.columns), new.size
        return _Sparse(start, size, torch.cat([self.columns, new.columns]), torch.cat([self.values, new.values]))


def _memberships(items: _Items, near: _Near, mutual: Tensor, rows: Tensor) -> _Sparse:
    """How much each item belongs to the expanded k-reciprocal neighbourhoods of these rows; a row sums to 1."""
    (n, k), half = near.idx.shape, mutual.shape[1]
    counts, columns, distances = [], [], []
    parts = list(_blocks(len(rows), max(n, k * k)))
    marks = torch.zeros(parts[0].stop, n, dtype=torch.bool)
    for part in parts:
        row = rows[part]
        forward, mark = near.idx[row], marks[: len(row)]
        is_mutual = (near.idx[forward] == row[:, None, None]).any(2)
        theirs, are_theirs = near.idx[forward, :half], mutual[forward]
        mark.scatter_(1, forward, is_mutual)
        shared = mark.gather(1, theirs.flatten(1)).view(theirs.shape) & are_theirs
        mark.scatter_(1, forward, False)
        joins = is_mutual & (3 * shared.sum(2) > 2 * are_theirs.sum(2))
        joined = torch.where(are_theirs & joins[:, :, None], theirs, -1).flatten(1)
        found, slot = torch.cat([torch.where(is_mutual, forward, -1), joined], 1).int().sort(dim=1, stable=True)
        kept = found >= 0
        kept[:, 1:] &= found[:, 1:] != found[:, :-1]
        of, column, slot = kept.nonzero()[:, 0], found[kept].long(), slot[kept]
        distance = near.distance[row].flatten()[of * k + slot.clamp(max=k - 1)]
        new = slot >= k  # who joined: not one of the nearest whose distance is known
        distance[new] = items.pairs(row[of[new]], column[new])
        counts.append(kept.sum(1))
        columns.append(column)
        distances.append(distance)
    count, column = torch.cat(counts), torch.cat(columns)
    of = torch.repeat_interleave(count)
    longest = near.farthest[rows]
    longest[longest <= _NOISE] = 1  # all items are one
    values = torch.exp(-torch.cat(distances) / longest[of])
    total = torch.zeros(len(rows)).index_add_(0, of, values)
    return _Sparse.of(count, column, values / total[of])


def _averaged(members: _Sparse, idx: Tensor, k2: int, rows: Tensor) -> _Sparse:
    """Of these rows, the mean of the memberships of the nearest k2."""
    if k2 == 1:
        at, _ = members.entries(rows)
        return _Sparse.of(members.size[rows], members.columns[at], members.values[at])
    n, k2 = len(idx), min(k2, idx.shape[1])
    counts, columns, values = [], [], []
    for part in _blocks(len(rows), 32 * k2):  # a neighbourhood has some 30 members
        at, of = members.entries(idx[rows[part], :k2].flatten())
        keys, place = torch.unique(of // k2 * n + members.columns[at], return_inverse=True)
        counts.append(torch.bincount(keys // n, minlength=part.stop - part.start))
        columns.append(keys % n)
        values.append(torch.zeros(len(keys)).index_add_(0, place, members.values[at]) / k2)
    return _Sparse.of(torch.cat(counts), torch.cat(columns), torch.cat(values))


class _Columns:
    """The columns of some rows of memberships, to find those who share members with a query."""

    def __init__(self, members: _Sparse, rows: Tensor) -> None:
        at, of = members.entries(rows)
        self.n = len(members.size)
        columns, order = members.columns[at].sort(stable=True)
        # Of column c: the rows and their values in it.
        self.by = _Sparse.of(torch.bincount(columns, minlength=self.n), rows[of[order]], members.values[at[order]])

    def shared(self, members: _Sparse, queries: Tensor) -> Tensor:
        """(len(queries), N) sums over all columns of the smaller value of query and item, 0 for other rows."""
        at, of = members.entries(queries)
        out = torch.zeros(len(queries) * self.n)
        pieces = torch.bincount(self.by.size[members.columns[at]].cumsum(0) // _BLOCK).tolist()
        for mine, query in zip(at.split(pieces), of.split(pieces), strict=True):
            theirs, entry = self.by.entries(members.columns[mine])
            smaller = torch.minimum(members.values[mine[entry]], self.by.values[theirs])
            out.index_add_(0, query[entry] * self.n + self.by.columns[theirs], smaller)
        return out.view(len(queries), self.n)


def _scores(shared: Tensor, direct: Tensor, farthest: Tensor, weight: float) -> Tensor:
    """(B, G), from the sums of shared memberships: of rows that sum to 1 each, so that all together is 2 - shared."""
    farthest = torch.where(farthest <= _NOISE, 1, farthest)
    jaccard = shared / (2 - shared)
    return jaccard.mul_(1 - weight).add_(1 - direct / farthest[:, None], alpha=weight).clamp_(0, 1)
