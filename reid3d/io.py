"""Files of point clouds: shard v1 (what reid3d itself uses), PLY, and the text clouds published with OG-Net.

A shard is two files side by side. NAME.safetensors holds the points of all clouds end to end in four tensors, xyz
(P, 3) float16 or float32, rgb (P, 3) uint8, vertex (P,) int32 and offsets (clouds + 1,) int64, so that cloud i is the
rows offsets[i]:offsets[i + 1]; its metadata strings are "format" ("reid3d-shard-1"), "config" (JSON), "versions" (JSON)
and "license". NAME.jsonl holds one JSON object a cloud, a `Record`, in the same order. The manifest is written last, so
a shard exists exactly when its manifest does.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from .cloud import PointCloud

SHARD_FORMAT = "reid3d-shard-1"
DATASET_FILE = "dataset.json"  # beside the shards of a converted folder: {"shards": {split: count}, ...}
LICENSE_NOTE = "Derived from the source images: their licence and terms of use apply to this file."
_TENSORS = {"xyz": ("F16", "F32"), "rgb": ("U8",), "vertex": ("I32",), "offsets": ("I64",)}


@dataclass(frozen=True)
class Record:
    """What is known of one cloud: one JSON line of a shard's manifest.

    name: path of the image relative to the source folder, "/"-separated. split: "train", "query", "gallery", or "all"
    (a folder without splits). pid: person, 0 distractor, -1 junk or unknown. camid: camera as in the file name, from 1;
    -1 unknown. time: see `reid3d.data.list_images`; -1 unknown. size: crop (H, W) in pixels; the cloud has H*W points.
    cam: weak perspective [s, tx, ty] of the crop: a point (X, Y, Z) in metres projects to pixel
    x = (s*(X+tx)*H + W)/2, y = (s*(Y+ty)*H + H)/2, pixel centres at +0.5. quality: numbers on the fit, such as
    {"visible": share of the body's vertices that were seen}.
    """

    name: str
    split: str
    pid: int
    camid: int
    time: int
    size: tuple[int, int]
    cam: tuple[float, float, float]
    quality: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Raises: ValueError when the line is not the JSON of a record."""
        try:
            values = json.loads(line)
            for name, kind in (("name", str), ("split", str), ("pid", int), ("camid", int), ("time", int)):
                if not isinstance(values[name], kind):
                    raise TypeError(f"{name} must be {kind.__name__}, got {values[name]!r}")
            values["size"] = _numbers(values["size"], int, 2)
            values["cam"] = _numbers(values["cam"], float, 3)
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a manifest record ({error}): {line.strip()[:80]!r}") from error


def _numbers(values: Sequence[Any], kind: type, count: int) -> tuple[Any, ...]:
    if len(values) != count:
        raise ValueError(f"{count} numbers expected, got {values}")
    return tuple(kind(value) for value in values)


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
def hold_folder(folder: str | Path, other: str) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it however the process ends.

    Raises: BlockingIOError, saying that `other` ("another conversion") is writing there, when a process holds it.
    """
    with open(Path(folder) / ".lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    dtype: Literal["float16", "float32"] = "float16",
    license: str = LICENSE_NOTE,
) -> None:
    """Write clouds and their records as the shard `path` (.safetensors) with its manifest (.jsonl).

    The same arguments give the same bytes. float16 rounds a coordinate x by at most |x| * 2**-11, that is 0.5 mm within
    2 m of the origin (and below 2**-25 m next to it); float32 is exact. A shard already there is replaced. An empty
    sequence makes an empty shard.

    Raises: ValueError for a name without .safetensors, another dtype, as many records as clouds not given, a cloud
        without exactly size[0]*size[1] points, or coordinates that float16 cannot hold; OSError naming the file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype must be float16 or float32, got {dtype!r}")
    if len(clouds) != len(records):
        raise ValueError(f"records must be as many as clouds ({len(clouds)}), got {len(records)}")
    for cloud, record in zip(clouds, records, strict=True):
        height, width = record.size
        if len(cloud) != height * width or len(cloud) == 0:
            raise ValueError(f"clouds: {record.name} must have {height} x {width} points, got {len(cloud)}")
        if dtype == "float16" and np.abs(cloud.xyz).max() > np.finfo(np.float16).max:
            raise ValueError(f"clouds: {record.name} has coordinates beyond float16's 65504 m; write float32")
    tensors = {  # widest type first, so that every tensor starts at a multiple of its item size
        "offsets": np.cumsum([0, *map(len, clouds)], dtype=np.int64),
        "vertex": np.concatenate([np.empty(0, np.int32), *(cloud.vertex for cloud in clouds)]),
        "xyz": np.concatenate([np.empty((0, 3), dtype), *(cloud.xyz.astype(dtype) for cloud in clouds)]),
        "rgb": np.concatenate([np.empty((0, 3), np.uint8), *(cloud.rgb for cloud in clouds)]),
    }
    metadata = {
        "format": SHARD_FORMAT,
        "config": json.dumps(config, sort_keys=True),
        "versions": json.dumps({name: library_version(name) for name in ("reid3d", "numpy", "python")}),
        "license": license,
    }
    manifest = manifest_path(path)
    if path.exists():  # first, so that new points never stand beside an old manifest
        manifest.unlink(missing_ok=True)
    with atomic_write(path) as file:
        _write_safetensors(file, tensors, metadata)
    with atomic_write(manifest) as file:
        file.writelines(f"{record.to_json()}\n".encode() for record in records)


def library_version(name: str) -> str:
    """Version of an installed distribution or of "python"; "unknown" for reid3d run from a source tree."""
    if name == "python":
        return platform.python_version()
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _write_safetensors(file: IO[bytes], tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """safetensors' own writer shuffles the metadata, and the same clouds must give the same bytes."""
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
        file.write(array.astype(array.dtype.newbyteorder("<"), order="C", copy=False).data)


class Shard:
    """Random access to the clouds of one shard; only the points asked for are read.

    `len(shard)`, `shard[i]` -> PointCloud (xyz as float32), `shard.records`, `shard.metadata` (dict of strings). The
    data file is opened at first use in each process, so a shard can be pickled and shared with DataLoader workers.

    Raises: FileNotFoundError when the manifest or the data is missing (a shard without a manifest was never finished);
        ValueError naming the file when either is truncated, corrupt or not of this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: tuple[int, Any] | None = None
        self.records = _read_manifest(manifest_path(self.path))
        self.metadata: dict[str, str] = self._open().metadata() or {}
        self._offsets = self._check()

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
        if set(file.keys()) != set(_TENSORS):
            raise ValueError(f"{self.path}: tensors must be {sorted(_TENSORS)}, got {sorted(file.keys())}")
        offsets = file.get_tensor("offsets")
        total = int(offsets[-1]) if offsets.ndim == 1 and len(offsets) else -1
        shapes = {"xyz": [total, 3], "rgb": [total, 3], "vertex": [total], "offsets": [len(self.records) + 1]}
        for name, kinds in _TENSORS.items():
            tensor = file.get_slice(name)
            if tensor.get_dtype() not in kinds or tensor.get_shape() != shapes[name]:
                found = f"{tensor.get_dtype()} {tensor.get_shape()}"
                raise ValueError(f"{self.path}: {name} must be {' or '.join(kinds)} {shapes[name]}, got {found}")
        points = [record.size[0] * record.size[1] for record in self.records]
        if offsets[0] != 0 or not np.array_equal(np.diff(offsets), points):
            raise ValueError(f"{self.path}: offsets must agree with the crop sizes of the manifest beside it")
        return offsets


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


_COLOURS = ("red", "green", "blue")
_PLY_POINT = np.dtype([*((name, "<f4") for name in "xyz"), *((name, "u1") for name in _COLOURS), ("vertex", "<i4")])
_PLY_KINDS = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4", "float32": "f4"},
    **{"double": "f8", "float64": "f8"},
}


def write_ply(path: str | Path, cloud: PointCloud) -> None:
    """Write a cloud as binary little-endian PLY: x y z (float), red green blue (uchar), vertex (int). Lossless."""
    points = np.empty(len(cloud), _PLY_POINT)
    columns = [*cloud.xyz.T, *cloud.rgb.T, cloud.vertex]
    for name, column in zip(_PLY_POINT.names or (), columns, strict=True):
        points[name] = column
    kinds = {"<f4": "float", "|u1": "uchar", "<i4": "int"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(cloud)}"]
    header += [f"property {kinds[point[1]]} {point[0]}" for point in _PLY_POINT.descr]
    with atomic_write(path) as file:
        file.write("\n".join([*header, "end_header\n"]).encode() + points.tobytes())


def read_ply(path: str | Path) -> PointCloud:
    """Read a cloud from a binary PLY file of either byte order; other properties and elements are left out.

    Colours must be uchar. Points without a "vertex" property are background (-1).

    Raises: ValueError naming the file when it is truncated, ASCII or not such a PLY.
    """
    data = Path(path).read_bytes()
    head, found, body = data.partition(b"end_header\n")
    lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
    lines = [words for words in lines if words and words[0] not in ("comment", "obj_info")]
    orders = {"binary_little_endian": "<", "binary_big_endian": ">"}
    if not found or len(lines) < 3 or lines[0] != ["ply"] or lines[1][0] != "format":
        raise ValueError(f"{path}: not a PLY file with a whole header")
    if lines[1][1] not in orders:
        raise ValueError(f"{path}: format must be binary, got {lines[1][1]}")
    if lines[2][:2] != ["element", "vertex"] or len(lines[2]) != 3 or not lines[2][2].isdigit():
        raise ValueError(f"{path}: the first element must be vertex, got {' '.join(lines[2])}")
    fields = []
    for words in lines[3:]:
        if words[0] != "property":
            break
        if len(words) != 3 or words[1] not in _PLY_KINDS:
            raise ValueError(f"{path}: unknown vertex property: {' '.join(words)}")
        fields.append((words[2], orders[lines[1][1]] + _PLY_KINDS[words[1]]))
    point, count = np.dtype(fields), int(lines[2][2])
    if missing := {"x", "y", "z", *_COLOURS} - set(point.names or ()):
        raise ValueError(f"{path}: vertex properties missing: {sorted(missing)}")
    if len(body) < count * point.itemsize:
        raise ValueError(f"{path}: truncated: {count} points need {count * point.itemsize} bytes, got {len(body)}")
    points = np.frombuffer(body, point, count)
    if any(points[name].dtype != np.uint8 for name in _COLOURS):
        raise ValueError(f"{path}: red, green and blue must be uchar")
    vertex = points["vertex"] if "vertex" in (point.names or ()) else np.full(count, -1)
    xyz, rgb = (np.stack([points[name] for name in names], axis=1) for names in ("xyz", _COLOURS))
    return _cloud(path, xyz, rgb, vertex)


def write_obj(path: str | Path, cloud: PointCloud) -> None:
    """Write a cloud as the text files published with OG-Net: "v x y z r g b" lines, six decimals, colours in 0..1.

    Body points come first in vertex order, then the background in the cloud's order; vertex numbers are lost. The one
    face line at the end is a dummy, there so that mesh readers accept the file.

    Source: the 3DMarket+bg files of github.com/layumi/person-reid-3d.
    """
    order = np.lexsort([cloud.vertex, cloud.vertex < 0])
    rows = np.concatenate([cloud.xyz[order], cloud.rgb[order] / 255], axis=1)
    with atomic_write(path) as file:
        file.writelines(b"v %f %f %f %f %f %f\n" % tuple(row) for row in rows.tolist())
        file.write(b"f 1 2 3\n")


def read_obj(path: str | Path) -> PointCloud:
    """Read a cloud from a published OG-Net text file; all else than "v" lines is left out.

    Such a file does not say which body vertex a point is, nor which points are background: `vertex` is -1 throughout.

    Raises: ValueError naming the file when it has no "v" lines or one without six numbers in range.
    """
    lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    rows = [line[2:] for line in lines if line.startswith("v ")]
    if not rows:
        raise ValueError(f'{path}: no "v x y z r g b" lines')
    try:
        values = np.loadtxt(rows, dtype=np.float64, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if values.shape[1] != 6 or not np.all(np.abs(values[:, 3:] - 0.5) <= 0.5):
        raise ValueError(f'{path}: "v" lines must hold x y z and three colours in 0..1')
    return _cloud(path, values[:, :3], np.rint(values[:, 3:] * 255), np.full(len(rows), -1))


def _cloud(path: str | Path, xyz: np.ndarray, rgb: np.ndarray, vertex: np.ndarray) -> PointCloud:
    try:
        return PointCloud(xyz.astype(np.float32), rgb.astype(np.uint8), vertex.astype(np.int32))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
