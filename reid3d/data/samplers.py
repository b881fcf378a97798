"""Which clouds an epoch shows, in which order, and which of them one of several processes gets.

Every sampler yields (cloud, draw), the draws of an epoch counted from 0, so that `CloudSplit` varies a cloud anew each
time it is drawn. What it yields depends on (seed, epoch) alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_STREAM = 1  # of random numbers; items have their own


class _Draws(Sampler[tuple[int, int]]):
    """Labels, seed and epoch, which all samplers share; `_draw` is what each is."""

    def __init__(self, labels: np.ndarray, seed: int = 0) -> None:
        labels = np.asarray(labels)
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.ndim != 1 or labels.size == 0:
            raise ValueError(f"labels must be a non-empty vector, got shape {labels.shape}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self._labels, self._seed, self._epoch = labels, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of this epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        drawn = self._draw(np.random.default_rng((_STREAM, self._seed, self._epoch))).tolist()
        yield from zip(drawn, range(len(drawn)), strict=True)

    def __len__(self) -> int:
        raise NotImplementedError

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError


class ShuffleSampler(_Draws):
    """All clouds or crops once, in random order.

    Args:
        labels: (n,) integers, the identity of each, of which only the number counts.
        seed: with ``set_epoch``, decides the order.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels that are not a non-empty vector, or a negative seed.
    """

    def __len__(self) -> int:
        return len(self._labels)

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(len(self))


class BalancedSampler(_Draws):
    """As many draws as there are clouds, with replacement, each identity equally likely.

    Args:
        labels: (n,) integers, the identity of each cloud.
        seed: with ``set_epoch``, decides every draw.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels that are not a non-empty vector, or a negative seed.

    Source: the published OG-Net training with ``--balance``: WeightedRandomSampler, weight 1 / size of the class.
    """

    def __init__(self, labels: np.ndarray, seed: int = 0) -> None:
        super().__init__(labels, seed)
        _, inverse, counts = np.unique(self._labels, return_inverse=True, return_counts=True)
        self._weights = 1.0 / (counts[inverse] * len(counts))

    def __len__(self) -> int:
        return len(self._labels)

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        return rng.choice(len(self), size=len(self), p=self._weights)


class ClassSampler(_Draws):
    """Passes of n random clouds of each identity, ceil(clouds / identities / n) of them, each in random order.

    An identity with fewer than n clouds repeats them as evenly as can be.

    Args:
        labels: (clouds,) integers, the identity of each cloud.
        n: clouds of each identity in a pass, at least 1.
        seed: with ``set_epoch``, decides every draw.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels that are not a non-empty vector, n < 1, or a negative seed.

    Source: the published OG-Net training with ``--class n``, which also drops the incomplete batch at the end of each
    pass; here passes follow each other without a gap.
    """

    def __init__(self, labels: np.ndarray, n: int, seed: int = 0) -> None:
        super().__init__(labels, seed)
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        self._members = _members(self._labels)
        self._n, self._passes = n, -(-len(self._labels) // (len(self._members) * n))

    def __len__(self) -> int:
        return self._passes * len(self._members) * self._n

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([rng.permutation(self._pass(rng)) for _ in range(self._passes)])

    def _pass(self, rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([np.resize(rng.permutation(clouds), self._n) for clouds in self._members])


class PKSampler(_Draws):
    """Batches of P identities with K clouds each, one after the other: P * K draws in a row are a batch.

    An epoch has about as many draws as there are clouds, and at least one batch. Over the epochs each cloud is drawn
    equally often: the more clouds an identity has, the more batches it is in. (One with over 1 / P of all clouds is in
    every batch, and the others are drawn more often.) The K clouds are different ones wherever the identity has
    that many, else each comes about K / clouds times; an only one K times, varied anew, its own positive pair.
    They are spread over the identity's cameras as evenly as drawing all clouds equally often allows.

    Args:
        labels: (n,) integers, the identity of each cloud.
        camids: (n,) integers, the camera of each; None when they do not matter.
        p: identities in a batch, at least 2: a metric loss needs negative pairs.
        k: clouds of each, at least 2: and positive ones.
        seed: with ``set_epoch``, decides every draw.

    Raises:
        TypeError: labels or camids that are not integers.
        ValueError: labels that are not a non-empty vector, camids of another shape, p or k < 2, a negative seed, or
            fewer than p identities with at least 2 clouds: positive pairs would be of one cloud alone.

    Source: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, sec. 2.
    """

    def __init__(self, labels: np.ndarray, camids: np.ndarray | None = None, *, p: int, k: int, seed: int = 0) -> None:
        super().__init__(labels, seed)
        for name, value in (("p", p), ("k", k)):
            if value < 2:
                raise ValueError(f"{name} must be at least 2, got {value}")
        self._camids = np.zeros_like(self._labels) if camids is None else np.asarray(camids)
        if not np.issubdtype(self._camids.dtype, np.integer):
            raise TypeError(f"camids must be integers, got {self._camids.dtype}")
        if self._camids.shape != self._labels.shape:
            raise ValueError(f"camids must have the shape of labels, {self._labels.shape}, got {self._camids.shape}")
        self._members = _members(self._labels)
        counts = np.array([len(clouds) for clouds in self._members])
        if (pairs := int((counts >= 2).sum())) < p:
            raise ValueError(
                f"p must not exceed the {pairs} identities with at least 2 clouds (of {len(counts)} in all), got {p}"
            )
        self._p, self._k = p, k
        self._batches = max(1, len(self._labels) // (p * k))
        self._lengths, self._step = self._turns(counts)

    def __len__(self) -> int:
        return self._batches * self._p * self._k

    def _turns(self, counts: np.ndarray) -> tuple[np.ndarray, int]:
        """(lengths, step): each identity is to have length / step turns, proportional to its clouds, one a batch."""
        always = np.zeros(len(counts), bool)
        while True:
            step = int(counts[~always].sum())
            others = self._batches * (self._p - int(always.sum()))  # turns that are left to the rest
            lengths = np.where(always, self._batches * step, others * counts)
            over = lengths > self._batches * step
            if not over.any():
                return lengths, step
            always |= over

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        # Systematic sampling: identities in random order on a line, each as long as its share, and a comb laid on it
        # with a random first tooth. So an identity has its share of turns rounded down or up, in a row; dealt out to
        # the batches in turn, no two of them fall into the same batch, since no share exceeds the number of batches.
        order = rng.permutation(len(self._members))
        teeth = rng.integers(self._step) + self._step * np.arange(self._batches * self._p)
        who = order[np.searchsorted(np.cumsum(self._lengths[order]), teeth, side="right")]
        first = np.flatnonzero(np.diff(who, prepend=-1))
        turns = np.diff(first, append=len(who))
        clouds = np.concatenate([self._clouds(who[at], n, rng) for at, n in zip(first, turns, strict=True)])
        batches = clouds.reshape(self._p, self._batches, self._k).transpose(1, 0, 2)
        return rng.permutation(batches).reshape(-1)

    def _clouds(self, identity: int, turns: int, rng: np.random.Generator) -> np.ndarray:
        """(turns * k,) clouds: a stretch of a cycle through all, in which k in a row have many cameras."""
        clouds = rng.permutation(self._members[identity])
        _, camera, size = np.unique(self._camids[clouds], return_inverse=True, return_counts=True)
        clouds = clouds[np.lexsort((rng.permutation(len(size))[camera], -size[camera]))]
        # Every stride-th of the clouds sorted by camera, and again from the next: about k a round.
        stride = -(-len(clouds) // self._k)
        cycle = np.concatenate([clouds[start::stride] for start in range(stride)])
        return cycle[(rng.integers(len(cycle)) + np.arange(turns * self._k)) % len(cycle)]


class Batches(Sampler[list[tuple[int, int]]]):
    """The whole batches of a sampler, an incomplete last one dropped; in one of several processes, its part of each.

    So `world` processes with batches of `size` see what one with batches of `world * size` sees.

    Args:
        sampler: of this module, the same in every process.
        size: clouds in a batch of one process.
        rank, world: the number of this process, and of all.
    """

    def __init__(self, sampler: _Draws, size: int, rank: int = 0, world: int = 1):
        self._sampler, self._size, self._rank, self._world = sampler, size, rank, world

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of this epoch."""
        self._sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._sampler) // (self._size * self._world)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draws = list(self._sampler)
        for batch in range(len(self)):
            start = (batch * self._world + self._rank) * self._size
            yield draws[start : start + self._size]


def _members(labels: np.ndarray) -> list[np.ndarray]:
    """The clouds of each identity, in the order of the labels."""
    _, counts = np.unique(labels, return_counts=True)
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
