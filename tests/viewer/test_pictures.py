"""Pictures: where points fall, what is drawn over what, any text, and the commands that make them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from reid3d import cli
from reid3d.cloud import PointCloud
from reid3d.data import open_dataset
from reid3d.formats import write_obj, write_ply
from reid3d.io import Record, write_shard
from reid3d.models import create_model, save_weights
from reid3d.retrieval import Features, extract
from reid3d.viewer.explained import explained
from reid3d.viewer.pictures import (
    ABOVE,
    FRONT,
    SIDE,
    Item,
    Panel,
    View,
    contact_sheet,
    crop_of,
    draw_body,
    draw_heat,
    draw_matches,
    draw_points,
    draw_text,
    enlarge,
    grid,
    heat_colours,
    heated,
    inspection,
)
from tests.capsules import capsule_person, write_capsules

HOSTILE = [
    'it\'s "quoted".jpg',
    "<script>alert(1)</script>",
    "日本語 ж é ✓",
    "a\nb\t\x00\x1b[31m",
    "\ud800 lone",
    "",
    "🙂" * 300,
]


def cloud_of(xyz, rgb=None, vertex=None) -> PointCloud:
    xyz = np.array(xyz, np.float32).reshape(-1, 3)
    rgb = np.full((len(xyz), 3), 200, np.uint8) if rgb is None else np.array(rgb, np.uint8)
    return PointCloud(xyz, rgb, np.zeros(len(xyz), np.int32) if vertex is None else np.array(vertex, np.int32))


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L* of sRGB."""
    linear = np.where(rgb <= 0.04045 * 255, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 216 / 24389, 116 * np.cbrt(y) - 16, y * 24389 / 27)


def test_heat_is_ever_lighter_and_even():
    """In light alone, so that nobody's eyes matter: by steps that differ by no more than twice the mean."""
    colours = heat_colours(np.linspace(0, 1, 101))
    steps = np.diff(lightness(colours.astype(float))[::10])
    assert (steps > 0).all() and steps.max() < 2 * steps.mean()
    assert lightness(colours[[0, -1]].astype(float)).tolist() == pytest.approx([12, 93], abs=4)
    assert np.array_equal(heat_colours(np.array([-1, 2, np.nan])), colours[[0, -1, 0]])


def test_heat_over_colours_is_the_denser_the_hotter():
    checks = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    spread = [np.ptp(heated(checks, np.full(2, value)).astype(int).sum(1)) for value in (0.0, 0.25, 0.5, 1.0)]
    assert spread == sorted(spread, reverse=True) and spread[0] > 8 * spread[-1]


@pytest.mark.parametrize(("angles", "right", "down", "depth"), [(FRONT, 0, 1, 2), (SIDE, 2, 1, -1), (ABOVE, 0, -3, 1)])
def test_where_points_are_seen_from_each_side(angles, right, down, depth):
    """An axis is right, down or away as it is, or, below 0, the other way round: -1 is x, -3 z."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-2, 2) for z in (-0.5, 0.5)], np.float32)
    view = View(cloud_of(corners + [5, 6, 7]), *angles, size=(400, 200))
    found = view.project(np.array([[5.0, 6, 7], [5.2, 6.3, 7.1]]))
    moved, scale = found[1] - found[0], 400 / 4.2
    assert found[0] == pytest.approx([100, 200, 0])
    for value, axis in zip(moved, (right, down, depth), strict=True):
        offset = [0.2, 0.3, 0.1]
        signed = offset[axis] if axis >= 0 else -offset[-axis - 1]
        assert value / scale == pytest.approx(signed, abs=0.02 * abs(signed) + 1e-9)


@pytest.mark.parametrize("angles", [FRONT, SIDE, ABOVE, (0.9, 0.15)])
def test_a_body_fits_from_all_sides(angles):
    rng = np.random.default_rng(0)
    view = View(cloud_of(rng.normal(0, 1, (500, 3)) * [0.2, 0.5, 2.0]), *angles)
    place = view.project(view.cloud.xyz.astype(float))[:, :2]
    assert (place >= 0).all() and (place <= view.size[::-1]).all()


def test_what_lies_in_front():
    """The nearer of two points shows, from either side of them; a point of the body before all background."""
    frame = [[-1, -1, 0], [1, 1, 0]]
    two = cloud_of([*frame, [0, 0, -0.2], [0, 0, 0.2]], [[0, 0, 0]] * 2 + [[255, 0, 0], [0, 0, 255]])
    middle = [np.array(View(two, yaw, size=(101, 101)).draw())[50, 50].tolist() for yaw in (0, np.pi)]
    assert middle == [[255, 0, 0], [0, 0, 255]]
    covered = cloud_of([*frame, [0, 0, -0.2], [0, 0, 0.2]], two.rgb, [-1, -1, -1, 7])
    assert np.array(View(covered, size=(101, 101)).draw())[50, 50].tolist() == [0, 0, 255]
    faded = np.array(View(covered, size=(101, 101)).draw())[0, 0]
    assert faded.tolist() == [185, 185, 185]
    assert np.array(View(covered, size=(101, 101)).draw(background=False))[0, 0].tolist() == [250, 250, 250]


@pytest.mark.parametrize("xyz", [[], [[1e30, 0, 0], [0, 1e30, 0]], [[3, 4, 5]], [[0, 0, 1]] * 3])
def test_strange_clouds_are_drawn(xyz):
    picture = View(cloud_of(xyz), *SIDE, size=(40, 20)).draw()
    assert picture.size == (20, 40)
    assert View(cloud_of(xyz), size=(40, 20)).draw(np.zeros(len(xyz))).size == (20, 40)


def test_the_crop_again():
    cloud, record = capsule_person(3, 1, 0, size=(32, 16))
    crop, pixels = crop_of(cloud, record), np.floor(record.project(cloud.xyz)).astype(int)
    assert np.array_equal(crop[pixels[:, 1], pixels[:, 0]], cloud.rgb)
    kept = pixels[:, 0] != 5
    holed = PointCloud(cloud.xyz[kept], cloud.rgb[kept], cloud.vertex[kept])
    again = crop_of(holed, record)
    assert np.array_equal(again[:, 5], crop[:, 4]) and np.array_equal(np.delete(again, 5, 1), np.delete(crop, 5, 1))
    assert crop_of(cloud_of([[99, 99, 0]]), record).shape == (32, 16, 3)


def test_a_body_over_a_crop():
    """A square before the picture's upper half: lit there, the faded picture elsewhere."""
    verts = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    faces = torch.tensor([[0, 2, 1], [0, 3, 2]])
    pixels = np.array([[0, 0], [20, 0], [20, 20], [0, 20]], float)
    out = np.array(draw_body(Image.new("RGB", (20, 40), (10, 200, 10)), verts, faces, pixels))
    assert (out[1:19] == out[10, 10]).all() and out[10, 10, 2] > out[10, 10, 0] > 60
    assert (out[21:] == np.array([154, 230, 154])).all()


def test_points_over_a_crop():
    cloud, record = capsule_person(3, 1, 0)
    crop = enlarge(crop_of(cloud, record))
    changed = (np.array(draw_points(crop, cloud, record)) != np.array(draw_points(crop, cloud_of([]), record))).any(2)
    body = np.zeros(record.size, bool)
    x, y = np.floor(record.project(cloud.xyz[cloud.vertex >= 0])).astype(int).T
    body[y, x] = True
    large = body.repeat(3, 0).repeat(3, 1)
    assert (changed & large).sum() > 0.9 * large.sum() and (changed & ~large).sum() < 0.2 * large.sum()


def test_heat_over_a_crop_lies_where_it_is():
    heat = np.zeros((4, 2))
    heat[3, 1] = 1
    out = np.array(draw_heat(Image.new("RGB", (60, 120), (90, 90, 90)), heat)).astype(int)
    hot = np.abs(out - heat_colours(np.ones(1))[0]).sum(2)
    assert hot[105, 45] < 120 and hot[15, 15] > 200 and np.unravel_index(hot.argmin(), hot.shape) >= (90, 30)


def test_lines_join_what_matches():
    left, right = Image.new("RGB", (50, 100), "black"), Image.new("RGB", (60, 80), "black")
    plain = np.array(draw_matches(left, right, *np.empty((2, 0, 2)), np.empty(0))).astype(int)
    drawn = np.array(draw_matches(left, right, np.array([[10.0, 70]]), np.array([[40.0, 20]]), np.ones(1))).astype(int)
    assert drawn.shape[0] == 100 and drawn.shape[1] > 110
    offset = drawn.shape[1] - 60
    changed = np.abs(drawn - plain).sum(2) > 60
    for share in np.linspace(0, 1, 9):
        x, y = (1 - share) * np.array([10, 70]) + share * np.array([40 + offset, 20])
        assert changed[int(y), int(x)], share
    assert changed.sum() < 0.1 * changed.size


@pytest.mark.parametrize("text", HOSTILE)
def test_any_text_is_drawn_within_its_width(text):
    picture = Image.new("RGB", (400, 40), "white")
    from PIL import ImageDraw

    draw_text(ImageDraw.Draw(picture), (10, 20), text, 200)
    dark = np.array(picture).min(2) < 160
    assert dark[:, :8].sum() == 0 and dark[:, 214:].sum() == 0
    assert dark.any() == bool(text)


def test_letters_that_no_font_has_are_spelt_out(monkeypatch):
    from reid3d.viewer import pictures

    monkeypatch.setattr(pictures, "FONTS", ())
    pictures._fonts.cache_clear(), pictures._has.cache_clear()
    try:
        assert pictures._legible("face 日 \n ж", 15)[1] == "face \\u65e5 \\n \\u0436"
        assert pictures._legible("<b>'\"\\", 15)[1] == "<b>'\"\\"
    finally:
        pictures._fonts.cache_clear(), pictures._has.cache_clear()


def test_panels_stand_in_their_columns():
    red, blue = Image.new("RGB", (30, 40), "red"), Image.new("RGB", (50, 20), "blue")
    out = np.array(grid([[Panel("a", red), Panel("b", blue, (0, 200, 0))], [Panel("c", blue)]], "head", ["one", "two"]))
    for colour, count in (((255, 0, 0), 30 * 40), ((0, 0, 255), 2 * 50 * 20)):
        found = (out == colour).all(2).sum()
        assert 0.7 * count < found <= count  # less the frame
    assert (out == (0, 200, 0)).all(2).any()


@pytest.mark.parametrize("name", HOSTILE)
def test_an_inspection_of_any_name(name):
    cloud, record = capsule_person(3, 1, 0, size=(32, 16))
    assert inspection(Item(cloud, record, name)).width > inspection(Item(cloud, None, name)).width
    assert contact_sheet([Item(cloud, record, name)] * 3).height < 300


# The commands.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_capsules(tmp_path_factory.mktemp("pictures") / "clouds")


def call(capsys, *argv) -> tuple[int, str, str]:
    try:
        code = cli.main(["view", *map(str, argv)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def one_line(err: str) -> str:
    (line,) = err.strip().splitlines()
    assert line.startswith("reid3d: error: ")
    return line


def test_a_file_is_shown_whatever_its_name(capsys, tmp_path):
    cloud, _ = capsule_person(3, 1, 0, size=(32, 16))
    (tmp_path / "a:1").mkdir()
    for name in ("it's <script>.ply", "a:7.ply", "日本.ply", "a:1/x.ply"):
        write_ply(tmp_path / name, cloud)
        out = tmp_path / "out.png"
        assert call(capsys, tmp_path / name, "--out", out) == (0, f"{out}\n", "")
        assert Image.open(out).format == "PNG" and Image.open(out).width > 600
        out.unlink()
    write_obj(tmp_path / "a.obj", cloud)
    assert call(capsys, tmp_path / "a.obj", "--out", tmp_path / "a.jpg")[0] == 0
    assert Image.open(tmp_path / "a.jpg").format == "JPEG"


def test_an_item_by_its_number_and_its_name(data, capsys, tmp_path):
    def shown(what) -> bytes:
        assert call(capsys, what, "--out", tmp_path / "out.png")[0] == 0
        return (tmp_path / "out.png").read_bytes()

    query = open_dataset(data).query
    first = len(open_dataset(data).train)  # the queries follow those for training
    by_number = shown(f"{data}:{first + 1}")
    assert by_number == shown(f"{data}:{query.names[1]}") == shown(f"{data / 'query-00000.safetensors'}:1")
    assert by_number != shown(f"{data}:{first}")


def test_names_with_colons_and_a_folder_with_one(capsys, tmp_path):
    cloud, record = capsule_person(3, 1, 0, size=(32, 16))
    folder = tmp_path / "c:1"
    folder.mkdir()
    records = [Record(name, *list(vars(record).values())[1:]) for name in ("a:0.jpg", "<i>'\"", "日本 🙂")]
    write_shard(folder / "all-00000.safetensors", [cloud] * 3, records, config={}, dtype="float32")
    for what in (f"{folder}:a:0.jpg", f"{folder}:<i>'\"", f"{folder}:日本 🙂", f"{folder}:2", folder):
        assert call(capsys, what, "--out", tmp_path / "out.png")[0] == 0, what


def test_a_sheet_shows_the_least_trusted_first(capsys, tmp_path, monkeypatch):
    from reid3d.viewer import pictures

    cloud, record = capsule_person(3, 1, 0, size=(32, 16))
    trust = {"b": {"confidence": 0.9}, "a": {"confidence": 0.1}, "unknown": {}, "c": {"confidence": 0.4}}
    values = list(vars(record).values())
    records = [Record(name, *values[1:7], quality) for name, quality in trust.items()]
    write_shard(tmp_path / "all-00000.safetensors", [cloud] * 4, records, config={}, dtype="float32")
    sheets = []

    def sheet(items):
        sheets.append([item.name for item in items])
        return contact_sheet(items)

    monkeypatch.setattr(pictures, "contact_sheet", sheet)
    assert call(capsys, tmp_path, "--out", tmp_path / "out.png")[0] == 0
    assert call(capsys, tmp_path / "all-00000.safetensors", "--count", "2", "--out", tmp_path / "out.png")[0] == 0
    assert sheets == [["a", "c", "b", "unknown"], ["a", "c"]]


def test_the_body_that_was_fitted_is_drawn(capsys, tmp_path, monkeypatch):
    from reid3d.viewer import pictures

    made = []
    monkeypatch.setattr(pictures, "inspection", lambda item: made.append(item) or inspection(item))
    cloud, record = capsule_person(3, 1, 0, size=(32, 16))
    bodies = {"pose": np.zeros((1, 24, 3), np.float32), "betas": np.zeros((1, 10), np.float32)}
    bodies["pose"][0, 0, 0] = np.pi
    for number, name in enumerate(("embedded-full", "smpl-1234")):
        path = tmp_path / f"all-0000{number}.safetensors"
        write_shard(path, [cloud], [record], config={"body": name}, bodies=bodies)
        assert call(capsys, f"{path}:0", "--out", tmp_path / "out.png")[0] == 0
    assert made[0].body is not None and made[1].body is None
    verts, faces = made[0].body
    assert verts.shape[1] == faces.shape[1] == 3 and np.ptp(verts[:, 1].numpy()) > 1.4


def test_what_cannot_be_shown_gets_one_line(data, capsys, tmp_path):
    (tmp_path / "broken.ply").write_text("ply")
    (tmp_path / "note.txt").write_text("note")
    (tmp_path / "empty").mkdir()
    write_ply(tmp_path / "none.ply", cloud_of([]))
    shard = data / "query-00000.safetensors"
    out = tmp_path / "out.png"
    cases = [
        (tmp_path / "broken.ply", "not a PLY file with a whole header"),
        (tmp_path / "gone.ply", "No such file"),
        (tmp_path / "none.ply", "a cloud without points"),
        (f"{data}:99", f"{data} holds 18 items, from 0 on, and none named 99"),
        (f"{data}:-1", "none named -1"),
        (f"{data}:", "none named"),
        (f"{data}:a\nb", "none named a\\nb"),
        (f"{shard}:4", "holds 4 items"),
        (f"{tmp_path / 'note.txt'}:1", "is no folder of clouds and no shard, and has no item 1"),
        (f"{tmp_path / 'empty'}:1", "holds no cloud shards"),
        (f"{tmp_path / 'gone'}:1", "no such folder of a run or of features"),
    ]
    for what, message in cases:
        code, printed, err = call(capsys, what, "--out", out)
        assert (code, printed) == (1, ""), what
        assert message in one_line(err), what
    assert not out.exists()
    code, _, err = call(capsys, data)
    assert code == 2 and "--out must end in .png, .jpg, .jpeg for a picture, got ranks.html" in one_line(err)
    assert "No such file" in one_line(call(capsys, data, "--out", tmp_path / "gone" / "out.png")[2])
    assert call(capsys, data, "--count", "0")[0] == 2


# What a model finds alike.


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run folder as training and evaluation leave it."""
    folder = tmp_path_factory.mktemp("pictures") / "run"
    (folder / "features").mkdir(parents=True)
    torch.manual_seed(0)
    model = create_model("ognet_small", init_points=128, k=8)
    save_weights(model, folder / "model.safetensors", trained_on='{"points": 200}')
    model.points = 200
    for name in ("query", "gallery"):
        extract(model, getattr(open_dataset(data), name)).save(folder / "features" / f"{name}.safetensors")
    return folder


def test_a_query_is_explained_by_name_and_number(data, run, capsys, tmp_path):
    names = Features.load(run / "features" / "query.safetensors").names
    pictures = []
    for query in (names[1], "1", "0"):
        out = tmp_path / "out.png"
        assert call(capsys, run, "--explain", query, "--out", out) == (0, f"{out}\n", "")
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    moved = shutil.copytree(data, tmp_path / "moved")
    assert call(capsys, run / "model.safetensors", "--explain", "1", "--data", moved, "--out", out)[0] == 0
    assert out.read_bytes() == pictures[0]


def test_a_query_that_there_is_not(data, run, capsys, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "model.safetensors", bare)
    out = tmp_path / "out.png"
    for argv, message in (
        ((run, "--explain", "nobody.jpg"), "holds 4 items, from 0 on, and none named nobody.jpg"),
        ((run, "--explain", "4"), "none named 4"),
        ((bare, "--explain", "0"), "reid3d eval"),
        ((tmp_path / "gone", "--explain", "0"), "no weights at"),
        ((run, "--explain", "0", "--data", tmp_path / "gone"), "--data DIR"),
        ((run, "--explain", "0", "--data", tmp_path), "holds no cloud shards"),
    ):
        code, _, err = call(capsys, *argv, "--out", out)
        assert code == 1 and message in one_line(err), argv
    assert not out.exists()
    assert call(capsys, run, "--explain", "0", "--out", "page.html")[0] == 2


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Crops in Market-1501's layout, with their clouds."""
    folder = tmp_path_factory.mktemp("crops")
    records = {"query": [], "gallery": []}
    clouds = {"query": [], "gallery": []}
    for split, place in (("query", "query"), ("gallery", "bounding_box_test")):
        (folder / "people" / place).mkdir(parents=True)
        for pid, camid in ((1, 1), (2, 1)) if split == "query" else ((1, 2), (2, 2), (1, 1)):
            cloud, record = capsule_person(pid, camid, 0, size=(32, 16))
            name = f"{place}/{record.name}"
            Image.fromarray(crop_of(cloud, record)).save(folder / "people" / name)
            clouds[split].append(cloud)
            records[split].append(Record(name, split, *list(vars(record).values())[2:]))
    (folder / "clouds").mkdir()
    for split in records:
        path = folder / "clouds" / f"{split}-00000.safetensors"
        write_shard(path, clouds[split], records[split], config={}, dtype="float32")
    return folder


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [("plr_osnet", {}, (64, 32)), ("qaconv50", {"height": 64, "width": 32}, (64, 32))],
)
def test_methods_of_crops_are_explained(name, kwargs, size, crops, capsys, tmp_path):
    torch.manual_seed(0)
    model, run = create_model(name, **kwargs), tmp_path / "run"
    model.size = size
    (run / "features").mkdir(parents=True)
    save_weights(model, run / "model.safetensors", trained_on=json.dumps({"size": size}))
    for split in ("query", "gallery"):
        features = extract(model, getattr(open_dataset(crops / "people"), split))
        features.save(run / "features" / f"{split}.safetensors")
    out = tmp_path / "out.png"
    assert call(capsys, run, "--explain", "1", "--out", out) == (0, f"{out}\n", "")
    plain = Image.open(out).size
    assert call(capsys, run, "--explain", "1", "--clouds", crops / "clouds", "--out", out)[0] == 0
    assert (Image.open(out).width > plain[0]) == (name == "qaconv50")
    if name == "qaconv50":
        (crops / "none").mkdir(exist_ok=True)
        assert "holds no cloud shards" in one_line(
            call(capsys, run, "--explain", "1", "--clouds", crops / "none", "--out", out)[2]
        )


def test_no_match_and_nobody_known(data, run):
    """The query's person in its own camera is no match; where nobody is known, all are, and none has a frame."""
    dataset = open_dataset(data)
    model = create_model(weights=run / "model.safetensors")
    query, gallery = (Features.load(run / "features" / f"{name}.safetensors") for name in ("query", "gallery"))
    mine = np.flatnonzero((gallery.pids == query.pids[0]) & (gallery.camids == query.camids[0]))
    with pytest.raises(ValueError, match="gallery must hold a match for query/"):
        explained(model, query, gallery.subset(mine), 0, dataset)
    from dataclasses import replace

    unknown = replace(gallery.subset(mine), pids=np.full(len(mine), -1))
    out = np.array(explained(model, query, unknown, 0, dataset, matches=1))
    assert not ((out == (46, 160, 67)).all(2) | (out == (207, 34, 46)).all(2)).any()
    other = replace(unknown, names=["nobody"] * len(mine))
    with pytest.raises(ValueError, match="dataset must hold nobody, which gallery of"):
        explained(model, query, other, 0, dataset, matches=1)
