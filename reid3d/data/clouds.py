"""Data sets of point clouds: folders of shards as `reid3d convert` writes them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..cloud import PointCloud
from ..io import DATASET_FILE, Record, Shard
from .transforms import EvalTransform

Transform = Callable[[PointCloud, np.random.Generator], tuple[Tensor, ...]]
_STREAM = 2  # of random numbers; the sampler has its own


class CloudSplit(Dataset[tuple[Any, ...]]):
    """The clouds of one split, in the order of the shards; works in DataLoader workers.

    `split[i]` is what the transform makes of the cloud, which is xyz float32 (P, 3) and rgb float32 (P, 3) in
    [-0.5, 0.5] unless it is a loader's, then label and i. `split[i, draw]` is the same cloud with other random numbers:
    these depend on (seed, epoch, i, draw) alone, draw 0 without one, never on the number or order of the workers.

    root, name: where it was read, and "train", "query", "gallery" or "all". transform: None until one is chosen, which
    is EvalTransform() here, and in `extract` with as many points as the model was trained with. records: list of
    `Record`. pids, camids, times: (len,) int64. labels: (len,) int64, the position of the pid in the sorted list of the
    split's pids, in [0, num_pids).
    """

    def __init__(self, root: Path, name: str, shards: Sequence[Shard]) -> None:
        self.root, self.name, self.seed = root, name, 0
        self.transform: Transform | None = None
        rows = ((shard, i, record) for shard in shards for i, record in enumerate(shard.records))
        mine = [row for row in rows if row[2].split == name]
        self._hold([(shard, i) for shard, i, _ in mine], [record for _, _, record in mine])

    def _hold(self, places: list[tuple[Shard, int]], records: list[Record]) -> None:
        self._places, self.records = places, records
        self.pids = np.array([record.pid for record in self.records], np.int64)
        self.camids = np.array([record.camid for record in self.records], np.int64)
        self.times = np.array([record.time for record in self.records], np.int64)
        distinct, labels = np.unique(self.pids, return_inverse=True)
        self.num_pids, self.labels = len(distinct), labels.astype(np.int64)
        self._epoch = _shared_zero()

    @property
    def names(self) -> list[str]:
        """Names of the images, relative to the converted folder."""
        return [record.name for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def cloud(self, i: int) -> PointCloud:
        """The whole cloud i, untransformed. Raises: ValueError naming it when it is corrupt, as with NaN in it."""
        shard, row = self._places[i]
        try:
            return shard[row]
        except ValueError as error:
            raise ValueError(f"{self.records[i].name}: {error}") from error

    def __getitem__(self, i: int | tuple[int, int]) -> tuple[Any, ...]:
        i, draw = i if isinstance(i, tuple) else (i, 0)
        i = range(len(self))[i]
        rng = np.random.default_rng((_STREAM, self.seed, int(self._epoch), i, draw))
        return *(self.transform or EvalTransform())(self.cloud(i), rng), int(self.labels[i]), i

    def with_transform(self, transform: Transform, seed: int = 0) -> CloudSplit:
        """The same clouds through another transform, at epoch 0."""
        other = copy.copy(self)
        other.transform, other.seed, other._epoch = transform, seed, _shared_zero()
        return other

    def subset(self, rows: Sequence[int] | np.ndarray) -> CloudSplit:
        """These of the clouds alone, at epoch 0, with labels of their own."""
        other = copy.copy(self)
        other._hold([self._places[i] for i in rows], [self.records[i] for i in rows])
        return other

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's random numbers, in running workers too. Raises: ValueError when epoch < 0."""
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        self._epoch.fill_(epoch)

    def fingerprint(self) -> str:
        """A hash of what the split holds, wherever it lies: each cloud's record and how its shard was converted."""
        digest = hashlib.sha256()
        for (shard, _), record in zip(self._places, self.records, strict=True):
            digest.update(f"{record.to_json()} {shard.metadata.get('config')}\n".encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"CloudSplit({self.name!r}, {len(self)} clouds, {self.num_pids} pids, {len(set(self.camids))} cameras)"


def _shared_zero() -> Tensor:
    return torch.zeros((), dtype=torch.int64).share_memory_()  # shared, so that persistent workers see set_epoch


@dataclass(frozen=True)
class CloudDataset:
    """The splits of a folder of shards; one that the folder does not have is empty."""

    root: Path
    train: CloudSplit
    query: CloudSplit
    gallery: CloudSplit
    all: CloudSplit


def open_dataset(root: str | Path) -> CloudDataset:
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
