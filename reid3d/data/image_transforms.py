"""From a crop to what a 2D network is fed with: one size, eight bits, and what training varies.

Everything happens on bytes; the network itself scales to [0, 1] and normalises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Resample = Literal["bilinear", "bicubic"]

# What torchreid fills with is (0.4914, 0.4822, 0.4465) in units of ImageNet's deviation about its mean, which is
# (152.4, 143.8, 129.1) of 255.
ERASED = (152, 144, 129)


def random_shift(
    pixels: np.ndarray,
    rng: np.random.Generator,
    *,
    crop: float = 0.5,
    min_crop: float = 0.7,
    min_height: float = 0.5,
    min_width: float = 0.5,
    fill: int = 127,
    resample: Resample = "bilinear",
) -> np.ndarray:
    """Random shifting: the image, cut above or below perhaps, in another size somewhere on a plain canvas of its size.

    Args:
        pixels: (h, w, 3) uint8.
        crop: probability of keeping only a share r_c = U(min_crop, 1) of the rows, from a random one on; else r_c = 1.
        min_height, min_width: the height is scaled by U(min_height, 1 / r_c), the width by U(min_width, 1).
        fill: of the canvas, 0-255.

    Returns: (h, w, 3) uint8, another array. Sides are rounded to whole pixels, to at least one.

    Raises: TypeError, ValueError: as ImageTrainTransform; a probability or share outside [0, 1], fill outside [0, 255].

    Source: Wang et al., "Receptive Multi-granularity Representation for Person Re-Identification", sec. III-D. The
    paper gives no crop of the width, which is kept whole here.
    """
    height, width = _checked(pixels).shape[:2]
    for name, value in (("crop", crop), ("min_crop", min_crop), ("min_height", min_height), ("min_width", min_width)):
        _check_share(name, value)
    if not 0 <= fill <= 255:
        raise ValueError(f"fill must be in [0, 255], got {fill}")
    kept = rng.uniform(min_crop, 1) if rng.random() < crop else 1.0
    rows = max(1, round(kept * height))
    top = rng.integers(height - rows + 1)
    tall = max(1, round(rng.uniform(min_height, height / rows) * rows))
    wide = max(1, round(rng.uniform(min_width, 1) * width))
    y, x = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
    canvas = np.full_like(pixels, fill)
    canvas[y : y + tall, x : x + wide] = _resize(pixels[top : top + rows], (tall, wide), resample)
    return canvas


def random_erasing(
    pixels: np.ndarray,
    rng: np.random.Generator,
    *,
    area: tuple[float, float] = (0.02, 0.4),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    fill: tuple[int, int, int] = ERASED,
) -> np.ndarray:
    """Random erasing: a rectangle in one colour.

    Its share of the image is U(*area), its height over its width U(*aspect), and it lies anywhere inside. It is drawn
    anew until it is lower and narrower than the image, and after 100 draws nothing is erased.

    Args:
        pixels: (h, w, 3) uint8. fill: R, G, B.

    Returns: (h, w, 3) uint8, another array.

    Raises: TypeError, ValueError: as ImageTrainTransform; not 0 <= low <= high <= 1 of area, 0 < low <= high of aspect.

    Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020; numbers, strictness and colour of torchreid's
    ``transforms.py``, with which PLR-OSNet is published.
    """
    height, width = _checked(pixels).shape[:2]
    if not 0 <= area[0] <= area[1] <= 1:
        raise ValueError(f"area must be two ascending shares in [0, 1], got {area}")
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"aspect must be two ascending positive numbers, got {aspect}")
    pixels = pixels.copy()
    for _ in range(100):
        erased, ratio = rng.uniform(*area) * height * width, rng.uniform(*aspect)
        tall, wide = round((erased * ratio) ** 0.5), round((erased / ratio) ** 0.5)
        if tall < height and wide < width:
            y, x = rng.integers(height - tall + 1), rng.integers(width - wide + 1)
            pixels[y : y + tall, x : x + wide] = fill
            break
    return pixels


def random_occlusion(
    pixels: np.ndarray, rng: np.random.Generator, *, max_side: float = 0.8, fill: int = 255
) -> np.ndarray:
    """A white square, whose side is uniform over the whole numbers from 1 to below int(max_side * the shorter side).

    Args:
        pixels: (h, w, 3) uint8. Where there is no such number, the side is 1.

    Returns: (h, w, 3) uint8, another array.

    Raises: TypeError, ValueError: as ImageTrainTransform; max_side outside [0, 1], fill outside [0, 255].

    Source: Liao and Shao, "Interpretable and Generalizable Person Re-identification with Query-adaptive Convolution and
    Temporal Lifting", ECCV 2020, ``reid/utils/data/transforms.py`` of its code, where the square never touches the
    right and lower edges; here it may.
    """
    height, width = _checked(pixels).shape[:2]
    _check_share("max_side", max_side)
    if not 0 <= fill <= 255:
        raise ValueError(f"fill must be in [0, 255], got {fill}")
    side = rng.integers(1, max(2, int(max_side * min(height, width))))
    y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
    pixels = pixels.copy()
    pixels[y : y + side, x : x + side] = fill
    return pixels


@dataclass(frozen=True)
class ImageEvalTransform:
    """Resize a crop, whatever its aspect; nothing random.

    Args:
        height, width: in pixels.
        resample: "bilinear" or "bicubic", either averaging where there get fewer pixels.

    Returns, when called with (pixels (h, w, 3) uint8 RGB, rng): (3, height, width) uint8, which shares no memory.

    Raises:
        TypeError: a size that is no int; when called, pixels that are no uint8 array.
        ValueError: a size below 1, another resample; when called, another shape or no pixel.
    """

    height: int = 256
    width: int = 128
    resample: Resample = "bilinear"

    def __post_init__(self) -> None:
        _check_form(self.height, self.width, self.resample)

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> Tensor:
        return _channels_first(_resize(_checked(pixels), (self.height, self.width), self.resample))


@dataclass(frozen=True)
class ImageTrainTransform:
    """As ImageEvalTransform, but what is seen varies: flip, shift, resize, erase, occlude, in this order.

    Args:
        height, width, resample: as for ImageEvalTransform.
        flip: mirror half the time.
        erasing: probability of `random_erasing`.
        occlusion: whether `random_occlusion` is applied, which it then always is.
        shift: probability of `random_shift`.

    Returns and raises as ImageEvalTransform; ValueError too for a probability outside [0, 1].
    """

    height: int = 256
    width: int = 128
    resample: Resample = "bilinear"
    flip: bool = True
    erasing: float = 0.0
    occlusion: bool = False
    shift: float = 0.0

    def __post_init__(self) -> None:
        _check_form(self.height, self.width, self.resample)
        _check_share("erasing", self.erasing)
        _check_share("shift", self.shift)

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> Tensor:
        pixels = _checked(pixels)
        if self.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        if rng.random() < self.shift:
            pixels = random_shift(pixels, rng, resample=self.resample)
        pixels = _resize(pixels, (self.height, self.width), self.resample)
        if rng.random() < self.erasing:
            pixels = random_erasing(pixels, rng)
        if self.occlusion:
            pixels = random_occlusion(pixels, rng)
        return _channels_first(pixels)


def _resize(pixels: np.ndarray, size: tuple[int, int], resample: Resample) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling[resample.upper()]))


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))  # a copy, of an image of one pixel too


def _checked(pixels: np.ndarray) -> np.ndarray:
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
        raise TypeError(f"pixels must be a uint8 array, got {getattr(pixels, 'dtype', type(pixels).__name__)}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"pixels must be (h, w, 3) with at least one pixel, got {pixels.shape}")
    return pixels


def _check_form(height: int, width: int, resample: str) -> None:
    for name, value in (("height", height), ("width", width)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if resample not in ("bilinear", "bicubic"):
        raise ValueError(f"resample must be 'bilinear' or 'bicubic', got {resample!r}")


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
