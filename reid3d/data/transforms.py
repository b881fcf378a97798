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


def _mean(cloud: PointCloud) -> np.ndarray:
    """Of all points, (3,) float32. An axis in a row is added up ten times as fast as the rows of xyz."""
    return cloud.xyz.T.astype(np.float64, order="C").mean(axis=1).astype(np.float32)


def _checked(cloud: PointCloud, points: int, background: bool) -> PointCloud:
    """The points to choose from."""
    if points < 1:
        raise ValueError(f"points must be positive, got {points}")
    if len(cloud) == 0:
        raise ValueError("cloud must have at least one point, got none")
    body = cloud.vertex >= 0
    return cloud if background or not body.any() else PointCloud(cloud.xyz[body], cloud.rgb[body], cloud.vertex[body])


def place(xyz: Tensor, rgb: Tensor, move: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Points as they were picked to what a network is fed with: the arithmetic, for a batch, on any device.

    Args:
        xyz: (B, P, 3) float32 metres. rgb: (B, P, 3) uint8.
        move: (B, 2, 3) float32, what to subtract from each axis, and then to multiply it by.
        noise: (B, P, 3) standard normal: moves each coordinate by N(0, 1 cm), clipped at 1 cm. None for no jitter.

    Returns: xyz float32 metres about 0, rgb float32 in [-0.5, 0.5].
    """
    centre, factor = move.unsqueeze(2).unbind(1)
    xyz = (xyz - centre) * factor
    if noise is not None:
        xyz += noise.clamp(-1, 1) * JITTER
    return xyz, rgb.float() / 255 - 0.5


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
        picked = _take(cloud, _evenly(len(cloud), self.points), np.stack([_mean(cloud), np.ones(3, np.float32)]))
        return _alone(*picked)


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

    Training does the same in two steps: `pick` in the loader's processes draws what is cheap to draw, and `place` does
    the arithmetic and adds the noise for a whole batch, on the device of the network.
    """

    points: int = 4096
    flip: bool = True
    scale: bool = True
    jitter: bool = True
    background: bool = True

    def __call__(self, cloud: PointCloud, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        picked = self.pick(cloud, rng)
        noise = rng.standard_normal((self.points, 3), dtype=np.float32) if self.jitter else None
        return _alone(*picked, noise=None if noise is None else torch.from_numpy(noise))

    def pick(self, cloud: PointCloud, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """The points of one cloud as they are, xyz (points, 3) float32 and rgb uint8, and move (2, 3): see `place`."""
        cloud = _checked(cloud, self.points, self.background)
        n = len(cloud)
        if rng.random() < 0.5 and self.points < n:
            chosen = np.sort(rng.choice(n, self.points, replace=False, shuffle=False))
        else:
            chosen = _evenly(n, self.points)
        factor = np.ones(3, np.float32)
        if self.flip and rng.random() < 0.5:
            factor[0] = -1
        if self.scale:
            factor *= rng.uniform(*STRETCH, size=3).astype(np.float32)
        return _take(cloud, chosen, np.stack([_mean(cloud), factor]))


def _take(cloud: PointCloud, chosen: np.ndarray, move: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    xyz, rgb = cloud.xyz.take(chosen, axis=0), cloud.rgb.take(chosen, axis=0)  # indexing by [] takes four times as long
    return torch.from_numpy(xyz), torch.from_numpy(rgb), torch.from_numpy(move)


def _alone(xyz: Tensor, rgb: Tensor, move: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`place` for one cloud."""
    xyz, rgb = place(xyz[None], rgb[None], move[None], noise)
    return xyz[0], rgb[0]
