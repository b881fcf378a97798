"""What the splits of all data sets have in common: who is on each item, and what is made of it when it is drawn."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from typing_extensions import Self

_STREAM = 2  # of random numbers; the sampler has its own


class Split(Dataset[tuple[Any, ...]]):
    """The items of one split in their order; works in DataLoader workers.

    `split[i]` is what the transform makes of item i, one tensor or several, then its label and i. `split[i, draw]` is
    the same item with other random numbers: these depend on (seed, epoch, i, draw) alone, draw 0 without one, never on
    the number or order of the workers.

    root, name: where it was read, and "train", "query", "gallery" or "all". inputs: "cloud" or "image", what the items
    are. transform: None until one is chosen. records: what is known of each item; pids, camids, times: (len,) int64.
    labels: (len,) int64, the position of the pid in the sorted list of the split's pids, in [0, num_pids).
    """

    inputs: str

    def __init__(self, root: Path, name: str, places: Sequence[Any], records: Sequence[Any]) -> None:
        self.root, self.name, self.seed = root, name, 0
        self.transform: Callable[[Any, np.random.Generator], tuple[Tensor, ...] | Tensor] | None = None
        self._hold(places, records)

    def _hold(self, places: Sequence[Any], records: Sequence[Any]) -> None:
        """places: where each item is, as `_whereabouts` and `__getitem__` know it."""
        self._places, self.records = list(places), list(records)
        self.pids = np.array([record.pid for record in self.records], np.int64)
        self.camids = np.array([record.camid for record in self.records], np.int64)
        self.times = np.array([record.time for record in self.records], np.int64)
        distinct, labels = np.unique(self.pids, return_inverse=True)
        self.num_pids, self.labels = len(distinct), labels.astype(np.int64)
        self._epoch = _shared_zero()

    @property
    def names(self) -> list[str]:
        """Names of the images, relative to their folder."""
        return [record.name for record in self.records]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int | tuple[int, int]) -> tuple[Any, ...]:
        i, draw = i if isinstance(i, tuple) else (i, 0)
        i = range(len(self))[i]
        made = self._transformed(i, np.random.default_rng((_STREAM, self.seed, int(self._epoch), i, draw)))
        return *(made if isinstance(made, tuple) else (made,)), int(self.labels[i]), i

    def _transformed(self, i: int, rng: np.random.Generator) -> tuple[Tensor, ...] | Tensor:
        raise NotImplementedError

    def with_transform(self, transform: Callable[..., tuple[Tensor, ...] | Tensor], seed: int = 0) -> Self:
        """The same items through another transform, at epoch 0."""
        other = copy.copy(self)
        other.transform, other.seed, other._epoch = transform, seed, _shared_zero()
        return other

    def subset(self, rows: Sequence[int] | np.ndarray) -> Self:
        """These of the items alone, at epoch 0, with labels of their own."""
        other = copy.copy(self)
        other._hold([self._places[i] for i in rows], [self.records[i] for i in rows])
        return other

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's random numbers, in running workers too. Raises: ValueError when epoch < 0."""
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        self._epoch.fill_(epoch)

    def fingerprint(self) -> str:
        """A hash of what the split holds, wherever it lies."""
        digest = hashlib.sha256()
        for place, record in zip(self._places, self.records, strict=True):
            digest.update(f"{self._identity(place, record)}\n".encode())
        return digest.hexdigest()

    def _identity(self, place: Any, record: Any) -> str:
        """What makes an item another one."""
        raise NotImplementedError

    def __repr__(self) -> str:
        about = f"{len(self)} {self.inputs}s, {self.num_pids} pids, {len(set(self.camids))} cameras"
        return f"{type(self).__name__}({self.name!r}, {about})"


def _shared_zero() -> Tensor:
    return torch.zeros((), dtype=torch.int64).share_memory_()  # shared, so that persistent workers see set_epoch
