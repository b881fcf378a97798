"""The scene of Open3D: where everything stands, by hand; and its picture, where Open3D can draw."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from reid3d import cli
from reid3d.cloud import PointCloud
from reid3d.data import open_clouds, open_dataset
from reid3d.doctor import OPEN3D_PACKAGES, why_no_open3d
from reid3d.io import Record, write_shard
from reid3d.preprocess.batch import convert_folder
from reid3d.preprocess.synth import synth
from reid3d.retrieval import Features, search
from reid3d.viewer import o3d
from reid3d.viewer.o3d import SPACING, VERDICTS, Scene, render, show
from tests.conftest import needs

COLOURS = {1: (250, 20, 20), 2: (20, 240, 20), 3: (20, 20, 250)}  # of each person


def block(pid):
    """A body of 0.4 x 1.6 x 0.2 m, its middle at (1, 0, 5), and a wall of one point."""
    x, y, z = np.meshgrid(np.linspace(0.8, 1.2, 12), np.linspace(-0.8, 0.8, 48), np.linspace(4.9, 5.1, 3))
    xyz = np.stack((x, y, z), 3).reshape(-1, 3)
    xyz = np.concatenate((xyz, [[1.5, -0.8, 5.0]])).astype(np.float32)
    rgb = np.tile(np.array(COLOURS[pid], np.uint8), (len(xyz), 1))
    return PointCloud(xyz, rgb, np.append(np.arange(len(xyz) - 1), -1).astype(np.int32))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two queries of person 1 and 2; the gallery has each of three people once, the query's own first."""
    folder = tmp_path_factory.mktemp("clouds")
    rows = [("query", 1, 1), ("query", 2, 1), ("gallery", 1, 2), ("gallery", 2, 2), ("gallery", 3, 2)]
    for split in ("query", "gallery"):
        mine = [(i, pid, camid) for i, (of, pid, camid) in enumerate(rows) if of == split]
        clouds = [block(pid) for _, pid, _ in mine]
        records = [
            Record(f'<b>{i}"é 行人.jpg', split, pid, camid, 0, (128, 64), (0.9, -1.0, 0.0), points=len(cloud))
            for (i, pid, camid), cloud in zip(mine, clouds, strict=True)
        ]
        write_shard(folder / f"{split}-00000.safetensors", clouds, records, config={}, dtype="float32")
    clouds = open_clouds(folder)
    directions = np.eye(4, dtype=np.float32) + 0.3

    def features(split):
        names = [record.name for record in split.records]
        return Features(directions[split.pids], split.pids, split.camids, names, None, str(folder), split.name)

    return search(features(clouds.query), features(clouds.gallery), k=3)


def test_all_stand_in_a_row_on_the_ground(ranks):
    scene = Scene(ranks, query=1, background=False)
    assert [one.verdict for one in scene.standing] == ["query", "right", "wrong", "wrong"]
    assert scene.standing[0].title == "query, id 2, camera 1"
    assert scene.standing[1].title.startswith("1: ") and "id 2" in scene.standing[1].title
    xyz, rgb = scene.points
    per = len(block(1)) - 1
    assert xyz.shape == (4 * per, 3) and rgb.dtype == np.uint8
    for i, one in enumerate(np.split(xyz, 4)):
        assert np.allclose(one.min(0), [i * SPACING - 0.2, 0.0, -0.1], atol=1e-6)
        assert np.allclose(one.max(0), [i * SPACING + 0.2, 1.6, 0.1], atol=1e-6)
    colours = [tuple(int(x) for x in part[0]) for part in np.split(rgb, 4)]
    assert colours[:2] == [COLOURS[2]] * 2 and set(colours[2:]) == {COLOURS[1], COLOURS[3]}
    for i, (plate, one) in enumerate(zip(scene.plates, scene.standing, strict=True)):
        assert plate.rgb == VERDICTS[one.verdict] and plate.verts[:, 0].mean() == pytest.approx(i * SPACING)
        assert (plate.verts[:, 1] < 0).all()


def test_background_and_turns(ranks):
    plain, turned = Scene(ranks), Scene(ranks, degrees=90.0)
    count = len(block(1))
    wall = [scene.points[0][count - 1] for scene in (plain, turned)]
    assert len(plain.points[0]) == 4 * count
    assert np.allclose(wall[0], [0.5, 1.6, 0.0], atol=1e-6)  # of (1.5, -0.8, 5): y up, z towards the eye
    assert np.allclose(wall[1], [0.0, 1.6, -0.5], atol=1e-6)  # a quarter of a turn: x goes away
    other = [scene.points[0][2 * count - 1] - [SPACING, 0, 0] for scene in (plain, turned)]
    assert np.allclose(wall, other, atol=1e-6)  # each about its own axis


def test_fewer_matches_than_asked_for(ranks):
    assert len(Scene(ranks, k=2).standing) == 3 and len(Scene(ranks, k=50).standing) == 4


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A query, and itself in the gallery, of a converted world: its clouds came with their bodies."""
    folder = tmp_path_factory.mktemp("converted")
    world = synth(folder / "world", preset="easy", ids=2, cams=2, tracklets=1, images=2, workers=1, progress=False)
    convert_folder(world, folder / "clouds", progress=False)
    split = open_clouds(folder / "clouds").query
    names = [record.name for record in split.records]
    feats = np.eye(len(split), 8, dtype=np.float32)
    both = Features(feats, split.pids, split.camids, names, None, str(folder / "clouds"), "query")
    return search(both, both, k=1)


def test_bodies_stand_where_their_points_do(converted):
    """The visible points of a cloud are vertices of its body."""
    scene = Scene(converted, mesh=True, background=False, degrees=30.0)
    assert not len(scene.points[0]) and len(scene.bodies) == 2 and Scene(converted).bodies == []
    bare = Scene(converted, background=False, degrees=30.0)
    per = len(bare.points[0]) // 2
    for i, mesh in enumerate(scene.bodies):
        cloud = scene.standing[i].cloud
        chosen = cloud.vertex[cloud.vertex >= 0]
        assert np.abs(mesh.verts[chosen] - bare.points[0][i * per : (i + 1) * per]).max() < 2e-3  # float16
        assert mesh.faces.max() < len(mesh.verts)


def test_clouds_without_bodies(ranks):
    with pytest.raises(ValueError, match="mesh needs the body of each cloud, and that of .* was not kept"):
        Scene(ranks, mesh=True).bodies  # noqa: B018


def test_crops_are_refused(ranks, tmp_path):
    for name in ("0001_c1s1_000001_00.jpg", "0002_c1s1_000001_00.jpg"):
        (tmp_path / "query").mkdir(exist_ok=True)
        Image.new("RGB", (64, 128)).save(tmp_path / "query" / name)
    with pytest.raises(ValueError, match="dataset must hold clouds, got the crops of "):
        Scene(ranks, open_dataset(tmp_path)).standing  # noqa: B018


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"query": 2}, "query must be from 0 to 1, got 2"), ({"k": 0}, "k must be at least 1, got 0")],
)
def test_bad_scenes(ranks, fields, message):
    with pytest.raises(ValueError, match=message):
        Scene(ranks, **fields)


def test_a_picture_shows_query_and_matches(ranks, tmp_path):
    needs(why_no_open3d())
    path = render(Scene(ranks, query=1), tmp_path / "s cène.png")
    pixels = np.asarray(Image.open(path)).astype(int)
    assert pixels.shape == (520, 1400, 3)

    def where(colour):
        return np.argwhere((np.abs(pixels - np.array(colour)) < 12).all(2))

    assert len(where((255, 255, 255))) > 0.5 * pixels.shape[0] * pixels.shape[1]
    two = where(COLOURS[2])
    assert len(two) > 2000 and {1, 3} <= {c for c in COLOURS if len(where(COLOURS[c])) > 1000}
    assert (two[:, 1] < 700).all()  # the query and its first match are on the left
    others = np.concatenate((where(COLOURS[1]), where(COLOURS[3])))
    assert (others[:, 1] > 650).all()
    for verdict in ("query", "right", "wrong"):
        assert len(where(VERDICTS[verdict])) > 300
    assert where(VERDICTS["query"])[:, 0].min() > two[:, 0].mean()  # plates lie below


def test_only_png(ranks, tmp_path):
    with pytest.raises(ValueError, match=r"out must end in .png, got .*x.jpg"):
        render(Scene(ranks), tmp_path / "x.jpg")


@pytest.mark.parametrize("gone", [{}, {"DISPLAY": ":59999"}, {"WAYLAND_DISPLAY": "wayland-59999"}])
def test_a_window_needs_a_display(ranks, monkeypatch, tmp_path, gone):
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"XDG_RUNTIME_DIR": str(tmp_path), **gone}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(RuntimeError, match="a window needs a display, and there is none: --png FILE"):
        show(Scene(ranks))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'open3d'\")",
            "Open3D is not installed: pip install 'reid3d[view]'",
        ),
        (
            "raise ImportError('libusb-1.0.so.0: cannot open')",
            f"(ImportError: libusb-1.0.so.0: cannot open): {OPEN3D_PACKAGES}",
        ),
        ("import os; os.abort()", f"Open3D cannot draw here (it ended with -6): {OPEN3D_PACKAGES}"),
    ],
)
def test_where_open3d_is_missing_it_says_what_to_install(module, said, ranks, tmp_path, monkeypatch):
    (tmp_path / "open3d.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")]))))
    assert said in why_no_open3d()
    with pytest.raises(ImportError) as error:
        render(Scene(ranks), tmp_path / "x.png")
    assert said in str(error.value) and not (tmp_path / "x.png").exists()


def test_without_a_driver_it_says_what_to_install(monkeypatch):
    needs(why_no_open3d())
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("__EGL_VENDOR_LIBRARY_DIRS", "/nonexistent")
    assert why_no_open3d() == f"Open3D cannot draw here (it finds no OpenGL driver): {OPEN3D_PACKAGES}"


class Window:
    """Stands in for a window: what is asked of it, and what is shown at first and after each of the keys."""

    def __init__(self, pressed):
        self.shapes, self.keys, self.pressed = [], {}, pressed

    def create_window(self, *args, **kwargs):
        return True

    def register_key_callback(self, key, action):
        self.keys[key] = action

    def clear_geometries(self):
        self.shapes.clear()

    def add_geometry(self, shape, reset_bounding_box):
        self.shapes.append(shape)

    def run(self):
        self.counts = []
        for key in ("", *self.pressed):
            if key:
                assert self.keys[key if isinstance(key, int) else ord(key)](self) is False
            self.counts.append((len(self.shapes), len(self.shapes[0].points)))

    def destroy_window(self):
        pass


@pytest.fixture
def press(monkeypatch):
    """Shows a scene and presses keys: numbers of shapes and of points shown at first and after each."""
    needs(why_no_open3d())
    import open3d

    real = open3d.visualization.Visualizer()
    real.create_window(width=64, height=64, visible=False)
    monkeypatch.setattr(Window, "get_render_option", lambda self: real.get_render_option(), raising=False)
    monkeypatch.setattr(Window, "get_view_control", lambda self: real.get_view_control(), raising=False)
    monkeypatch.setattr(o3d, "why_no_open3d", lambda: None)
    monkeypatch.setattr(o3d, "_has_display", lambda: True)

    def pressed(scene, keys):
        window = Window(keys)
        monkeypatch.setattr(open3d.visualization, "VisualizerWithKeyCallback", lambda: window)
        show(scene)
        return window.counts

    yield pressed
    real.destroy_window()


def test_keys(ranks, press, capsys):
    counts = press(Scene(ranks, k=3), [*"BBMMN", 262, "P", "H"])
    points, plates = len(block(1)), 4
    all_, bare = (1 + plates, 4 * points), (1 + plates, 4 * (points - 1))
    assert counts == [all_, bare, *[all_] * 7]
    printed = capsys.readouterr().out
    assert printed.count("mesh needs the body of each cloud") == 2
    assert "1 of 2" in printed and "2 of 2" in printed and printed.count("N, P: next") == 2


def test_on_to_clouds_without_bodies(converted, press, monkeypatch, capsys):
    kept = o3d._Source.body
    monkeypatch.setattr(o3d._Source, "body", lambda self, i: kept(self, i) if i == 0 else ("", {}))
    counts = press(Scene(converted), "MNP")
    first, other = (len(Scene(converted, query=i).points[0]) for i in (0, 1))
    assert counts[0] == (3, first) and counts[1][0] == 5  # a cloud and two plates, and two bodies
    assert counts[2:] == [(3, other), (3, first)]
    assert capsys.readouterr().out.count("mesh needs the body of each cloud") == 1


@pytest.mark.parametrize("mesh", ["", "M"])
def test_on_to_a_cloud_that_is_not_there(converted, press, capsys, mesh):
    names = [converted.query.names[0], "gone.jpg", *converted.query.names[2:]]
    ranks = replace(converted, query=replace(converted.query, names=names))
    counts = press(Scene(ranks), f"{mesh}NB")
    assert counts[len(mesh)] == counts[len(mesh) + 1]  # it stays, as it was
    printed = capsys.readouterr().out
    assert printed.count("dataset must hold the cloud of gone.jpg") == 1 and "2 of " not in printed


@pytest.fixture
def run(ranks, tmp_path):
    """Features as `reid3d view` reads them."""
    ranks.query.save(tmp_path / "query.safetensors")
    ranks.gallery.save(tmp_path / "gallery.safetensors")
    return tmp_path


def test_png_of_the_command(run, capfd):
    needs(why_no_open3d())
    out = run / "ranks.png"
    assert cli.main(["view", str(run), "--png", str(out), "--query", "1", "-k", "1"]) == 0
    assert capfd.readouterr().out == f"{out}\n"
    pixels = np.asarray(Image.open(out)).astype(int)
    seen = {pid: (np.abs(pixels - colour) < 12).all(2).sum() for pid, colour in COLOURS.items()}
    assert seen[2] > 2000 and seen[1] == seen[3] == 0


# Runs the command with a window that presses its keys itself, and keeps what is seen after each.
PRESSING = """
import sys
import numpy as np
import open3d
from reid3d import cli

class Pressing:
    keys, window = {}, open3d.visualization.VisualizerWithKeyCallback()

    def __getattr__(self, name):
        return getattr(self.window, name)

    def register_key_callback(self, key, action):
        self.keys[key] = action

    def run(self):
        seen = []
        for keys in ((), [262] * 9, [ord("N")], [ord("M")]):
            for key in keys:
                self.keys[key](self)
            seen.append(np.asarray(self.capture_screen_float_buffer(do_render=True)))
        np.save(sys.argv[1], np.rint(np.stack(seen) * 255).astype(np.uint8))

open3d.visualization.VisualizerWithKeyCallback = Pressing
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_window_on_a_display(run):
    needs(why_no_open3d())
    needs(None if shutil.which("Xvfb") else "Xvfb is not installed: apt-get install xvfb")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "1700x900x24"], pass_fds=[write], stderr=subprocess.DEVNULL
    )
    os.close(write)
    try:
        with open(read) as told:
            display = f":{told.readline().strip()}"
        command = [sys.executable, "-c", PRESSING, run / "seen.npy", "view", run, "--open3d"]
        environment = {**os.environ, "DISPLAY": display}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    finally:
        server.terminate()
        server.wait()
    assert done.returncode == 0, done.stderr
    assert "1 of 2" in done.stdout and "2 of 2" in done.stdout and "Open3D" not in done.stdout
    assert done.stdout.count("mesh needs the body of each cloud") == 1
    first, turned, other, same = np.load(run / "seen.npy").astype(int)

    def columns(pixels, pid):
        return np.flatnonzero((np.abs(pixels - COLOURS[pid]) < 12).all(2).any(0))

    assert first.shape == (800, 1600, 3) and len(columns(first, 1)) > 100
    assert len(columns(turned, 1)) < 0.8 * len(columns(first, 1))  # from the side they are half as wide
    assert columns(turned, 1).max() < columns(turned, 3).min()
    assert columns(other, 2).max() < columns(other, 1).min()  # the next query and its match
    assert np.array_equal(other, same)
