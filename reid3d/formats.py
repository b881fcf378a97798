"""Point clouds and meshes in the formats of others: PLY, the text clouds published with OG-Net, GLB, PyG's Data."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .cloud import PointCloud
from .io import Record, atomic_write
from .progress import Progress

if TYPE_CHECKING:
    from torch_geometric.data import Data


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
    if not found or len(lines) < 3 or lines[0] != ["ply"] or lines[1][0] != "format" or len(lines[1]) < 2:
        raise ValueError(f"{path}: not a PLY file with a whole header")
    if lines[1][1] not in orders:
        raise ValueError(f"{path}: format must be binary, got {lines[1][1]}")
    if lines[2][:2] != ["element", "vertex"] or len(lines[2]) != 3 or not re.fullmatch("[0-9]{1,18}", lines[2][2]):
        raise ValueError(f"{path}: the first element must be vertex and their number, got {' '.join(lines[2])[:80]}")
    fields: dict[str, str] = {}
    for words in lines[3:]:
        if words[0] != "property":
            break
        if len(words) != 3 or words[1] not in _PLY_KINDS:
            raise ValueError(f"{path}: unknown vertex property: {' '.join(words)}")
        if words[2] in fields:
            raise ValueError(f"{path}: vertex property {words[2]} comes twice")
        fields[words[2]] = orders[lines[1][1]] + _PLY_KINDS[words[1]]
    point, count = np.dtype(list(fields.items())), int(lines[2][2])
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
    if not any(map(str.strip, rows)):
        raise ValueError(f'{path}: no "v x y z r g b" lines')
    try:
        values = np.loadtxt(rows, dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if values.shape != (len(rows), 6) or not np.all(np.abs(values[:, 3:] - 0.5) <= 0.5):
        raise ValueError(f'{path}: "v" lines must hold x y z and three colours in 0..1')
    return _cloud(path, values[:, :3], np.rint(values[:, 3:] * 255), np.full(len(rows), -1))


def _cloud(path: str | Path, xyz: np.ndarray, rgb: np.ndarray, vertex: np.ndarray) -> PointCloud:
    strange = ~((vertex >= -1) & (vertex < 2**31) & (vertex == np.rint(vertex)))  # true for NaN
    if strange.any():
        raise ValueError(f"{path}: vertex must be a body vertex or -1 (background), got {vertex[strange][0]}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
        xyz = xyz.astype(np.float32)
    try:
        return PointCloud(xyz, rgb.astype(np.uint8), vertex.astype(np.int32))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_glb(path: str | Path, verts: np.ndarray, faces: np.ndarray, rgb: np.ndarray) -> None:
    """Write a mesh with vertex colours as binary glTF, by trimesh.

    verts (V, 3) float32 metres in the camera's frame, x right, y down, z away; the file has glTF's, y up and z towards
    the viewer, so that viewers show the person upright and from the camera's side. faces (F, 3) integers, at least one.
    rgb (V, 3) uint8.

    Raises: ImportError without trimesh; TypeError or ValueError for arrays of other kinds or shapes.
    """
    trimesh = _trimesh()
    for name, array, kind in (("verts", verts, np.float32), ("faces", faces, np.integer), ("rgb", rgb, np.uint8)):
        if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, kind):
            found = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"{name} must be a NumPy array of {kind.__name__}, got {found}")
        if array.ndim != 2 or array.shape[1] != 3:
            raise ValueError(f"{name} must have shape (N, 3), got {array.shape}")
    if len(rgb) != len(verts) or not np.isfinite(verts).all():
        raise ValueError(f"verts must be finite and as many as rgb, {len(rgb)}, got {len(verts)}")
    if not len(faces):
        raise ValueError("faces must hold at least one triangle, got none")
    if not 0 <= faces.min() <= faces.max() < len(verts):
        raise ValueError(f"faces must hold indices between 0 and {len(verts) - 1}, got {faces.min()} to {faces.max()}")
    mesh = trimesh.Trimesh(verts * _GLTF, faces, vertex_colors=rgb, process=False)
    with atomic_write(path) as file:
        file.write(mesh.export(file_type="glb"))


def read_glb(path: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mesh that `write_glb` wrote: verts, faces int64, rgb, in the camera's frame.

    Raises: ImportError without trimesh; OSError; ValueError naming the file when it holds no one mesh with vertex
        colours.
    """
    trimesh = _trimesh()
    data = Path(path).read_bytes()
    try:
        mesh = trimesh.load(io.BytesIO(data), file_type="glb", force="mesh", process=False)
        verts, faces = np.asarray(mesh.vertices, np.float32) * _GLTF, np.asarray(mesh.faces, np.int64)
        colours = np.array(mesh.visual.vertex_colors[:, :3])
    except Exception as error:  # trimesh raises almost anything on broken bytes
        raise ValueError(f"{path}: not a GLB mesh: {' '.join(str(error).split())}") from error
    if not len(faces) or not np.isfinite(verts).all() or mesh.visual.kind != "vertex":
        raise ValueError(f"{path}: must hold a mesh of finite vertices with colours")
    if not 0 <= faces.min() <= faces.max() < len(verts):
        raise ValueError(f"{path}: faces must hold indices between 0 and {len(verts) - 1}, got {faces.max()}")
    return verts, faces, colours


_GLTF = np.array([1, -1, -1], np.float32)  # from the camera's frame and back: half a turn about x


def _trimesh() -> Any:
    try:
        import trimesh
    except ModuleNotFoundError as error:
        raise ImportError("GLB needs trimesh: pip install trimesh") from error
    return trimesh


def to_pyg(cloud: PointCloud) -> Data:
    """A cloud as torch_geometric's Data: pos (N, 3) float32 metres, x (N, 3) float32 colours 0..1, vertex (N,) int64.

    Raises: ImportError without torch_geometric.
    """
    data, torch = _pyg()
    return data(
        x=torch.from_numpy(cloud.rgb.astype(np.float32) / 255),
        pos=torch.from_numpy(cloud.xyz.copy()),
        vertex=torch.from_numpy(cloud.vertex.astype(np.int64)),
    )


def from_pyg(data: Data) -> PointCloud:
    """The cloud that `to_pyg` made the Data of. Points of Data without `vertex` are background (-1).

    Raises: TypeError for anything but tensors; ValueError for Data without pos or x, or values that no cloud can have.
    """
    from torch import Tensor

    parts = {name: part for name in ("pos", "x", "vertex") if (part := getattr(data, name, None)) is not None}
    if missing := {"pos", "x"} - set(parts):
        raise ValueError(f"data must have {' and '.join(sorted(missing))}, got {sorted(data.keys())}")
    for name, part in parts.items():
        if not isinstance(part, Tensor):
            raise TypeError(f"data.{name} must be a torch.Tensor, got {type(part).__name__}")
    xyz, colours = (parts[name].detach().cpu().float().numpy() for name in ("pos", "x"))
    if not np.all(np.abs(colours - 0.5) <= 0.5):
        raise ValueError("data.x must hold colours in 0..1")
    vertex = parts["vertex"].detach().cpu().numpy() if "vertex" in parts else np.full(xyz.shape[:1], -1)
    return _cloud("data", xyz, np.rint(colours * 255), vertex)


def _pyg() -> Any:
    try:
        import torch
        from torch_geometric.data import Data
    except ModuleNotFoundError as error:
        raise ImportError("PyG's Data needs torch_geometric: pip install torch_geometric") from error
    return Data, torch


WRITERS: dict[str, Callable[[Path, PointCloud], None]] = {"obj": write_obj, "ply": write_ply}
FOLDERS = {"train": "train_all", "query": "query", "gallery": "gallery", "all": "all"}  # as published


def export_tree(data: str | Path, out: str | Path, *, format: Literal["obj", "ply"], progress: bool = True) -> int:
    """Write every cloud of a folder of shards as a file of its own; returns how many were not there yet.

    In the tree of the published 3DMarket+bg: OUT/train_all|query|gallery/PID/IMAGE.jpg.obj; clouds without a split as
    OUT/all/IMAGE.jpg.obj. Files that are there stay as they are, so that a stopped export is finished by the same call.

    Raises: as `reid3d.data.open_dataset`; ValueError for another format, two clouds of one name, or one whose name
        leads out of OUT.
    """
    from .data import open_clouds

    if format not in WRITERS:
        raise ValueError(f"format must be one of {', '.join(WRITERS)}, got {format!r}")
    dataset = open_clouds(data)
    splits = [split for split in (dataset.train, dataset.query, dataset.gallery, dataset.all) if len(split)]
    paths = {(split.name, i): Path(out) / _place(r, format) for split in splits for i, r in enumerate(split.records)}
    if twice := [path for path, count in Counter(paths.values()).items() if count > 1]:
        raise ValueError(f"data holds two clouds that would both be {twice[0]}")
    written = 0
    with Progress(len(paths), "export", "cloud", progress) as bar:
        for split in splits:
            for i in range(len(split)):
                path = paths[split.name, i]
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    WRITERS[format](path, split.cloud(i))
                    written += 1
                bar.add(1)
    return written


def _place(record: Record, format: str) -> Path:
    name = Path(f"{record.name.removesuffix('.obj')}.{format}")  # a cloud read from such a tree is named so already
    if record.split != "all":
        pid = "-1" if record.pid < 0 else f"{record.pid:04d}"
        return Path(FOLDERS[record.split], pid, name.name)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"data names a cloud outside its folder: {record.name!r}")
    return Path(FOLDERS["all"], name)
