"""Files of others: by hand, there and back, and broken."""

import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from reid3d.cloud import PointCloud
from reid3d.data import open_dataset
from reid3d.formats import (
    export_tree,
    from_pyg,
    read_glb,
    read_obj,
    read_ply,
    to_pyg,
    write_glb,
    write_obj,
    write_ply,
)
from reid3d.io import Record, write_shard
from reid3d.preprocess.batch import convert_folder, verify
from reid3d.preprocess.body import load_body
from reid3d.preprocess.convert import Recipe
from reid3d.preprocess.published import grid_camera, is_obj_tree, list_obj_tree
from reid3d.preprocess.synth import synth
from tests.test_fuzz import mutated
from tests.test_io import cloud, same

# PLY

HEADER = (
    "ply\nformat {order} 1.0\ncomment by hand\nelement vertex 2\nproperty uchar red\nproperty uchar green\n"
    "property uchar blue\nproperty float x\nproperty double y\nproperty float z\n{more}end_header\n"
)


@pytest.mark.parametrize(("order", "sign"), [("binary_little_endian", "<"), ("binary_big_endian", ">")])
def test_ply_by_hand(tmp_path, order, sign):
    body = struct.pack(f"{sign}3Bfdf3Bfdf", 1, 2, 3, 0.5, -0.25, 2, 255, 0, 9, -1, 0, 1)
    (tmp_path / "a.ply").write_bytes(HEADER.format(order=order, more="").encode() + body)
    read = read_ply(tmp_path / "a.ply")
    assert read.xyz.tolist() == [[0.5, -0.25, 2], [-1, 0, 1]]
    assert read.rgb.tolist() == [[1, 2, 3], [255, 0, 9]]
    assert read.vertex.tolist() == [-1, -1]


def test_ply_faces_after_the_points_are_left_out(tmp_path):
    more = "property int vertex\nelement face 1\nproperty list uchar int vertex_indices\n"
    body = struct.pack("<3Bfdfi3Bfdfi4B", *(1, 2, 3, 1, 1, 1, 8), *(4, 5, 6, 2, 2, 2, -1), 3, 0, 1, 1)
    (tmp_path / "a.ply").write_bytes(HEADER.format(order="binary_little_endian", more=more).encode() + body)
    assert read_ply(tmp_path / "a.ply").vertex.tolist() == [8, -1]


def test_ply_bytes(tmp_path):
    one = PointCloud(np.array([[1, 2, 3]], np.float32), np.array([[4, 5, 6]], np.uint8), np.array([7], np.int32))
    write_ply(tmp_path / "a.ply", one)
    header = (
        b"ply\nformat binary_little_endian 1.0\nelement vertex 1\nproperty float x\nproperty float y\n"
        b"property float z\nproperty uchar red\nproperty uchar green\nproperty uchar blue\nproperty int vertex\n"
        b"end_header\n"
    )
    assert (tmp_path / "a.ply").read_bytes() == header + struct.pack("<3f3Bi", 1, 2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("n", [0, 1, 300])
def test_ply_round_trip_is_exact(tmp_path, n):
    write_ply(tmp_path / "a.ply", cloud(n))
    assert same(read_ply(tmp_path / "a.ply"), cloud(n))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not a PLY file"),
        (b"\x89PNG\r\n", "not a PLY file"),
        (HEADER.format(order="ascii", more="").encode(), "format must be binary, got ascii"),
        (
            HEADER.format(order="binary_little_endian", more="").encode() + bytes(37),
            "truncated: 2 points need 38 bytes",
        ),
        (HEADER.format(order="binary_little_endian", more="property list uchar int x\n").encode(), "unknown vertex"),
        (b"ply\nformat binary_little_endian 1.0\nelement face 2\nend_header\n", "first element must be vertex"),
        (b"ply\nformat binary_little_endian 1.0\nelement vertex 0\nend_header\n", "properties missing: .*'blue'"),
        (
            HEADER.format(order="binary_little_endian", more="").replace("uchar", "float").encode() + bytes(56),
            "red, green and blue must be uchar",
        ),
        (
            HEADER.format(order="binary_little_endian", more="").encode() + bytes(3) + b"\xff" * 35,
            "xyz must be finite",
        ),
        (b"ply\nformat\nelement vertex 1\nend_header\n", "not a PLY file"),
        (b"ply\nformat binary_little_endian 1.0\nelement vertex %s\nend_header\n" % (b"9" * 5000), "and their number"),
        (
            HEADER.format(order="binary_little_endian", more="").replace("2", "9" * 18).encode() + bytes(38),
            "truncated: 9{18} points need 189{16}81 bytes, got 38",
        ),
        (HEADER.format(order="binary_little_endian", more="property float x\n").encode(), "property x comes twice"),
        (
            HEADER.format(order="binary_little_endian", more="").encode()
            + 2 * struct.pack("<3Bfdf", *bytes(4), 1e300, 0),
            "xyz must be finite",
        ),
    ],
)
def test_bad_ply_is_refused_by_name(tmp_path, data, words):
    path = tmp_path / "a.ply"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{path}: .*{words}"):
        read_ply(path)


@pytest.mark.parametrize(
    ("kind", "code", "value"), [("uint", "I", 2**32 - 1), ("int", "i", -2), ("float", "f", 1.5), ("float", "f", np.nan)]
)
def test_what_is_no_vertex_number_is_refused_by_name(tmp_path, kind, code, value):
    head = HEADER.format(order="binary_little_endian", more=f"property {kind} vertex\n").encode()
    (tmp_path / "a.ply").write_bytes(head + struct.pack(f"<3Bfdf{code}3Bfdf{code}", *bytes(6), 3, *bytes(6), value))
    with pytest.raises(ValueError, match=f"a.ply: vertex must be a body vertex or -1 .background., got {value}"):
        read_ply(tmp_path / "a.ply")


# The published text clouds


def test_obj_by_hand(tmp_path):
    text = "v 0.100000 -0.500000 1.250000 0.000000 0.501961 1.000000\nv -1.000000 0.000000 0.000000 1 1 1\nf 1 2 3\n"
    (tmp_path / "a.obj").write_text(text)
    read = read_obj(tmp_path / "a.obj")
    assert read.xyz.tolist() == np.float32([[0.1, -0.5, 1.25], [-1, 0, 0]]).tolist()
    assert read.rgb.tolist() == [[0, 128, 255], [255, 255, 255]]
    assert read.vertex.tolist() == [-1, -1]


def test_obj_text_has_the_body_in_vertex_order_then_the_background(tmp_path):
    xyz = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_obj(tmp_path / "a.obj", PointCloud(xyz, np.full((4, 3), 255, np.uint8), np.array([-1, 9, 2, -1], np.int32)))
    assert (tmp_path / "a.obj").read_text() == (
        "v 6.000000 7.000000 8.000000 1.000000 1.000000 1.000000\n"
        "v 3.000000 4.000000 5.000000 1.000000 1.000000 1.000000\n"
        "v 0.000000 1.000000 2.000000 1.000000 1.000000 1.000000\n"
        "v 9.000000 10.000000 11.000000 1.000000 1.000000 1.000000\n"
        "f 1 2 3\n"
    )


def test_obj_round_trip_keeps_every_colour_and_six_decimals(tmp_path):
    colours = np.arange(256, dtype=np.uint8)
    c = PointCloud(cloud(256).xyz, np.stack([colours] * 3, 1), np.full(256, -1, np.int32))
    write_obj(tmp_path / "a.obj", c)
    read = read_obj(tmp_path / "a.obj")
    assert np.array_equal(read.rgb, c.rgb)
    assert np.abs(read.xyz - c.xyz).max() < 1e-6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 'no "v x y z r g b" lines'),
        ("\x00\xff", 'no "v x y z r g b" lines'),
        ("v 1 2 3\n", "must hold x y z and three colours"),
        ("v 1 2 3 0 0 2\n", "three colours in 0..1"),
        ("v 1 2 3 0 0 nan\n", "three colours in 0..1"),
        ("v 1 2 3 0 0 0\nv 1 2 3 0 0\n", "columns"),
        ("v 1 2 3 0 0 x\n", "could not convert"),
        ("v 1 2 inf 0 0 0\n", "xyz must be finite"),
        ("v 1e39 2 3 0 0 0\n", "xyz must be finite"),
        ("v \n", 'no "v x y z r g b" lines'),
        ("v \nv 1 2 3 0 0 0\n", "must hold x y z and three colours"),
        ("v #\nv 1 2 3 0 0 0\n", "could not convert"),
    ],
)
def test_bad_obj_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "a.obj"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: .*{words}"):
        read_obj(path)


# GLB


def test_glb_round_trip_is_exact(tmp_path, rng):
    body = load_body("low")
    verts, faces = body.v_template.numpy() + np.float32(0.1), body.faces.numpy()
    rgb = rng.integers(0, 256, verts.shape, np.uint8)
    write_glb(tmp_path / "a.glb", verts, faces, rgb)
    back = read_glb(tmp_path / "a.glb")
    assert all(np.array_equal(a, b) for a, b in zip(back, (verts, faces, rgb), strict=True))
    assert back[0].dtype == np.float32 and back[2].dtype == np.uint8


def test_glb_keeps_what_trimesh_would_tidy_up(tmp_path, rng):
    """Equal vertices, those without a face, faces without area or twice there, one colour throughout."""
    verts, faces = np.zeros((5, 3), np.float32), np.array([[0, 0, 0], [3, 1, 2], [3, 1, 2]])
    for rgb in (rng.integers(0, 256, (5, 3), np.uint8), np.full((5, 3), 102, np.uint8)):
        write_glb(tmp_path / "a.glb", verts, faces, rgb)
        assert all(np.array_equal(a, b) for a, b in zip(read_glb(tmp_path / "a.glb"), (verts, faces, rgb), strict=True))


def test_glb_stands_upright_and_faces_the_viewer(tmp_path):
    import trimesh

    # In the camera's frame the head is up at negative y, and what is near has the lesser z.
    verts = np.array([[0, -1, 0], [0, 1, 0], [1, 0, -0.5]], np.float32)
    write_glb(tmp_path / "a.glb", verts, np.array([[0, 1, 2]]), np.zeros((3, 3), np.uint8))
    mesh = trimesh.load(tmp_path / "a.glb", force="mesh", process=False)
    assert mesh.vertices.tolist() == [[0, 1, 0], [0, -1, 0], [1, 0, 0.5]]  # y up, z towards the viewer


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"verts": np.zeros((3, 2), np.float32)}, ValueError, r"verts must have shape \(N, 3\), got \(3, 2\)"),
        ({"verts": np.full((3, 3), np.nan, np.float32)}, ValueError, "verts must be finite"),
        ({"verts": np.zeros((2, 3), np.float32)}, ValueError, "as many as rgb, 3, got 2"),
        ({"faces": np.array([[0, 1, 3]])}, ValueError, "faces must hold indices between 0 and 2, got 0 to 3"),
        ({"faces": np.zeros((0, 3), int)}, ValueError, "faces must hold at least one triangle, got none"),
        ({"verts": np.zeros((3, 3))}, TypeError, "verts must be a NumPy array of float32, got float64"),
        ({"verts": [[0.0, 0, 0]] * 3}, TypeError, "verts must be a NumPy array of float32, got list"),
        ({"faces": np.zeros((1, 3))}, TypeError, "faces must be a NumPy array of integer, got float64"),
        ({"rgb": np.zeros((3, 3), np.uint16)}, TypeError, "rgb must be a NumPy array of uint8, got uint16"),
    ],
)
def test_what_no_glb_can_be_made_of(tmp_path, change, error, words):
    good = {"verts": np.zeros((3, 3), np.float32), "faces": np.array([[0, 1, 2]]), "rgb": np.zeros((3, 3), np.uint8)}
    with pytest.raises(error, match=words):
        write_glb(tmp_path / "a.glb", **{**good, **change})
    assert not (tmp_path / "a.glb").exists()


def test_a_glb_of_bad_numbers_is_refused_by_name(tmp_path):
    path, verts = tmp_path / "a.glb", np.array([[0, 0, 0], [0, 1, 0], [1, 0, 7.5]], np.float32)
    write_glb(path, verts, np.array([[0, 1, 2]]), np.zeros((3, 3), np.uint8))
    whole = path.read_bytes()
    end = 20 + int.from_bytes(whole[12:16], "little")
    text, rest = whole[20:end], whole[end:]
    for old, new, words in (
        (struct.pack("<f", -7.5), struct.pack("<f", np.nan), "finite vertices"),
        (struct.pack("<3I", 0, 1, 2), struct.pack("<3I", 0, 1, 9), "not a GLB mesh: index 9 is out of bounds"),
        (b'"count":3', b'"count":' + b"9" * 12, "not a GLB mesh"),
        (b'"count":3', b'"count":-3', "not a GLB mesh"),
    ):
        assert old in text + rest
        changed = [part.replace(old, new) for part in (text, rest)]
        changed[0] += b" " * (-len(changed[0]) % 4)
        lengths = struct.pack("<2I", 20 + sum(map(len, changed)), len(changed[0]))
        path.write_bytes(whole[:8] + lengths + whole[16:20] + b"".join(changed))
        with pytest.raises(ValueError, match=f"{path}: .*{words}"):
            read_glb(path)
    with pytest.raises(IsADirectoryError):
        read_glb(tmp_path)


@pytest.mark.parametrize("data", [b"", b"glTF", b"text" * 100])
def test_bad_glb_is_refused_by_name(tmp_path, data):
    (tmp_path / "a.glb").write_bytes(data)
    with pytest.raises(ValueError, match=f"{tmp_path / 'a.glb'}: "):
        read_glb(tmp_path / "a.glb")
    with pytest.raises(FileNotFoundError):
        read_glb(tmp_path / "none.glb")


@pytest.mark.parametrize(
    ("package", "call"), [("trimesh", lambda: read_glb("a.glb")), ("torch_geometric", lambda: to_pyg(cloud(3)))]
)
def test_what_is_not_installed_is_named(monkeypatch, package, call):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        call()


# PyG


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_pyg_round_trip_is_exact(n, seed):
    c = cloud(n, seed)
    data = to_pyg(c)
    assert data.num_nodes == n and data.x.dtype == data.pos.dtype == torch.float32
    assert same(from_pyg(data), c)


def test_pyg_batches():
    batch = Batch.from_data_list([to_pyg(cloud(n, n)) for n in (3, 5)])
    assert batch.batch.tolist() == [0] * 3 + [1] * 5
    assert all(same(from_pyg(data), cloud(n, n)) for n, data in zip((3, 5), batch.to_data_list(), strict=True))


def test_data_that_is_no_cloud():
    assert from_pyg(Data(x=torch.zeros(2, 3), pos=torch.zeros(2, 3))).vertex.tolist() == [-1, -1]
    for data, words in (
        (Data(pos=torch.zeros(2, 3)), r"data must have x, got \['pos'\]"),
        (Data(x=torch.zeros(2, 3) + 2, pos=torch.zeros(2, 3)), r"data.x must hold colours in 0..1"),
        (Data(x=torch.zeros(2, 3), pos=torch.zeros(3, 3)), "data: rgb must have shape"),
        (Data(x=torch.zeros(2, 3), pos=torch.full((2, 3), torch.nan)), "data: xyz must be finite"),
        (Data(x=torch.zeros(3), pos=torch.zeros(())), "data: xyz must have shape"),
        (
            Data(x=torch.zeros(1, 3), pos=torch.zeros(1, 3), vertex=torch.tensor([2**32])),
            "vertex must be a body vertex",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            from_pyg(data)
    with pytest.raises(TypeError, match=r"data.pos must be a torch.Tensor, got ndarray"):
        from_pyg(Data(x=torch.zeros(2, 3), pos=np.zeros((2, 3))))


def test_data_of_other_precision():
    c = cloud(9)
    for dtype in (torch.float64, torch.bfloat16):
        data = to_pyg(c)
        data.x, data.pos = data.x.double(), data.pos.to(dtype)
        assert np.array_equal(from_pyg(data).rgb, c.rgb)
        np.testing.assert_allclose(from_pyg(data).xyz, c.xyz, rtol=0 if dtype == torch.float64 else 2**-8)


# Accidents


def a_mesh(path):
    write_glb(path, cloud(9).xyz, np.arange(9).reshape(3, 3), cloud(9).rgb)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (lambda path: write_ply(path, cloud(9)), read_ply),
        (lambda path: write_obj(path, cloud(9)), read_obj),
        (a_mesh, read_glb),
    ],
    ids=["ply", "obj", "glb"],
)
def test_broken_files_are_named_in_one_line(tmp_path, rng, write, read):
    path, refused = tmp_path / "a", 0
    write(path)
    whole = path.read_bytes()
    for _ in range(1000):
        path.write_bytes(mutated(whole, rng))
        try:
            read(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 500


# Published trees


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return synth(tmp_path_factory.mktemp("formats") / "people", ids=4, cams=2, images=2, seed=2, progress=False)


@pytest.fixture(scope="module")
def shards(people):
    """Clouds as the published converter makes them."""
    out = people.parent / "clouds"
    convert_folder(people, out, Recipe(mode="official"), shard_size=5, progress=False)
    return out


def test_a_tree_there_and_back(people, shards, tmp_path):
    tree, back = tmp_path / "3DMarket+bg", tmp_path / "back"
    data = open_dataset(shards)
    total = sum(map(len, (data.train, data.query, data.gallery)))
    assert export_tree(shards, tree, format="obj", progress=False) == total
    first = data.train.records[0]
    name = first.name.split("/")[1]
    assert (tree / "train_all" / f"{first.pid:04d}" / f"{name}.obj").is_file() and is_obj_tree(tree)
    assert {path.name for path in tree.iterdir()} == {"train_all", "query", "gallery"}
    assert export_tree(shards, tree, format="obj", progress=False) == 0  # all there

    report = convert_folder(tree, back, shard_size=5, progress=False)
    assert (report.written, report.failed, report.quality) == (total, 0, None) and verify(back) == []
    again = open_dataset(back)
    for split in ("train", "query", "gallery"):
        old, new = getattr(data, split), getattr(again, split)
        order = [[n.rsplit("/")[-1].removesuffix(".obj") for n in s.names] for s in (old, new)]
        for j, name in enumerate(order[1]):
            i = order[0].index(name)
            a, b, r, s = old.cloud(i), new.cloud(j), old.records[i], new.records[j]
            assert (s.pid, s.camid, s.time, s.size, s.fit) == (r.pid, r.camid, r.time, (128, 64), "published")
            np.testing.assert_allclose(b.xyz, a.xyz, atol=1.1e-3)  # float16 of six decimals of float16
            assert np.array_equal(a.rgb, b.rgb) and np.array_equal(a.vertex >= 0, b.vertex >= 0)
            np.testing.assert_allclose(s.cam, r.cam, atol=2e-3)
    export_tree(back, tmp_path / "again", format="obj", progress=False)
    files = [{path.relative_to(t) for path in t.rglob("*.obj")} for t in (tree, tmp_path / "again")]
    assert files[0] == files[1] and len(files[0]) == total


@pytest.mark.parametrize("name", ["../../a.jpg", "a/../../../b.jpg", "{}/a.jpg"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    (tmp_path / "in").mkdir()
    name = name.format(tmp_path)
    record = Record(name, "all", -1, -1, -1, (2, 2), (1.0, 0.0, 0.0))
    write_shard(tmp_path / "in" / "all-00000.safetensors", [cloud(4)], [record], config={})
    with pytest.raises(ValueError, match=f"data names a cloud outside its folder: '{name}'"):
        export_tree(tmp_path / "in", tmp_path / "out", format="obj", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_two_clouds_of_one_name_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    records = [Record(name, "all", -1, -1, -1, (2, 2), (1.0, 0.0, 0.0)) for name in ("b.jpg", "a.jpg", "a.jpg")]
    write_shard(tmp_path / "in" / "all-00000.safetensors", [cloud(4)] * 3, records, config={})
    with pytest.raises(ValueError, match=f"data holds two clouds that would both be {tmp_path / 'out/all/a.jpg.ply'}"):
        export_tree(tmp_path / "in", tmp_path / "out", format="ply", progress=False)


def test_a_tree_is_written_as_published(shards, tmp_path):
    export_tree(shards, tmp_path, format="obj", progress=False)
    path = sorted(tmp_path.glob("query/*/*.obj"))[0]
    *points, last = path.read_text().splitlines()
    assert len(points) == 8192 and last.startswith("f ") and all(line.startswith("v ") for line in points)
    z = [line.split()[3] for line in points]
    body = len(points) - z[::-1].index(next(v for v in z[::-1] if v != z[-1]))
    assert 1000 < body < 4000  # then the background, on its plane


def test_a_ply_tree(shards, tmp_path):
    export_tree(shards, tmp_path, format="ply", progress=False)
    data = open_dataset(shards)
    record = data.gallery.records[0]
    path = next(tmp_path.glob(f"gallery/*/{record.name.split('/')[1]}.ply"))
    assert same(read_ply(path), data.gallery.cloud(0))
    with pytest.raises(ValueError, match="format must be one of obj, ply, got 'stl'"):
        export_tree(shards, tmp_path, format="stl")


def test_train_all_goes_before_its_parts(tmp_path):
    names = ["train/0002/0002_c1s1_000451_03.jpg.obj", "val/0002/0002_c2s1_000451_03.jpg.obj"]
    for name in names + ["query/0005/0005_c1_f0000003.jpg.obj", "query/0005/notes.txt", "gallery/x/nobody.jpg.obj"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    records, rejected = list_obj_tree(tmp_path)
    assert [(r.split, r.pid, r.camid, r.time) for r in records] == [
        ("train", 2, 1, 451),
        ("train", 2, 2, 451),
        ("query", 5, 1, 3),
    ]
    assert dict(rejected) == {
        "gallery/x/nobody.jpg.obj": "the name does not fit PID_cCAMERA..., such as 0002_c1s1_000451_03.jpg",
        "query/0005/notes.txt": "not a cloud: the extension must be .obj",
    }
    (tmp_path / "train_all" / "0002").mkdir(parents=True)
    (tmp_path / "train_all" / "0002" / "0002_c3s1_000451_03.jpg.obj").touch()
    assert [r.camid for r in list_obj_tree(tmp_path)[0]] == [3, 1]
    assert not is_obj_tree(tmp_path / "none") and not is_obj_tree(tmp_path / "train" / "0002")


def test_broken_files_of_a_tree_are_listed(tmp_path, shards):
    tree = tmp_path / "tree"
    export_tree(shards, tree, format="obj", progress=False)
    first, second, *_ = sorted(tree.glob("query/*/*.obj"))
    first.write_text("v 1 2 3 4 5 6\n")
    second.write_text("".join(second.read_text().splitlines(keepends=True)[:5001]))
    report = convert_folder(tree, tmp_path / "out", progress=False)
    assert report.failed == 2
    text = (tmp_path / "out" / "failures.jsonl").read_text()
    assert "three colours in 0..1" in text and "5001 points are not those of an image of 2:1" in text


def test_the_camera_of_a_grid():
    s, tx, ty = 1.1, 0.05, -0.2
    y, x = np.mgrid[:128, :64]
    xy = np.stack([(x.ravel() + 32) / 64 - 1, y.ravel() / 64 - 1], 1) / s - [tx, ty]
    assert grid_camera(np.round(xy, 6), 128, 64) == pytest.approx((s, tx, ty), abs=1e-5)
    some = np.random.default_rng(0).permutation(len(xy))[:5000]
    assert grid_camera(np.round(xy[some], 6), 128, 64) == pytest.approx((s, tx, ty), abs=1e-5)
    assert grid_camera(xy[xy[:, 0] > xy[:, 0].min() + 1e-3], 128, 64) == (0, 0, 0)
