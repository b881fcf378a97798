"""From a PointCloud to what a network is fed with: a fixed number of centred points, and colours about 0.

The published loader treats pure white as "no colour", because its text format has no other way to say that a vertex was
not seen; white shirts fall to that rule too. Our clouds hold only coloured points, so white is a colour here.

Source: layumi/person-reid-3d, ``market3d.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reid3d.cloud import PointCloud

STRETCH = (0.75, 1.33)
JITTER = 0.01  # metres: the deviation, and the clip


def _evenly(n: int, points: int) -> np.ndarray:
    """``points`` indices spread over 0..n-1, both ends included; each repeats when there are fewer than that."""
    return np.linspace(0, n - 1, points, dtype=np.int64)


def _centred(cloud: PointCloud) -> np.ndarray:
    """xyz (N, 3) float32 about the mean of all points."""
    return cloud.xyz - cloud.xyz.mean(axis=0, dtype=np.float64).astype(np.float32)


def _tensors(xyz: np.ndarray, rgb: np.ndarray) -> tuple[Tensor, Tensor]:
    colours = rgb.astype(np.float32) / np.float32(255) - np.float32(0.5)
    return torch.from_numpy(np.ascontiguousarray(xyz)), torch.from_numpy(colours)


def _checked(cloud: PointCloud, points: int, background: bool) -> PointCloud:
    """The points to choose from."""
    if points < 1:
        raise ValueError(f"points must be positive, got {points}")
    if len(cloud) == 0:
        raise ValueError("cloud must have at least one point, got none")
    body = cloud.vertex >= 0
    return cloud if background or not body.any() else PointCloud(cloud.xyz[body], cloud.rgb[body], cloud.vertex[body])


@dataclass(frozen=True)
class EvalTransform:
    """Centre the cloud and take ``points`` evenly spread ones, in file order; nothing random.

    A cloud of fewer points repeats some, each about equally often. Without ``background`` only the body's points count;
    a cloud that has none is taken whole.

    Returns, when called with (cloud, rng): xyz (points, 3) float32 metres, rgb (points, 3) float32 in [-0.5, 0.5].

    Raises:
        ValueError: a cloud without points, or points < 1.
    """

    points: int = 4096
    background: bool = True

    def __call__(self, cloud: PointCloud, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        cloud = _checked(cloud, self.points, self.background)
        chosen = _evenly(len(cloud), self.points)
        return _tensors(_centred(cloud)[chosen], cloud.rgb[chosen])


@dataclass(frozen=True)
class TrainTransform:
    """As EvalTransform, but the points are a random subset half the time, and the geometry varies.

    Args:
        points: taken from each cloud, kept in file order.
        flip: mirror x half the time.
        scale: stretch each axis by its own U(0.75, 1.33).
        jitter: then move each coordinate by N(0, 1 cm), clipped at 1 cm.
        background: as for EvalTransform.

    Returns and raises as EvalTransform. The random subset is drawn without replacement from all points (the published
    one leaves out the last point).
    """

    points: int = 4096
    flip: bool = True
    scale: bool = True
    jitter: bool = True
    background: bool = True

    def __call__(self, cloud: PointCloud, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        cloud = _checked(cloud, self.points, self.background)
        n = len(cloud)
        if rng.random() < 0.5 and self.points < n:
            chosen = np.sort(rng.choice(n, self.points, replace=False, shuffle=False))
        else:
            chosen = _evenly(n, self.points)
        xyz = _centred(cloud)[chosen]
        if self.flip and rng.random() < 0.5:
            xyz[:, 0] *= -1
        if self.scale:
            xyz *= rng.uniform(*STRETCH, size=3).astype(np.float32)
        if self.jitter:
            noise = rng.standard_normal(xyz.shape, dtype=np.float32) * np.float32(JITTER)
            xyz += noise.clip(-JITTER, JITTER)
        return _tensors(xyz, cloud.rgb[chosen])
