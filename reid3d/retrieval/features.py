"""Features of a split: what a model says of it, and all that retrieval reads.

A feature file is a safetensors file with the metadata {"format": "reid3d-features-1"} and the tensors feats (N, D)
float32, pids, camids and, where they are known, times (N,) int64, and text, uint8, the JSON of {"names", "source",
"split", "made_by"}: a header has not the room for millions of names, and its writer does not keep the order of several
strings.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader

from ..data.image_transforms import ImageEvalTransform
from ..data.transforms import EvalTransform
from ..io import atomic_write, write_safetensors
from ..progress import Progress

if TYPE_CHECKING:
    from ..data.split import Split

FORMAT = "reid3d-features-1"
_BLOCK = 2**20  # values looked at or written at once


@dataclass(frozen=True, eq=False)
class Features:
    """N feature vectors with the identities, cameras and names they belong to.

    feats: (N, D) float32, finite; `extract` gives unit length, and search and evaluate normalise anyhow.
    pids, camids: (N,) int64; pid -1 junk or unknown, 0 distractor; camid -1 unknown.
    names: N image names. times: (N,) int64, or None. source: folder of the clouds. split: name of the split there.
    made_by: the same for all features of the same weights, points and scales; "" unknown.

    feats may be a `np.memmap`, of a file larger than memory too. Its values are not looked at here, but by `search` and
    `evaluate` as they read them.

    Raises: TypeError for anything but NumPy arrays of these dtypes; ValueError for other shapes or non-finite values.
    """

    feats: np.ndarray
    pids: np.ndarray
    camids: np.ndarray
    names: list[str]
    times: np.ndarray | None = None
    source: str = ""
    split: str = ""
    made_by: str = ""

    def __post_init__(self) -> None:
        n = len(self.names)
        arrays = [("feats", "float32", 2), ("pids", "int64", 1), ("camids", "int64", 1)]
        for name, dtype, ndim in [*arrays, ("times", "int64", 1)] if self.times is not None else arrays:
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                raise TypeError(f"{name} must be a {dtype} NumPy array, got {getattr(array, 'dtype', type(array))}")
            if array.ndim != ndim or len(array) != n:
                shape = "(N,)" if ndim == 1 else "(N, D)"
                raise ValueError(f"{name} must have shape {shape} with N = {n} names, got {array.shape}")
        if not isinstance(self.feats, np.memmap):
            bad = [rows.start + i for rows in _blocks(self.feats) for i in _not_finite(self.feats[rows])]
            if bad:
                text = f"feats must be finite, got NaN or infinity for {len(bad)} of {n}: {self.names[bad[0]]}"
                raise ValueError(text)

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; equal features give equal bytes. Raises: OSError naming the file."""
        words = {"names": self.names, "source": self.source, "split": self.split, "made_by": self.made_by}
        tensors = {"feats": self.feats, "pids": self.pids, "camids": self.camids}
        if self.times is not None:
            tensors["times"] = self.times
        tensors = dict(sorted(tensors.items(), key=lambda pair: -pair[1].itemsize))  # each at a multiple of its size
        tensors["text"] = np.frombuffer(json.dumps(words).encode(), np.uint8)
        with atomic_write(path) as file:
            write_safetensors(file, tensors, {"format": FORMAT})

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False) -> Features:
        """Read what `save` wrote. mmap: leave feats in the file, as a read-only `np.memmap`, to search a gallery larger
        than memory; `save` replaces a file as a whole, so that a map of it stays as it was.

        Raises: FileNotFoundError; ValueError when it is another or a damaged file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such feature file: {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys() if not (mmap and name == "feats")}
            if mmap:
                tensors["feats"] = _mapped(path)
            return cls(**json.loads(tensors.pop("text").tobytes()), **tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a reid3d feature file: {error}") from error

    def subset(self, rows: Sequence[int] | np.ndarray) -> Features:
        """These of the features alone, in this order."""
        rows = np.asarray(rows, np.int64)
        return replace(
            self,
            feats=self.feats[rows],
            pids=self.pids[rows],
            camids=self.camids[rows],
            names=[self.names[i] for i in rows.tolist()],
            times=None if self.times is None else self.times[rows],
        )

    def export(self, path: str | Path) -> list[Path]:
        """Write the features for other tools, a block at a time; returns the files.

        NAME.npy is the array feats, and NAME.csv beside it has a line name,pid,camid,time for each of its rows.
        NAME.parquet is one table with the columns id (the row), name, pid, camid, time and vector, a list of D float32,
        and with made_by, source and split as its metadata. A time is empty, or null, where times are not known.

        Raises: ValueError for another ending, or a memory map with NaN or infinity; ImportError for .parquet without
            pyarrow; OSError naming the file.
        """
        path = Path(path)
        if path.suffix == ".npy":
            table = path.with_suffix(".csv")
            with atomic_write(path) as file, atomic_write(table) as lines:
                header = {"descr": "<f4", "fortran_order": False, "shape": self.feats.shape}
                np.lib.format.write_array_header_1_0(file, header)
                text = io.TextIOWrapper(lines, "utf-8", errors="surrogateescape", newline="", write_through=True)
                rows = csv.writer(text, lineterminator="\n")
                rows.writerow(["name", "pid", "camid", "time"])
                for block in _blocks(self.feats):
                    file.write(self.checked(block).astype("<f4", order="C", copy=False).data)
                    times = [""] * len(self.pids[block]) if self.times is None else self.times[block].tolist()
                    pids, camids = self.pids[block].tolist(), self.camids[block].tolist()
                    rows.writerows(zip(self.names[block], pids, camids, times, strict=True))
                text.detach()
            return [path, table]
        if path.suffix != ".parquet":
            raise ValueError(f"path must end in .npy or .parquet, got {path}")
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("a .parquet file needs pyarrow: pip install pyarrow") from error
        integers = [pa.field(name, pa.int64()) for name in ("pid", "camid", "time")]
        fields = [pa.field("id", pa.int64()), pa.field("name", pa.string()), *integers]
        words = {"made_by": self.made_by, "source": self.source, "split": self.split}
        schema = pa.schema([*fields, pa.field("vector", pa.list_(pa.float32()))], metadata=words)
        with atomic_write(path) as file, pq.ParquetWriter(file, schema) as writer:
            for block in _blocks(self.feats):
                part = self.checked(block)
                count = len(part)
                ends = np.arange(0, part.size + 1, max(1, part.shape[1]), dtype=np.int32)[: count + 1]
                columns = [
                    pa.array(np.arange(block.start, block.start + count)),
                    pa.array([name.encode("utf-8", "replace").decode() for name in self.names[block]], pa.string()),
                    pa.array(self.pids[block]),
                    pa.array(self.camids[block]),
                    pa.nulls(count, pa.int64()) if self.times is None else pa.array(self.times[block]),
                    pa.ListArray.from_arrays(pa.array(ends), pa.array(part.reshape(-1))),
                ]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        return [path]

    def checked(self, rows: slice | np.ndarray) -> np.ndarray:
        """feats[rows]; a memory map is not looked at before. Raises: ValueError for NaN or infinity."""
        part = self.feats[rows]
        if bad := _not_finite(part):
            raise ValueError(f"feats must be finite, got NaN or infinity for {self.names[rows][bad[0]]}")
        return part


def _blocks(feats: np.ndarray) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, feats.shape[1]))
    return (slice(start, start + step) for start in range(0, len(feats), step))


def _not_finite(feats: np.ndarray) -> list[int]:
    return np.flatnonzero(~np.isfinite(feats).all(axis=1)).tolist()


def _mapped(path: str | Path) -> np.ndarray:
    """feats of a safetensors file that can be opened as one, left in the file."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(length))["feats"]
    if about["dtype"] != "F32":
        raise TypeError(f"feats must be F32, got {about['dtype']}")
    shape = tuple(about["shape"])
    if not all(shape):  # nothing can be mapped
        return np.zeros(shape, np.float32)
    return np.memmap(path, "<f4", mode="r", offset=8 + length + about["data_offsets"][0], shape=shape)


def check_model(q: Features, g: Features) -> None:
    """Raises: ValueError for features that are known to be of two models."""
    if q.made_by and g.made_by and q.made_by != g.made_by:
        raise ValueError(f"q and g must be features of one model, got made_by {q.made_by} and {g.made_by}")


def extract(
    model: Any,
    split: Split,
    *,
    points: int | None = None,
    scales: Sequence[float] = (1.0, 1.1),
    batch: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Features:
    """The features of every cloud or crop of a split, in its order, as unit vectors: of a cloud along the sum over
    `scales` of model(scale * xyz, rgb), of a crop along model(image), or where the method has `flip` along the sum of
    the image's and its mirror image's.

    points: taken evenly from each cloud, without the background if the model's weights were trained so. None takes them
    as the split's transform says, and where none was chosen, as many as the model's weights were trained with. The
    default scales are those of the published OG-Net test code. Crops are resized to `model.size`. The model is used in
    eval mode and given back in the mode it came in; device None leaves it where it is, any other moves it there.

    Raises: ValueError for an empty split, points < 1, no scales, batch < 1, workers < 0, a model of clouds for a split
        of images or the other way round, or a model that returns NaN.
    Source: OG-Net (Zheng et al., TNNLS 2022), test_M.py of the published code.
    """
    image = split.inputs == "image"
    takes = getattr(model, "inputs", "cloud")
    if takes != split.inputs:
        raise ValueError(f"model must take {split.inputs}s, as {split.root} holds, got one that takes {takes}s")
    if not len(split):
        raise ValueError(f"split must not be empty, got {split.name!r} of {split.root} with no clouds")
    if not scales:
        raise ValueError("scales must not be empty")
    if batch < 1 or workers < 0:
        raise ValueError(f"batch must be at least 1 and workers at least 0, got {batch} and {workers}")
    if image and split.transform is None:
        split = split.with_transform(ImageEvalTransform(model.size[0], model.size[1], model.resample))
    if points is None and split.transform is None:
        points = getattr(model, "points", None)
    if points is not None and not image:
        if points < 1:
            raise ValueError(f"points must be at least 1, got {points}")
        split = split.with_transform(EvalTransform(points, getattr(model, "background", True)))
    if device is not None:
        model = model.to(device)
    where = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    loader = DataLoader(split, batch_size=batch, num_workers=workers, pin_memory=where.type == "cuda")
    feats: list[torch.Tensor] = []
    mode = model.training
    model.eval()
    try:
        with torch.inference_mode(), Progress(len(split), f"features of {split.name}", split.inputs, progress) as bar:
            for *parts, _, _ in loader:
                parts = [part.to(where, non_blocking=True) for part in parts]
                if image:
                    pixels = parts[0].float() / 255
                    total = model(pixels) + model(pixels.flip(3)) if model.flip else model(pixels)
                else:
                    total = torch.stack([model(scale * parts[0], parts[1]) for scale in scales]).sum(0)
                feats.append(nn.functional.normalize(total.float(), dim=1).cpu())
                bar.add(len(total))
    finally:
        model.train(mode)
    return Features(
        feats=torch.cat(feats).numpy(),
        pids=split.pids,
        camids=split.camids,
        names=[record.name for record in split.records],
        times=split.times,
        source=str(split.root),
        split=split.name,
        made_by=_made_by(
            model, list(model.size) if image else [points, getattr(model, "background", True), *map(float, scales)]
        ),
    )


def pair_scores(model: Any, q: Features, g: Features) -> np.ndarray | None:
    """(Q, G) float32 similarities by the matcher of a model that has one, as QAConv; None: features are compared."""
    return model.scores(q, g) if hasattr(model, "scores") else None


def _made_by(model: nn.Module, how: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps(how).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
