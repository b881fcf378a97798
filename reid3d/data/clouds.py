"""Data sets of point clouds: folders of shards as `reid3d convert` writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..cloud import PointCloud
from ..io import DATASET_FILE, Record, Shard
from .split import Split
from .transforms import EvalTransform


class CloudSplit(Split):
    """The clouds of one split, in the order of the shards: a `Split` whose items are xyz float32 (P, 3) and rgb float32
    (P, 3) in [-0.5, 0.5], unless the transform is a loader's.

    Without a transform it is EvalTransform() here, and in `extract` with as many points as the model was trained with.
    records: list of `Record`.
    """

    inputs = "cloud"

    def __init__(self, root: Path, name: str, shards: Sequence[Shard]) -> None:
        rows = ((shard, i, record) for shard in shards for i, record in enumerate(shard.records))
        mine = [row for row in rows if row[2].split == name]
        super().__init__(root, name, [(shard, i) for shard, i, _ in mine], [record for _, _, record in mine])

    def cloud(self, i: int) -> PointCloud:
        """The whole cloud i, untransformed. Raises: ValueError naming it when it is corrupt, as with NaN in it."""
        shard, row = self._places[i]
        try:
            return shard[row]
        except ValueError as error:
            raise ValueError(f"{self.records[i].name}: {error}") from error

    def shard(self, i: int) -> tuple[Shard, int]:
        """Where cloud i is: its shard, and its row there."""
        place: tuple[Shard, int] = self._places[i]
        return place

    def _transformed(self, i: int, rng: np.random.Generator) -> tuple[Tensor, ...] | Tensor:
        return (self.transform or EvalTransform())(self.cloud(i), rng)

    def _identity(self, place: tuple[Shard, int], record: Record) -> str:
        return f"{record.to_json()} {place[0].metadata.get('config')}"


@dataclass(frozen=True)
class CloudDataset:
    """The splits of a folder of shards; one that the folder does not have is empty."""

    root: Path
    train: CloudSplit
    query: CloudSplit
    gallery: CloudSplit
    all: CloudSplit


def open_clouds(root: str | Path) -> CloudDataset:
    """Open a folder of cloud shards; reads the manifests and no points.

    Raises: FileNotFoundError when there is no such folder; ValueError when it has no shards, its conversion was not
        finished, or a file is truncated, corrupt or foreign.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"root: no such folder: {root}")
    _check_finished(root)
    shards = [Shard(path) for path in sorted(root.glob("[!.]*.safetensors"))]
    if not shards:
        raise ValueError(f"root holds no cloud shards: {root} (reid3d convert SRC {root} makes them)")
    splits = ("train", "query", "gallery", "all")
    for shard in shards:
        if unknown := {record.split for record in shard.records} - set(splits):
            raise ValueError(f"{shard.path}: split must be one of {', '.join(splits)}, got {sorted(unknown)}")
    return CloudDataset(root, *(CloudSplit(root, name, shards) for name in splits))


def _check_finished(root: Path) -> None:
    path = root / DATASET_FILE
    if not path.exists():  # shards written by hand
        return
    try:
        wanted = {str(split): int(count) for split, count in json.loads(path.read_bytes())["shards"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not the description of a converted folder: {error}") from error
    for split, count in wanted.items():
        done = sum(manifest.with_suffix(".safetensors").exists() for manifest in root.glob(f"{split}-*.jsonl"))
        if done != count:
            raise ValueError(
                f"root: the conversion into {root} is not finished ({split}: {done} of {count} shards); "
                "run the same reid3d convert command again to go on"
            )
