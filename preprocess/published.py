"""The trees of text clouds published with OG-Net, 3DMarket+bg and its like, read as if they were crops.

A tree is SPLIT/ID/IMAGE.jpg.obj with the splits train_all, train, val, query and gallery. train_all holds what train
and val hold; where it is there they are passed over. pid, camid and time are those of the image's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reid3d.cloud import PointCloud
from reid3d.data.layouts import IDENTITIES, NO_NAME, ImageRecord, parse_name, split_folders
from reid3d.formats import read_obj

from .convert import Converted

FIT = "published"


def is_obj_tree(root: str | Path) -> bool:
    """Whether a folder is such a tree: one of its splits holds an .obj file of some identity."""
    return any(next(Path(root).glob(f"{folder}/*/*.obj"), None) is not None for folder in IDENTITIES)


def list_obj_tree(root: str | Path) -> tuple[list[ImageRecord], list[tuple[str, str]]]:
    """The clouds of a tree, sorted by split and name, and (name, reason) of every file that is none.

    Names are relative to `root` and end in .obj.
    """
    root = Path(root)
    folders = split_folders(root)
    records, rejected = [], []
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        known = parse_name(path.name)
        if path.name.startswith("."):
            continue
        if path.suffix != ".obj":
            rejected.append((name, "not a cloud: the extension must be .obj"))
        elif known is None:
            rejected.append((name, NO_NAME))
        else:
            records.append(ImageRecord(path, name, folders[name.split("/")[0]], *known))
    order = list(dict.fromkeys(IDENTITIES.values()))
    return sorted(records, key=lambda record: (order.index(record.split), record.name)), rejected


class TreeReader:
    """Makes of a published file what a `Converter` makes of a crop.

    Body and background are told apart, as the background lies on one plane at the end of the file. Which vertices the
    body's points were the file does not say: `vertex` counts them, in the order of the unknown numbers. The camera is
    that of the background's grid, [0, 0, 0] where the grid has not all rows and columns.
    """

    def describe(self) -> dict[str, Any]:
        return {"fitter": FIT, "vertex": "rank among the coloured vertices"}

    def read(self, path: Path) -> PointCloud:
        """Raises: ValueError when the file is no cloud of an image of 2:1. OSError."""
        cloud = read_obj(path)
        width = round((len(cloud) / 2) ** 0.5)
        if 2 * width * width != len(cloud):
            raise ValueError(f"{len(cloud)} points are not those of an image of 2:1, such as 128 x 64")
        return cloud

    def problem(self, cloud: PointCloud, name: str) -> None:
        return None

    def __call__(self, clouds: Sequence[PointCloud], names: Sequence[str]) -> list[Converted]:
        return [self._converted(cloud) for cloud in clouds]

    def _converted(self, cloud: PointCloud) -> Converted:
        width = round((len(cloud) / 2) ** 0.5)
        on_plane = cloud.xyz[:, 2] == cloud.xyz[-1, 2]
        body = len(cloud) - int(np.argmin(np.append(on_plane[::-1], False)))
        vertex = np.where(np.arange(len(cloud)) < body, np.arange(len(cloud)), -1).astype(np.int32)
        cam = grid_camera(cloud.xyz[body:, :2], 2 * width, width)
        return Converted(PointCloud(cloud.xyz, cloud.rgb, vertex), (2 * width, width), cam, 0.5, FIT, {}, None, None)


def grid_camera(xy: np.ndarray, height: int, width: int) -> tuple[float, float, float]:
    """[s, tx, ty] of background points (N,2), which the published converter puts at the pixels' upper left corners."""
    columns, rows = (np.unique(np.round(xy[:, axis].astype(np.float64), 5)) for axis in (0, 1))
    if len(columns) != width or len(rows) != height:
        return 0.0, 0.0, 0.0
    s = 2 * (height - 1) / height / float(rows[-1] - rows[0])
    return s, float(-width / height / s - columns[0]), float(-1 / s - rows[0])
