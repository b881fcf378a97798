"""The coloured point cloud of one pedestrian crop: what every stage of reid3d hands to the next."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class PointCloud:
    """N coloured points made from one image crop.

    xyz: (N, 3) float32, metres, in the camera's frame: x to the right of the image, y down, z away from the camera; the
        body's pelvis is near the origin. Finite.
    rgb: (N, 3) uint8, 0..255, sRGB as in the image.
    vertex: (N,) int32, index of the body-model vertex the pixel was matched to, or -1 for a background point. Whether a
        point is body or background is this label, never a colour.

    Raises: TypeError for anything but NumPy arrays of these dtypes; ValueError for other shapes, non-finite
        coordinates or vertices below -1.
    """

    xyz: np.ndarray
    rgb: np.ndarray
    vertex: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.xyz) if isinstance(self.xyz, np.ndarray) and self.xyz.ndim else 0
        for name, dtype, shape in (("xyz", "float32", (n, 3)), ("rgb", "uint8", (n, 3)), ("vertex", "int32", (n,))):
            array = getattr(self, name)
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
            if array.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
            if array.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
        if not np.isfinite(self.xyz).all():
            raise ValueError(f"xyz must be finite, got {self.xyz[~np.isfinite(self.xyz)][0]}")
        if n and self.vertex.min() < -1:
            raise ValueError(f"vertex must be a body vertex or -1 (background), got {self.vertex.min()}")

    def __len__(self) -> int:
        return len(self.xyz)
