"""The pixels of pedestrian crops."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

READERS = {b"\xff\xd8\xff": jpeg_factory, b"\x89PNG": PngImageFile, b"BM": BmpImageFile, b"RIFF": WebPImageFile}
MIN_SIDE = 8  # pixels
MAX_PIXELS = 50_000_000  # 20,000 x 20,000 would take 1.2 GB


def read_image(image: str | Path | Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W, 3) uint8 RGB of an image resized to `size` = (H, W), whatever its aspect; see `read_picture`."""
    return resize(read_picture(image, 2 * max(size)).pixels, size)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels (h, w, 3) uint8 resampled to `size` = (H, W): bilinear, averaging where they get fewer."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    return np.array(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


class Picture(NamedTuple):
    """pixels (h, w, 3) uint8 RGB of an image, reduced perhaps, and size (H, W) of the image itself, upright."""

    pixels: np.ndarray
    size: tuple[int, int]


def read_picture(image: str | Path | Image.Image, longest: int) -> Picture:
    """An image in its own proportions.

    An image with a side of twice `longest` pixels or more is reduced by a whole number, as far as it stays that long.
    EXIF orientation is honoured, transparency lies over white, 16-bit greys are scaled and large JPEGs decoded reduced.

    Raises: OSError when the file cannot be read; ValueError when it is no regular file, empty, truncated, not one of
        JPEG, PNG, BMP and WebP, under 8 pixels wide or high, or over 50 megapixels (which is seen before decoding).
    """
    if isinstance(image, Image.Image):
        _check_dimensions(image)
        image = ImageOps.exif_transpose(image)
        return Picture(_rgb(image, longest), (image.height, image.width))
    status = os.stat(image)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
        raise ValueError("not a regular file")
    if not status.st_size:
        raise ValueError("empty file")
    with open(image, "rb") as file:
        # Not Image.open, which warns on stderr of an image that is refused here a moment later.
        prefix = file.read(4)
        reader = next((reader for magic, reader in READERS.items() if prefix.startswith(magic)), None)
        if reader is None:
            raise ValueError("not a JPEG, PNG, BMP or WebP image")
        file.seek(0)
        try:
            picture: Image.Image = reader(file, "")
        except Exception as error:  # Pillow's readers raise almost anything on broken bytes, here and below
            raise ValueError(f"broken image: {_line(error)}") from error
        _check_dimensions(picture)
        try:
            turned = picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            size = picture.size if turned else picture.size[::-1]
            picture.draft(None, (longest, longest))
            picture = ImageOps.exif_transpose(picture)
        except Exception as error:
            raise ValueError(f"broken image: {_line(error)}") from error
        return Picture(_rgb(picture, longest), size)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_dimensions(image: Image.Image) -> None:
    if min(image.size) < MIN_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels: a side must have at least {MIN_SIDE}")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels: more than {MAX_PIXELS // 1_000_000} megapixels")


def _rgb(image: Image.Image, longest: int) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((grey * 255 / 65535).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    factor = max(image.size) // longest
    return np.array(image.reduce(factor) if factor > 1 else image)
