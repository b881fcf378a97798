"""Shards of point clouds, the files that reid3d itself uses. Those of others are in formats.py.

A shard is two files side by side. NAME.safetensors holds the points of all clouds end to end in four tensors, xyz
(P, 3) float16 or float32, rgb (P, 3) uint8, vertex (P,) int32 and offsets (clouds + 1,) int64, so that cloud i is the
rows offsets[i]:offsets[i + 1]; pose (clouds, 24, 3) float32, axis-angle in radians, and betas (clouds, K) float32 may
follow, the bodies that were fitted. Its metadata strings are "format" ("reid3d-shard-1"), "config" (JSON), "failures"
(JSON: name to reason, of the crops that gave no cloud), "versions" (JSON), "license", and "sha256" of what comes after
the header and of the manifest. NAME.jsonl holds one JSON object a cloud, a `Record`, in the same order. The manifest is
written last, so a shard exists exactly when its manifest does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from .cloud import PointCloud

SHARD_FORMAT = "reid3d-shard-1"
DATASET_FILE = "dataset.json"  # beside the shards of a converted folder: {"shards": {split: count}, ...}
FAILURES_FILE = "failures.jsonl"  # {name, reason} of what gave no cloud
LICENSE_NOTE = "Derived from the source images: their licence and terms of use apply to this file."
_TENSORS = {"xyz": ("F16", "F32"), "rgb": ("U8",), "vertex": ("I32",), "offsets": ("I64",)}
_BODIES: dict[str, list[int | None]] = {"pose": [24, 3], "betas": [None]}  # as many as the body has


@dataclass(frozen=True)
class Record:
    """What is known of one cloud: one JSON line of a shard's manifest.

    name: path of the image relative to the source folder, "/"-separated. split: "train", "query", "gallery", or "all"
    (a folder without splits). pid: person, 0 distractor, -1 junk or unknown. camid: camera as in the file name, from 1;
    -1 unknown. time: see `reid3d.data.list_images`; -1 unknown. size: crop (H, W) in pixels; the cloud has H*W points.
    cam: weak perspective [s, tx, ty] of the crop: a point (X, Y, Z) in metres projects to pixel
    x = (s*(X+tx)/aspect + 1)*W/2, y = (s*(Y+ty) + 1)*H/2, pixel centres at +0.5. quality: numbers on the fit, such as
    {"visible": share of the body's vertices that were seen}. aspect: width/height of the source image before it was
    resampled to H x W pixels; None for W/H. fit: which fitter the body came from, "mean" for the upright body of a crop
    that was not fitted with confidence. points: of the cloud; None for H*W.
    """

    name: str
    split: str
    pid: int
    camid: int
    time: int
    size: tuple[int, int]
    cam: tuple[float, float, float]
    quality: dict[str, float] = field(default_factory=dict)
    aspect: float | None = None
    fit: str = "default"
    points: int | None = None

    @property
    def num_points(self) -> int:
        return self.size[0] * self.size[1] if self.points is None else self.points

    def project(self, xyz: np.ndarray) -> np.ndarray:
        """Where points (N, 3) of the cloud's frame are in the crop: (N, 2) float64, x and y in pixels, also outside."""
        (height, width), (s, tx, ty) = self.size, self.cam
        scale = np.array([s / (self.aspect or width / height), s])
        return ((xyz[:, :2] + np.array([tx, ty])) * scale + 1) * np.array([width, height]) / 2

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Raises: ValueError when the line is not the JSON of a record."""
        try:
            values = json.loads(line)
            values["size"], values["cam"] = tuple(values["size"]), tuple(values["cam"])
            record = cls(**values)
            record._check()
            return record
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a manifest record ({error}): {line.strip()[:80]!r}") from error

    def _check(self) -> None:
        def number(value: Any, kind: type = float) -> bool:
            fits = type(value) is int or type(value) is kind
            return fits and -(2**63) < value < 2**63  # a NaN is not

        rules = {
            "name": isinstance(self.name, str),
            "split": isinstance(self.split, str),
            "pid": number(self.pid, int),
            "camid": number(self.camid, int),
            "time": number(self.time, int),
            "size": len(self.size) == 2 and all(number(side, int) and side > 0 for side in self.size),
            "cam": len(self.cam) == 3 and all(map(number, self.cam)),
            "quality": isinstance(self.quality, dict) and all(map(number, self.quality.values())),
            "aspect": self.aspect is None or (number(self.aspect) and self.aspect > 0),
            "fit": isinstance(self.fit, str),
            "points": self.points is None or (number(self.points, int) and self.points > 0),
        }
        for name, holds in rules.items():
            if not holds:
                raise ValueError(f"{name} cannot be {getattr(self, name)!r}")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` whole or not at all, with what it replaces kept until then.

    A link stays, and what it points to is replaced; a device or a pipe stays too, and is written to as it is.

    Raises: OSError naming `path` (full or read-only disk, no such folder).
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                yield file
        else:
            with _replacement(Path(os.path.realpath(path))) as file:
                yield file
    except OSError as error:
        if error.errno:  # a failed write() does not know the file's name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def _replacement(path: Path) -> Iterator[IO[bytes]]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # it may never have been made
            temporary.unlink()
        raise


@contextmanager
def hold_folder(
    folder: str | Path, other: str, *, name: str = ".lock", shared: bool = False, wait: bool = False
) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it however the process ends.

    name: of the lock, where the folder has several. shared: beside others that share it. wait: until it is free.

    Raises: BlockingIOError, saying that `other` ("another conversion") is writing there, when a process holds it.
    """
    with open(Path(folder) / name, "ab") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BlockingIOError(f"{other} is writing into {folder}") from None
        yield


def manifest_path(path: str | Path) -> Path:
    """The .jsonl manifest of the shard PATH.safetensors."""
    return Path(path).with_suffix(".jsonl")


def write_shard(
    path: str | Path,
    clouds: Sequence[PointCloud],
    records: Sequence[Record],
    *,
    config: dict[str, Any],
    bodies: Mapping[str, np.ndarray] | None = None,
    failures: Mapping[str, str] | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    license: str = LICENSE_NOTE,
) -> None:
    """Write clouds and their records as the shard `path` (.safetensors) with its manifest (.jsonl).

    bodies: {"pose": (n, 24, 3), "betas": (n, K)} float32 of the n clouds, where they are known. failures: what gave no
    cloud.

    The same arguments give the same bytes. float16 rounds a coordinate x by at most |x| * 2**-11, that is 0.5 mm within
    2 m of the origin (and below 2**-25 m next to it); float32 is exact. A shard already there is replaced. An empty
    sequence makes an empty shard.

    Raises: ValueError for a name without .safetensors, another dtype, as many records as clouds not given, bodies of
        other shapes, a cloud without exactly the points of its record, or coordinates that float16 cannot hold; OSError
        naming the file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be float16 or float32, got {dtype!r}")
    if len(clouds) != len(records):
        raise ValueError(f"records must be as many as clouds ({len(clouds)}), got {len(records)}")
    for cloud, record in zip(clouds, records, strict=True):
        if len(cloud) != record.num_points or len(cloud) == 0:
            rule = "{} x {} points".format(*record.size) if record.points is None else f"{record.points} points"
            raise ValueError(f"clouds: {record.name} must have {rule}, got {len(cloud)}")
        if dtype == "float16" and np.abs(cloud.xyz).max() > np.finfo(np.float16).max:
            raise ValueError(f"clouds: {record.name} has coordinates beyond float16's 65504 m; write float32")
    for name, array in (bodies or {}).items():
        wanted = [len(clouds), *_BODIES[name]]
        if array.dtype != np.float32 or not _has_shape(list(array.shape), wanted):
            raise ValueError(f"bodies: {name} must be float32 {tuple(wanted)}, got {array.dtype} {array.shape}")
    tensors = {  # widest type first, so that every tensor starts at a multiple of its item size
        "offsets": np.cumsum([0, *map(len, clouds)], dtype=np.int64),
        **(bodies or {}),
        "vertex": np.concatenate([np.empty(0, np.int32), *(cloud.vertex for cloud in clouds)]),
        "xyz": np.concatenate([np.empty((0, 3), dtype), *(cloud.xyz for cloud in clouds)], dtype=dtype),
        "rgb": np.concatenate([np.empty((0, 3), np.uint8), *(cloud.rgb for cloud in clouds)]),
    }
    lines = [f"{record.to_json()}\n".encode() for record in records]
    metadata = {
        "format": SHARD_FORMAT,
        "config": json.dumps(config, sort_keys=True),
        "failures": json.dumps(dict(failures or {}), sort_keys=True),
        "versions": json.dumps({name: library_version(name) for name in ("reid3d", "numpy", "python")}),
        "license": license,
        "sha256": _sha256([_little_endian(array) for array in tensors.values()], lines),
    }
    manifest = manifest_path(path)
    if path.exists():  # first, so that new points never stand beside an old manifest
        manifest.unlink(missing_ok=True)
    with atomic_write(path) as file:
        write_safetensors(file, tensors, metadata)
    with atomic_write(manifest) as file:
        file.writelines(lines)


def _has_shape(shape: list[int], wanted: list[int | None]) -> bool:
    return len(shape) == len(wanted) and all(b is None or a == b for a, b in zip(shape, wanted, strict=True))


def _sha256(*parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for data in part:
            digest.update(data)
    return digest.hexdigest()


def _little_endian(array: np.ndarray) -> memoryview:
    return array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).data


def library_version(name: str) -> str:
    """Version of an installed distribution or of "python"; "unknown" for reid3d run from a source tree."""
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def write_safetensors(file: IO[bytes], tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write arrays one after the other, in their order, with no copy of those that are contiguous.

    safetensors' own writer shuffles the metadata, and the same clouds must give the same bytes.
    """
    kinds = {"float16": "F16", "float32": "F32", "uint8": "U8", "int32": "I32", "int64": "I64"}
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, array in tensors.items():
        end = start + array.nbytes
        header[name] = {"dtype": kinds[str(array.dtype)], "shape": array.shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for array in tensors.values():
        file.write(_little_endian(array))


class Shard:
    """Random access to the clouds of one shard; only the points asked for are read.

    `len(shard)`, `shard[i]` -> PointCloud (xyz as float32), `shard.records`, `shard.config` and `shard.failures` (see
    `write_shard`), `shard.metadata` (dict of strings). The data file is opened at first use in each process, so a shard
    can be pickled and shared with DataLoader workers.

    Raises: FileNotFoundError when the manifest or the data is missing (a shard without a manifest was never finished);
        ValueError naming the file when either is truncated, corrupt or not of this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: tuple[int, Any] | None = None
        self.records = _read_manifest(manifest_path(self.path))
        self.metadata: dict[str, str] = self._open().metadata() or {}
        self._offsets = self._check()
        self.config: dict[str, Any] = self._note("config")
        self.failures: dict[str, str] = self._note("failures")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> PointCloud:
        if not -len(self) <= i < len(self):
            raise IndexError(f"i must be in [-{len(self)}, {len(self)}), got {i}")
        start, stop = (int(end) for end in self._offsets[i % len(self) :][:2])
        xyz, rgb, vertex = (self._open().get_slice(name)[start:stop] for name in ("xyz", "rgb", "vertex"))
        try:
            return PointCloud(xyz.astype(np.float32), rgb.copy(), vertex.copy())  # the slices are views of the file
        except ValueError as error:
            raise ValueError(f"{self.path}: cloud {i} is corrupt: {error}") from error

    def body(self, i: int) -> dict[str, np.ndarray]:
        """The body fitted to crop i: {"pose": (24, 3), "betas": (K,)} float32, {} where the shard holds none."""
        return {name: self._open().get_slice(name)[i % len(self)] for name in self._bodies}

    def verify(self) -> None:
        """Read everything. Raises: ValueError naming the file when a byte is not what was written."""
        with open(self.path, "rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            parts = iter(lambda: file.read(1 << 20), b"")
            found = _sha256(parts, [manifest_path(self.path).read_bytes()])
        if found != self.metadata.get("sha256"):
            raise ValueError(f"{self.path}: sha256 must be {self.metadata.get('sha256')}, got {found}")
        for i in range(len(self)):
            self[i]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _open(self) -> Any:
        if self._file is None or self._file[0] != os.getpid():
            try:
                self._file = (os.getpid(), safe_open(self.path, framework="numpy"))
            except SafetensorError as error:
                raise ValueError(f"{self.path}: not a whole safetensors file: {error}") from error
        return self._file[1]

    def _check(self) -> np.ndarray:
        file = self._open()
        if self.metadata.get("format") != SHARD_FORMAT:
            raise ValueError(f"{self.path}: format must be {SHARD_FORMAT}, got {self.metadata.get('format')!r}")
        self._bodies = sorted(_BODIES) if set(_BODIES) <= set(file.keys()) else []
        if set(file.keys()) != {*_TENSORS, *self._bodies}:
            raise ValueError(f"{self.path}: tensors must be {sorted(_TENSORS)}, got {sorted(file.keys())}")
        offsets = file.get_tensor("offsets")
        total = int(offsets[-1]) if offsets.ndim == 1 and len(offsets) else -1
        shapes: dict[str, list[int | None]] = {
            "xyz": [total, 3],
            "rgb": [total, 3],
            "vertex": [total],
            "offsets": [len(self.records) + 1],
        }
        shapes |= {name: [len(self.records), *_BODIES[name]] for name in self._bodies}
        for name, kinds in {**_TENSORS, **dict.fromkeys(self._bodies, ("F32",))}.items():
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in kinds or not _has_shape(tensor.get_shape(), shapes[name]):
                found = f"{tensor.get_dtype()} {tensor.get_shape()}"
                raise ValueError(f"{self.path}: {name} must be {' or '.join(kinds)} {shapes[name]}, got {found}")
        if offsets[0] != 0 or not np.array_equal(np.diff(offsets), [record.num_points for record in self.records]):
            raise ValueError(f"{self.path}: offsets must agree with the crop sizes of the manifest beside it")
        return offsets

    def _note(self, name: str) -> dict[str, Any]:
        try:
            note = json.loads(self.metadata.get(name, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: {name} is no JSON: {error}") from error
        if not isinstance(note, dict):
            raise ValueError(f"{self.path}: {name} must be a JSON object, got {note!r}")
        return note


def _read_manifest(path: Path) -> list[Record]:
    records = []
    try:
        text = path.read_bytes().decode("ascii")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a manifest: {error}") from error
    if text and not text.endswith("\n"):
        raise ValueError(f"{path}: the last line is cut off")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            records.append(Record.from_json(line))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return records
