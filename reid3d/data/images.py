"""Pedestrian crops: the folders they lie in, by the Market-1501 convention or plain, and their pixels."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import jpeg_factory
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SPLITS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
READERS = {b"\xff\xd8\xff": jpeg_factory, b"\x89PNG": PngImageFile, b"BM": BmpImageFile, b"RIFF": WebPImageFile}
MIN_SIDE = 8  # pixels
MAX_PIXELS = 50_000_000  # 20,000 x 20,000 would take 1.2 GB
NO_NAME = "the name does not fit PID_cCAMERA..., such as 0002_c1s1_000451_03.jpg"
FRAMES_PER_SESSION = 1_000_000  # Market-1501 numbers frames with six digits
_NAME = re.compile(  # at most nine digits a number, so that all fit into 64 bits
    r"(?P<pid>-1|[0-9]{1,9})_c(?P<camid>[1-9][0-9]{0,8})"
    r"(?:s(?P<session>[1-9][0-9]{0,8})_(?P<frame>[0-9]{1,9})|_f(?P<f>[0-9]{1,9}))?[_.]"
)


@dataclass(frozen=True)
class ImageRecord:
    """One crop: its file, its name relative to the listed folder, and what folder and file name say of it."""

    path: Path
    name: str
    split: str
    pid: int
    camid: int
    time: int


def list_images(root: str | Path) -> tuple[list[ImageRecord], list[tuple[str, str]]]:
    """The crops under `root`, sorted by split and name, and (name, reason) of every file that is not one.

    A folder with any of bounding_box_train ("train"), query ("query") and bounding_box_test ("gallery") is taken as
    Market-1501 layout; what lies beside those is not looked at. There pid and camid come from names such as
    0002_c1s1_000451_03.jpg (Market-1501), 0001_c2_f0046182.jpg (DukeMTMC-reID) or 0001_c1_1.png (CUHK03-NP): pid -1 is
    junk and kept in the list, 0 a distractor. time is the frame number; in Market names session s adds
    (s - 1) * 1,000,000, so that times of one camera are in order, and both numbers can be had back. It is -1 where the
    name has no frame.

    Any other folder, with the folders in it, and a single file make one split "all" with pid, camid and time -1.

    Files are known by extension (jpg, jpeg, png, bmp, webp, in either case) and not opened. Hidden files and Thumbs.db
    are passed over.

    Raises: FileNotFoundError when `root` is not there; ValueError when it holds a Market-1501 folder one level down;
        OSError when a folder cannot be read.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"root: no such folder or image: {root}")
    if root.is_file():
        return _sort(root.parent, [(root, "all")])
    splits = [(split, root / folder) for split, folder in SPLITS.items() if (root / folder).is_dir()]
    if not splits:
        inner = sorted(child for child in root.iterdir() if (child / SPLITS["train"]).is_dir())
        if inner:
            raise ValueError(f"root must be the folder that holds {', '.join(SPLITS.values())}: {inner[0]}, not {root}")
    return _sort(root, [(path, split) for split, folder in splits or [("all", root)] for path in _walk(folder)])


def _walk(folder: Path) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error  # os.walk passes over what it cannot read

    paths = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(parent, name) for name in files + links]
    return sorted(paths, key=Path.as_posix)


def _sort(root: Path, files: list[tuple[Path, str]]) -> tuple[list[ImageRecord], list[tuple[str, str]]]:
    images, rejected = [], []
    for path, split in files:
        name = path.relative_to(root).as_posix()
        known = parse_name(path.name)
        if path.name.startswith(".") or path.name.lower() == "thumbs.db":
            continue
        if path.is_dir():
            rejected.append((name, "a link to a folder: not followed"))
        elif path.suffix.lower() not in EXTENSIONS:
            rejected.append((name, f"not an image name: the extension must be one of {' '.join(EXTENSIONS)}"))
        elif split == "all":
            images.append(ImageRecord(path, name, split, pid=-1, camid=-1, time=-1))
        elif known is None:
            rejected.append((name, NO_NAME))
        else:
            images.append(ImageRecord(path, name, split, *known))
    return images, rejected


def parse_name(name: str) -> tuple[int, int, int] | None:
    """pid, camid and time by the name of a file, see `list_images`; None where it does not fit."""
    fit = _NAME.match(name)
    if not fit:
        return None
    time = int(fit["frame"] or fit["f"] or -1) + FRAMES_PER_SESSION * (int(fit["session"] or 1) - 1)
    return int(fit["pid"]), int(fit["camid"]), time


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
