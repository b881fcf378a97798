"""Clouds that ops tend to get wrong, and oracles that share nothing with the ops."""

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

# Names of `cloud`: equal distances, equal points, no volume, far away, very small and very large.
KINDS = ("random", "grid", "duplicates", "equal", "collinear", "far", "tiny", "huge")


def cloud(kind: str, n: int, rng: np.random.Generator, batch: int = 2, dims: int = 3) -> Tensor:
    """(batch, n, dims) float64 whose values are float32 numbers, so that both precisions see the same points."""
    x = rng.random((batch, n, dims))
    if kind == "grid":
        x = rng.integers(0, 4, x.shape).astype(float)
    elif kind == "duplicates":
        x = x[:, rng.integers(0, max(1, n // 3), n)]
    elif kind == "equal":
        x = np.broadcast_to(x[:, :1], x.shape)
    elif kind == "collinear":
        x = x[..., :1] * np.ones(dims)
    elif kind == "far":
        x = x + 1000
    elif kind == "tiny":
        x = x * 1e-3
    elif kind == "huge":
        x = x * 1e6
    return torch.tensor(x.astype(np.float32).astype(np.float64))


def exact_distances(query: Tensor, points: Tensor) -> list[list[list[Fraction]]]:
    """Squared distances in rational arithmetic, [b][query][point]."""
    exact = [[[[Fraction(v) for v in row] for row in c] for c in x.tolist()] for x in (query, points)]
    return [
        [[sum(((a - b) ** 2 for a, b in zip(q, p, strict=True)), Fraction()) for p in cp] for q in cq]
        for cq, cp in zip(*exact, strict=True)
    ]
