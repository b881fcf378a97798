"""Which clouds an epoch shows, and in which order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_STREAM = 1  # of random numbers; items have their own


class BalancedSampler(Sampler[tuple[int, int]]):
    """As many draws as there are clouds, with replacement, each identity equally likely.

    Yields (cloud, draw), the draws counted from 0, so that `CloudSplit` varies a cloud anew each time it is drawn.

    Args:
        labels: (n,) integers, the identity of each cloud.
        seed: with ``set_epoch``, decides every draw.

    Raises:
        TypeError: labels that are not integers.
        ValueError: labels that are not a non-empty vector, or a negative seed.

    Source: the published OG-Net training with ``--balance``: WeightedRandomSampler, weight 1 / size of the class.
    """

    def __init__(self, labels: np.ndarray, seed: int = 0) -> None:
        labels = np.asarray(labels)
        if not np.issubdtype(labels.dtype, np.integer):
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.ndim != 1 or labels.size == 0:
            raise ValueError(f"labels must be a non-empty vector, got shape {labels.shape}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        self._weights = 1.0 / (counts[inverse] * len(counts))
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the draws of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._weights)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((_STREAM, self._seed, self._epoch))
        drawn = rng.choice(len(self), size=len(self), p=self._weights).tolist()
        yield from zip(drawn, range(len(self)), strict=True)
