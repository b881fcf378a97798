"""Any data set by its folder, and whether it can be evaluated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..io import DATASET_FILE
from .clouds import CloudDataset, open_clouds
from .crops import ImageDataset, open_crops
from .layouts import EXTENSIONS


def open_dataset(root: str | Path) -> CloudDataset | ImageDataset:
    """Open a folder of cloud shards, by their manifests, or the crops of a data set in any usual layout, by their names
    (`list_images`), an image and a table among them; reads no points and no pixels.

    Raises: FileNotFoundError when there is no such folder; ValueError when it holds neither, a conversion into it was
        not finished, or a shard is truncated, corrupt or foreign.
    """
    root = Path(root)
    if not (root.is_dir() or (root.is_file() and root.suffix.lower() in (".csv", *EXTENSIONS))):
        raise FileNotFoundError(f"root: no such folder: {root}")
    if (root / DATASET_FILE).exists() or next(root.glob("[!.]*.safetensors"), None):
        return open_clouds(root)
    try:
        return open_crops(root)
    except ValueError as error:
        raise ValueError(
            f"root holds no cloud shards: {root} (reid3d convert SRC {root} makes them); {error}"
        ) from error


class _People(Protocol):
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def pids(self) -> np.ndarray: ...
    @property
    def camids(self) -> np.ndarray: ...


def validate_protocol(query: _People, gallery: _People) -> str:
    """The queries that no gallery item can match: a message that counts them and names three, "" when there are none.

    Both sides are `CloudSplit` or `Features`. An item matches a query when it has the query's pid and another camera;
    an unknown camera (-1) is another camera; junk (pid -1) matches nothing.

    Raises: ValueError when a side is empty, or no query has a match, so that nothing could be evaluated.
    """
    for name, side in (("query", query), ("gallery", gallery)):
        if not len(side.pids):
            raise ValueError(f"{name} must not be empty")
    of_pid = Counter(gallery.pids.tolist())
    of_pair = Counter(zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True))
    lonely = []
    for name, pid, camid in zip(query.names, query.pids.tolist(), query.camids.tolist(), strict=True):
        removed = of_pair[pid, camid] if camid != -1 else 0
        if pid == -1 or of_pid[pid] == removed:
            lonely.append(name)
    if not lonely:
        return ""
    some = ", ".join(lonely[:3]) + (", ..." if len(lonely) > 3 else "")
    message = f"{len(lonely)} of {len(query.pids)} queries have no match from another camera in the gallery: {some}"
    if len(lonely) == len(query.pids):
        raise ValueError(message)
    return message
