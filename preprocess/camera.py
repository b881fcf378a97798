"""The weak-perspective camera of the fits, in the frame of the clouds: x right, y down, z away, metres.

A camera is [s, tx, ty]. The point (X, Y, Z) falls s (X + tx) half crop heights to the right of the crop's centre and
s (Y + ty) below it, whatever the pixels: the crop's height spans 2/s metres. A crop of width/height `aspect` that is
resampled to H x W pixels, stretched or not, shows the point at

    x = (s (X + tx) / aspect + 1) W / 2        y = (s (Y + ty) + 1) H / 2

where the pixel in row i and column j covers [j, j+1) x [i, i+1). So one camera serves every resolution of a crop.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def project(points: Tensor, cam: Tensor, height: int, width: int, aspect: Tensor | None = None) -> Tensor:
    """Pixel position and depth (B,V,3) of points (B,V,3) seen by cam (B,3); the depth is Z, unchanged.

    aspect: (B,) width/height of the crops before they were resampled to height x width; None for width/height.
    """
    centre = points.new_tensor([width / 2, height / 2])
    xy = (points[..., :2] + cam[:, None, 1:]) * pixels_a_metre(cam, height, width, aspect)[:, None] + centre
    return torch.cat([xy, points[..., 2:]], -1)


def project_joints(joints: Tensor, cam: Tensor) -> Tensor:
    """Where joints (B,J,3) are seen by cam (B,3): (B,J,2) in half crop heights from the crop's centre."""
    return cam[:, None, :1] * (joints[..., :2] + cam[:, None, 1:])


def unproject(pixels: Tensor, cam: Tensor, height: int, width: int, aspect: Tensor | None = None) -> Tensor:
    """The inverse of `project`: points (B,P,3) of pixel positions and depths (B,P,3)."""
    from_centre = pixels[..., :2] - pixels.new_tensor([width / 2, height / 2])
    xy = from_centre / pixels_a_metre(cam, height, width, aspect)[:, None] - cam[:, None, 1:]
    return torch.cat([xy, pixels[..., 2:]], -1)


def pixels_a_metre(cam: Tensor, height: int, width: int, aspect: Tensor | None = None) -> Tensor:
    """(B,2) along x and y."""
    along_x = height if aspect is None else width / aspect.to(cam)
    return torch.stack([cam[:, 0] * along_x / 2, cam[:, 0] * height / 2], 1)


def cut_window(
    crop: np.ndarray, size: tuple[int, int], tall: float, border: Literal["edge", "black"] = "edge"
) -> np.ndarray:
    """What a network sees of a crop (H,W,3) uint8: a window around its centre, resampled to `size` = (h, w).

    The window is `tall` crop heights high and keeps the crop's proportions; what it shows beyond the crop is black or
    the border's colours. The camera of the crop is that of the window with s times `tall`.
    """
    height, width = crop.shape[:2]
    high, wide = tall * height, tall * height * size[1] / size[0]
    left, top = (width - wide) / 2, (height - high) / 2
    x, y = max(int(np.ceil(-left)), 0), max(int(np.ceil(-top)), 0)
    if x or y:
        crop = np.pad(crop, ((y, y), (x, x), (0, 0)), "edge" if border == "edge" else "constant")
    box = (max(left + x, 0), max(top + y, 0), min(left + x + wide, crop.shape[1]), min(top + y + high, crop.shape[0]))
    return np.asarray(Image.fromarray(crop).resize((size[1], size[0]), Image.Resampling.BILINEAR, box))


def check_crops(crops: Sequence[np.ndarray]) -> None:
    """TypeError or ValueError unless every crop is (H,W,3) uint8."""
    for crop in crops:
        if crop.dtype != np.uint8:
            raise TypeError(f"crops must be uint8, got {crop.dtype}")
        if crop.ndim != 3 or crop.shape[-1] != 3 or 0 in crop.shape:
            raise ValueError(f"crops must be (H, W, 3), got {crop.shape}")
