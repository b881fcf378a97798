"""Ranked matches in an Open3D window, or as a picture of it that needs no display: the query and what was found for it,
standing side by side.

Open3D is asked for only here, in a process of its own first: where a driver is missing it ends the process that asks.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..cloud import PointCloud
from ..data import CloudDataset
from ..doctor import why_no_open3d
from ..io import Record, atomic_write
from ..retrieval import Ranks
from .html import _Source

SPACING = 1.3  # metres from one to the next
PLATE, GROUND = (0.42, 0.3), 0.02  # half a plate's width and depth, and how far below the feet it lies
VERDICTS = {"query": (70, 110, 190), "right": (46, 160, 67), "wrong": (207, 34, 46), "unknown": (150, 150, 150)}
EMBEDDED = "embedded-"  # what the names of such bodies begin with
STEP = 10.0  # degrees of a key
SKIN = (166, 189, 219)
WIDE = 12.0  # degrees the camera sees from top to bottom
KEYS = "N, P: next, previous query · left, right: turn all · B: background · M: fitted bodies · H: these keys · Q: quit"
# What opens the display that the environment names, and closes it.
DISPLAYS = {
    "DISPLAY": ("libX11.so.6", "XOpenDisplay", "XCloseDisplay"),
    "WAYLAND_DISPLAY": ("libwayland-client.so.0", "wl_display_connect", "wl_display_disconnect"),
}


class Mesh(NamedTuple):
    """verts: (V, 3) float64 metres, y up. faces: (F, 3) int32. rgb: uint8, of all. lit: or all of that very colour."""

    verts: np.ndarray
    faces: np.ndarray
    rgb: tuple[int, int, int]
    lit: bool = True


class Standing(NamedTuple):
    """One of the clouds: what it is, and where it stands. cloud: as it was read. fit: name of the body model, and
    its pose and betas, {} where they were not kept. foot: (3,), of its frame, the middle of the body on the ground.
    verdict: of VERDICTS. title: in words.
    """

    cloud: PointCloud
    record: Record
    fit: tuple[str, dict[str, np.ndarray]]
    foot: np.ndarray
    verdict: str
    title: str

    @property
    def body(self) -> np.ndarray:
        """(N,) what is not background; all where nothing is known."""
        body = self.cloud.vertex >= 0
        return body if body.any() else ~body


@dataclass(frozen=True)
class Scene:
    """A query and its k best matches, from left to right, `SPACING` apart on a ground at height 0; x right, y up, z
    towards the eye, metres.

    ranks: as `reid3d.view` takes them; the clouds are read from `dataset`, or from the folder the features came from.
    query: row of it. degrees: by which each is turned about the vertical through the middle of its body. background:
    whether that is shown. mesh: whether the fitted bodies are, in place of their points.

    Raises: ValueError when there are no queries, query or k is out of range, the data set holds crops or lacks a cloud,
        or mesh is asked for of clouds that came without bodies, or with those of a model that is not embedded here.
    """

    ranks: Ranks
    dataset: CloudDataset | None = None
    query: int = 0
    k: int = 5
    degrees: float = 0.0
    background: bool = True
    mesh: bool = False

    def __post_init__(self) -> None:
        if not len(self.ranks.query):
            raise ValueError("ranks must have queries, got none")
        if not 0 <= self.query < len(self.ranks.query):
            raise ValueError(f"query must be from 0 to {len(self.ranks.query) - 1}, got {self.query}")
        if self.k < 1:
            raise ValueError(f"k must be at least 1, got {self.k}")

    @cached_property
    def standing(self) -> list[Standing]:
        q, g = self.ranks.query, self.ranks.gallery
        queries, gallery = _Source(q, self.dataset), _Source(g, self.dataset)
        for source in (queries, gallery):
            if source.split.inputs != "cloud":
                raise ValueError(f"dataset must hold clouds, got the crops of {source.split.root}")
        found = [_stand(queries, self.query, "query", "query")]
        row = zip(self.ranks.idx[self.query, : self.k].tolist(), self.ranks.sim[self.query, : self.k], strict=True)
        for place, (at, sim) in enumerate(row, 1):
            if at == -1:
                break
            known = q.pids[self.query] != -1 and g.pids[at] != -1
            verdict = ("right" if q.pids[self.query] == g.pids[at] else "wrong") if known else "unknown"
            found.append(_stand(gallery, at, verdict, f"{place}: {sim:.3f}"))
        return found

    @property
    def points(self) -> tuple[np.ndarray, np.ndarray]:
        """xyz (N, 3) float64 and rgb (N, 3) uint8 of all that is shown; where bodies are, in place of their points."""
        xyz, rgb = [], []
        for i, one in enumerate(self.standing):
            shown = one.body & (not self.mesh) | ~one.body & self.background
            xyz.append(self._place(i, one.cloud.xyz[shown].astype(np.float64)))
            rgb.append(one.cloud.rgb[shown])
        return np.concatenate(xyz), np.concatenate(rgb)

    @property
    def plates(self) -> list[Mesh]:
        """What each stands on, in the colour of its verdict."""
        (x, z), faces = PLATE, np.array([[0, 1, 2], [0, 2, 3]], np.int32)
        corners = np.array([[-x, -GROUND, z], [x, -GROUND, z], [x, -GROUND, -z], [-x, -GROUND, -z]])
        return [
            Mesh(corners + [i * SPACING, 0, 0], faces, VERDICTS[one.verdict], False)
            for i, one in enumerate(self.standing)
        ]

    @property
    def bodies(self) -> list[Mesh]:
        """The fitted ones, if they are shown."""
        if not self.mesh:
            return []
        return [Mesh(self._place(i, verts), faces, SKIN) for i, (verts, faces) in enumerate(self._fits)]

    def _place(self, i: int, xyz: np.ndarray) -> np.ndarray:
        """Points of the frame of cloud i in the scene."""
        angle = np.radians(self.degrees)
        x, y, z = (xyz - self.standing[i].foot).T
        cos, sin = np.cos(angle), np.sin(angle)
        return np.stack((x * cos - z * sin + i * SPACING, -y, -x * sin - z * cos), 1)

    @cached_property
    def _fits(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Vertices, in the frame of the cloud, and faces."""
        import torch

        from ..preprocess.body import axis_angle_to_matrix, load_body

        found = []
        for one in self.standing:
            model, shape = one.fit
            if not shape or not model.startswith(EMBEDDED):
                why = f"is one of {model}, which is not embedded here" if shape else "was not kept"
                raise ValueError(f"mesh needs the body of each cloud, and that of {one.record.name} {why}")
            body = load_body(model.removeprefix(EMBEDDED))
            pose, betas = (torch.from_numpy(np.array(shape[name]))[None] for name in ("pose", "betas"))
            verts = body(axis_angle_to_matrix(pose), betas).verts[0]
            found.append((verts.double().numpy(), body.faces.numpy().astype(np.int32)))
        return found


def show(scene: Scene) -> None:
    """Open a window; keys go through the queries, turn all clouds, and hide and show background and bodies.

    Raises: ImportError without Open3D or a library of its; RuntimeError without a display, or where no window opens.
    """
    if sys.platform.startswith("linux") and not _has_display():  # Open3D would draw on none for ever
        raise RuntimeError("a window needs a display, and there is none: --png FILE draws the same without one")
    o3d = _open3d()
    window = o3d.visualization.VisualizerWithKeyCallback()
    with _quiet(o3d):
        if not window.create_window("reid3d", width=1600, height=800):
            raise RuntimeError("Open3D could not open a window: --png FILE draws the same without one")
    state = _State(window, o3d, scene)
    keys: dict[int, Callable[[], None]] = {
        ord("N"): lambda: state.go(1),
        ord("P"): lambda: state.go(-1),
        ord("B"): lambda: state.change(background=not state.scene.background),
        ord("M"): lambda: state.change(mesh=not state.scene.mesh),
        ord("H"): lambda: print(KEYS),
        262: lambda: state.change(degrees=state.scene.degrees + STEP),
        263: lambda: state.change(degrees=state.scene.degrees - STEP),
    }
    for key, action in keys.items():
        window.register_key_callback(key, lambda _, action=action: action() or False)
    try:
        print(KEYS)
        state.draw(first=True)
        window.run()
    finally:
        window.destroy_window()


def render(scene: Scene, out: str | Path, *, size: tuple[int, int] = (520, 1400)) -> Path:
    """Draw the scene as PNG, of `size` (H, W), without a display, with the words below each cloud.

    Raises: ValueError for an ending other than .png; ImportError without Open3D or a library of its; RuntimeError where
        it cannot draw; OSError naming `out`.
    """
    if Path(out).suffix.lower() != ".png":
        raise ValueError(f"out must end in .png, got {out}")
    o3d = _open3d()
    window = o3d.visualization.Visualizer()
    with _quiet(o3d):
        window.create_window(width=size[1], height=size[0], visible=False)
    try:
        _State(window, o3d, scene).draw(first=True, say=False)
        window.poll_events()
        window.update_renderer()
        pixels = np.asarray(window.capture_screen_float_buffer(do_render=True))
    finally:
        window.destroy_window()
    picture = Image.fromarray(np.rint(pixels * 255).clip(0, 255).astype(np.uint8))
    with atomic_write(out) as file:
        _labelled(picture, scene).save(file, format="PNG")
    return Path(out)


class _State:
    """A window and what it shows."""

    def __init__(self, window: Any, o3d: Any, scene: Scene) -> None:
        self.window, self.o3d, self.scene = window, o3d, scene
        options = window.get_render_option()
        options.background_color = np.array([1.0, 1.0, 1.0])
        options.point_size = 4.0
        options.mesh_show_back_face = True

    def go(self, step: int) -> None:
        self.change(query=(self.scene.query + step) % len(self.scene.ranks.query))

    def change(self, **fields: Any) -> None:
        """Show it with other fields. What cannot be shown is told: an error that left a key's callback ends all."""
        before, self.scene = self.scene, replace(self.scene, **fields)
        if before.query == self.scene.query:  # nothing is read or fitted twice
            for name in ("standing", "_fits"):
                if name in before.__dict__:
                    self.scene.__dict__[name] = before.__dict__[name]
        try:
            self.draw(say=before.query != self.scene.query)
        except (ValueError, OSError) as error:
            print(error)
            lack_bodies = self.scene.mesh and "standing" in self.scene.__dict__
            self.scene = before
            if lack_bodies:  # their points are there
                self.change(**{**fields, "mesh": False})

    def draw(self, *, first: bool = False, say: bool = True) -> None:
        geometry, utility = self.o3d.geometry, self.o3d.utility
        xyz, rgb = self.scene.points
        cloud = geometry.PointCloud(utility.Vector3dVector(xyz))
        cloud.colors = utility.Vector3dVector(rgb / 255)
        shapes: list[Any] = [cloud]
        for mesh in (*self.scene.plates, *self.scene.bodies):
            shape = geometry.TriangleMesh(utility.Vector3dVector(mesh.verts), utility.Vector3iVector(mesh.faces))
            shape.paint_uniform_color(np.array(mesh.rgb) / 255)
            if mesh.lit:
                shape.compute_vertex_normals()
            shapes.append(shape)
        self.window.clear_geometries()
        for shape in shapes:
            self.window.add_geometry(shape, reset_bounding_box=first)
        if first:
            self._look()
        if say:
            q = self.scene.ranks.query
            print(f"{self.scene.query + 1} of {len(q)}: {q.names[self.scene.query]}")
            print("  " + " · ".join(f"{one.title} ({one.verdict})" for one in self.scene.standing))

    def _look(self) -> None:
        """From the front and a little above, at all that stands there."""
        control = self.window.get_view_control()
        camera = control.convert_to_pinhole_camera_parameters()
        height, width = camera.intrinsic.height, camera.intrinsic.width
        focal, rotation, place = _camera(height, width, len(self.scene.standing))
        camera.intrinsic.set_intrinsics(width, height, focal, focal, width / 2 - 0.5, height / 2 - 0.5)
        extrinsic = np.eye(4)
        extrinsic[:3, :3], extrinsic[:3, 3] = rotation, -rotation @ place
        camera.extrinsic = extrinsic
        control.convert_from_pinhole_camera_parameters(camera, allow_arbitrary=True)


def _camera(height: int, width: int, count: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Focal length in pixels, the rotation to the camera's frame (y down), and where it stands."""
    focal = height / 2 / np.tan(np.radians(WIDE) / 2)
    middle = np.array([(count - 1) * SPACING / 2, 0.75, 0.0])
    room = max(2.7 * focal / height, count * SPACING * focal / width)
    place = middle + room * np.array([0.0, np.sin(0.12), np.cos(0.12)])
    ahead = (middle - place) / np.linalg.norm(middle - place)
    right = np.array([1.0, 0.0, 0.0])
    return float(focal), np.stack((right, np.cross(ahead, right), ahead)), place


def _stand(source: _Source, i: int, verdict: str, title: str) -> Standing:
    cloud, record, fit = *source[i], source.body(i)
    standing = Standing(cloud, record, fit, np.zeros(3), verdict, title)
    body = cloud.xyz[standing.body].astype(np.float64)
    foot = np.array([body[:, 0].mean(), body[:, 1].max(), body[:, 2].mean()])
    pid, camid = int(source.features.pids[i]), int(source.features.camids[i])
    who = {-1: "id unknown", 0: "distractor"}.get(pid, f"id {pid}")
    where = f"camera {camid}" if camid != -1 else "camera unknown"
    return standing._replace(foot=foot, title=f"{title}, {who}, {where}")


def _labelled(picture: Image.Image, scene: Scene) -> Image.Image:
    height, width = picture.height, picture.width
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    focal, rotation, place = _camera(height, width, len(scene.standing))
    for i, one in enumerate(scene.standing):
        x, y, z = rotation @ (np.array([i * SPACING, -GROUND, PLATE[1]]) - place)
        at, below = width / 2 + focal * x / z, height / 2 + focal * y / z
        for line, text in enumerate(one.title.split(", "), 1):
            draw.text((at, below + 18 * line), text, (60, 60, 60), font, anchor="mm")
    return picture


def _has_display() -> bool:
    """Whether one that the environment names answers: the name of one that is gone may still be there."""
    for variable, (library, connect, close) in DISPLAYS.items():
        if os.environ.get(variable):
            try:
                functions = ctypes.CDLL(library)
            except OSError:
                continue
            getattr(functions, connect).restype = ctypes.c_void_p
            if display := getattr(functions, connect)(None):
                getattr(functions, close)(ctypes.c_void_p(display))
                return True
    return False


def _quiet(o3d: Any) -> Any:
    """A context in which Open3D prints no more than errors; where it draws is nothing to be told of."""
    return o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error)


def _open3d() -> Any:
    if reason := why_no_open3d():
        raise ImportError(reason)
    import open3d

    return open3d
