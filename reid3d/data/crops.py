"""Data sets of crops, as pixels for the 2D methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .image_transforms import ImageEvalTransform
from .images import read_picture
from .layouts import SPLITS, ImageRecord, list_images
from .split import Split


class ImageSplit(Split):
    """The crops of one split, sorted by name: a `Split` whose items are uint8 (3, H, W), RGB.

    Without a transform it is ImageEvalTransform() here, and in `extract` of the size the model was trained with.
    records: list of `ImageRecord`.
    """

    inputs = "image"

    def __init__(self, root: Path, name: str, images: list[ImageRecord]) -> None:
        mine = [image for image in images if image.split == name]
        super().__init__(root, name, [image.path for image in mine], mine)

    def pixels(self, i: int, longest: int) -> np.ndarray:
        """Crop i, (h, w, 3) uint8 RGB, whole or reduced as far as its longer side keeps `longest` pixels.

        Raises: ValueError naming it when it cannot be read.
        """
        try:
            return read_picture(self._places[i], longest).pixels
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.records[i].name}: {error}") from error

    def _transformed(self, i: int, rng: np.random.Generator) -> tuple[Tensor, ...] | Tensor:
        transform: Any = self.transform or ImageEvalTransform()
        return transform(self.pixels(i, 2 * max(transform.height, transform.width)), rng)

    def _identity(self, place: Path, record: ImageRecord) -> str:
        return f"{record.name} {record.pid} {record.camid} {record.time} {place.stat().st_size}"


@dataclass(frozen=True)
class ImageDataset:
    """The splits of a folder of crops; one that the folder does not have is empty. notes: as in `Listing`."""

    root: Path
    train: ImageSplit
    query: ImageSplit
    gallery: ImageSplit
    all: ImageSplit
    notes: tuple[str, ...] = ()


def open_crops(root: str | Path) -> ImageDataset:
    """Open a folder of crops in any layout that `list_images` knows; opens no image.

    Raises: FileNotFoundError when there is no such folder; ValueError when it holds no crops.
    """
    listing = list_images(root)
    if not listing.images:
        raise ValueError(f"root holds no crops: {root}")
    train, query, gallery, rest = (ImageSplit(listing.root, name, listing.images) for name in SPLITS)
    return ImageDataset(listing.root, train, query, gallery, rest, tuple(listing.notes))
