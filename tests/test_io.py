import json
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file

from reid3d.cloud import PointCloud
from reid3d.io import Record, Shard, atomic_write, write_shard


def cloud(n, seed=0):
    rng = np.random.default_rng(seed)
    return PointCloud(
        rng.uniform(-1, 1, (n, 3)).astype(np.float32),
        rng.integers(0, 256, (n, 3), np.uint8),
        rng.integers(-1, 6890, n).astype(np.int32),
    )


def record(n, **changes):
    values = {"name": f"query/{n}.jpg", "split": "query", "pid": 7, "camid": 2, "time": 451, "size": (1, n)}
    return Record(**{**values, "cam": (0.9, 0.1, -0.2), "quality": {"visible": 0.25}, **changes})


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("xyz", "rgb", "vertex"))


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "query-00000.safetensors"
    sizes = (5, 1, 8)
    write_shard(path, [cloud(n, n) for n in sizes], [record(n) for n in sizes], config={"size": [1, 5]})
    return path


# Shard v1


def test_the_data_file_is_what_the_safetensors_library_reads(shard):
    tensors = load_file(shard)
    assert {name: (str(t.dtype), t.shape) for name, t in tensors.items()} == {
        "xyz": ("float16", (14, 3)),
        "rgb": ("uint8", (14, 3)),
        "vertex": ("int32", (14,)),
        "offsets": ("int64", (4,)),
    }
    assert tensors["offsets"].tolist() == [0, 5, 6, 14]
    clouds = [cloud(n, n) for n in (5, 1, 8)]
    assert np.array_equal(tensors["xyz"], np.concatenate([c.xyz for c in clouds]).astype(np.float16))
    assert np.array_equal(tensors["rgb"], np.concatenate([c.rgb for c in clouds]))
    assert np.array_equal(tensors["vertex"], np.concatenate([c.vertex for c in clouds]))


def test_the_manifest_is_json_lines(shard):
    lines = shard.with_suffix(".jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {
        "name": "query/5.jpg",
        "split": "query",
        "pid": 7,
        "camid": 2,
        "time": 451,
        "size": [1, 5],
        "cam": [0.9, 0.1, -0.2],
        "quality": {"visible": 0.25},
        "aspect": None,
        "fit": "default",
        "points": None,
    }
    assert len(lines) == 3


def test_a_cloud_of_another_number_of_points_says_so(tmp_path):
    path = tmp_path / "a.safetensors"
    write_shard(path, [cloud(7), cloud(5)], [record(5, points=7), record(5)], config={})
    shard = Shard(path)
    assert [len(shard[i]) for i in range(2)] == [r.num_points for r in shard.records] == [7, 5]
    with pytest.raises(ValueError, match="must have 7 points, got 5"):
        write_shard(path, [cloud(5)], [record(5, points=7)], config={})


def test_bodies_and_failures_go_along(tmp_path, rng):
    path = tmp_path / "a.safetensors"
    bodies = {"pose": rng.random((2, 24, 3), np.float32), "betas": rng.random((2, 10), np.float32)}
    failures = {"b.jpg": "empty file", "a.jpg": "truncated"}
    write_shard(path, [cloud(5)] * 2, [record(5)] * 2, config={"a": 1}, bodies=bodies, failures=failures)
    shard = Shard(path)
    shard.verify()
    assert shard.failures == failures and shard.config == {"a": 1}
    for i in (0, 1, -1):
        assert all(np.array_equal(array, bodies[name][i]) for name, array in shard.body(i).items())
        assert set(shard.body(i)) == {"pose", "betas"}
    write_shard(path, [cloud(5)], [record(5)], config={})
    assert Shard(path).body(0) == {} and Shard(path).failures == {}
    with pytest.raises(ValueError, match=r"bodies: pose must be float32 \(1, 24, 3\), got float32 \(2, 24, 3\)"):
        write_shard(path, [cloud(5)], [record(5)], config={}, bodies=bodies)


def test_metadata_names_format_config_versions_and_licence(shard):
    metadata = Shard(shard).metadata
    assert metadata["format"] == "reid3d-shard-1"
    assert json.loads(metadata["config"]) == {"size": [1, 5]}
    assert json.loads(metadata["versions"])["numpy"] == np.__version__
    assert "licence" in metadata["license"]


def test_a_shard_made_by_hand_is_read(tmp_path):
    tensors = {
        "xyz": np.array([[1, 2, 3], [4, 5, 6]], np.float32),
        "rgb": np.array([[1, 2, 3], [255, 0, 9]], np.uint8),
        "vertex": np.array([-1, 12], np.int32),
        "offsets": np.array([0, 2]),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "reid3d-shard-1"})
    line = '{"name":"x.png","split":"all","pid":-1,"camid":-1,"time":-1,"size":[2,1],"cam":[1,0,0],"quality":{}}\n'
    (tmp_path / "a.jsonl").write_text(line)
    shard = Shard(tmp_path / "a.safetensors")
    assert shard.records == [Record("x.png", "all", -1, -1, -1, (2, 1), (1.0, 0.0, 0.0), {})]
    assert same(shard[0], PointCloud(tensors["xyz"], tensors["rgb"], tensors["vertex"]))


def test_float32_is_exact_and_float16_within_the_documented_bound(tmp_path):
    rng = np.random.default_rng(3)
    xyz = (rng.uniform(-1, 1, (3000, 3)) * 10.0 ** rng.uniform(-9, 1, (3000, 1))).astype(np.float32)
    c = PointCloud(xyz, np.zeros((3000, 3), np.uint8), np.zeros(3000, np.int32))
    for dtype in ("float16", "float32"):
        write_shard(tmp_path / f"{dtype}.safetensors", [c], [record(3000)], config={}, dtype=dtype)
    assert same(Shard(tmp_path / "float32.safetensors")[0], c)
    error = np.abs(Shard(tmp_path / "float16.safetensors")[0].xyz.astype(np.float64) - xyz)
    assert (error <= np.maximum(np.abs(xyz) * 2.0**-11, 2.0**-25)).all()
    assert error[np.abs(xyz) < 2].max() < 0.0005


halves = hnp.arrays(np.float16, st.tuples(st.integers(1, 20), st.just(3)), elements=st.floats(-4, 4, width=16))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(halves, st.text(max_size=8)), max_size=4), st.sampled_from(["float16", "float32"]))
def test_round_trip(tmp_path_factory, parts, dtype):
    path = tmp_path_factory.mktemp("shard") / "s.safetensors"
    clouds = [PointCloud(xyz.astype(np.float32), cloud(len(xyz)).rgb, cloud(len(xyz)).vertex) for xyz, _ in parts]
    records = [record(len(xyz), name=name) for xyz, name in parts]
    write_shard(path, clouds, records, config={}, dtype=dtype)
    shard = Shard(path)
    assert shard.records == records
    assert len(shard) == len(parts)
    assert all(same(shard[i], clouds[i]) and same(shard[i - len(parts)], clouds[i]) for i in range(len(parts)))
    for i in (len(parts), -len(parts) - 1):
        with pytest.raises(IndexError, match="i must be in"):
            shard[i]


def test_the_same_clouds_give_the_same_bytes_in_another_process(tmp_path):
    code = (
        "import sys, numpy as np; from reid3d.cloud import PointCloud; from reid3d.io import Record, write_shard\n"
        "c = PointCloud(np.ones((4, 3), np.float32), np.ones((4, 3), np.uint8), np.ones(4, np.int32))\n"
        "r = Record('a.jpg', 'all', 1, 1, 1, (2, 2), (1.0, 0.0, 0.0), {'visible': 0.5, 'inside': 1.0})\n"
        "write_shard(sys.argv[1], [c], [r], config={'b': 1, 'a': 2})\n"
    )
    for name in ("one", "two", "three"):
        environment = {**os.environ, "PYTHONHASHSEED": str(len(name))}
        subprocess.run([sys.executable, "-c", code, tmp_path / f"{name}.safetensors"], check=True, env=environment)
    for suffix in (".safetensors", ".jsonl"):
        assert len({path.read_bytes() for path in tmp_path.glob(f"*{suffix}")}) == 1


def test_a_shard_is_pickled_without_its_file(shard):
    opened = Shard(shard)
    assert same(pickle.loads(pickle.dumps(opened))[2], opened[2])


def test_a_cloud_may_be_changed_without_touching_the_file(shard):
    before = shard.read_bytes()
    opened = Shard(shard)
    opened[0].rgb[:] = 3
    opened[0].vertex[:] = 3
    assert same(opened[0], Shard(shard)[0])
    assert shard.read_bytes() == before


def test_names_that_are_not_unicode_come_back(tmp_path):
    name = os.fsdecode(b"caf\xe9.jpg")
    write_shard(tmp_path / "a.safetensors", [cloud(3)], [record(3, name=name)], config={})
    assert Shard(tmp_path / "a.safetensors").records[0].name == name


def test_without_a_manifest_there_is_no_shard(shard):
    shard.with_suffix(".jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=str(shard.with_suffix(".jsonl"))):
        Shard(shard)


def test_writing_over_a_shard_takes_its_manifest_away_first(shard, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = shard.read_bytes()
    monkeypatch.setattr("reid3d.io.write_safetensors", full)
    with pytest.raises(OSError, match=f"No space left on device: '{shard}'"):
        write_shard(shard, [cloud(2)], [record(2)], config={})
    assert [path.name for path in shard.parent.iterdir()] == [shard.name]
    assert shard.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_data_file_is_refused_by_name(shard, keep):
    data = shard.read_bytes()
    shard.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=f"{shard}: not a whole safetensors file"):
        Shard(shard)


def test_a_truncated_manifest_is_refused_by_name(shard):
    manifest = shard.with_suffix(".jsonl")
    text = manifest.read_text()
    manifest.write_text(text[:-1])
    with pytest.raises(ValueError, match=f"{manifest}: the last line is cut off"):
        Shard(shard)
    manifest.write_text("".join(text.splitlines(keepends=True)[:2]))  # whole lines, too few
    with pytest.raises(ValueError, match=f"{shard}: offsets must be"):
        Shard(shard)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"hello\n", "not a manifest record"),
        (b"[1]\n", "not a manifest record"),
        (b"\xff\xfe\n", "not a manifest"),
        (b"{}\n", "not a manifest record"),
        (json.dumps({**vars(record(5)), "pid": "7"}).encode() + b"\n", "pid cannot be '7'"),
        (json.dumps({**vars(record(5)), "size": [5]}).encode() + b"\n", r"size cannot be \(5,\)"),
        (json.dumps({**vars(record(5)), "size": [0, 5]}).encode() + b"\n", r"size cannot be \(0, 5\)"),
        (json.dumps({**vars(record(5)), "cam": [1, 2, float("nan")]}).encode() + b"\n", r"cam cannot be \(1, 2, nan\)"),
        (json.dumps({**vars(record(5)), "time": 10**20}).encode() + b"\n", "time cannot be 1000"),
        (json.dumps({**vars(record(5)), "camid": True}).encode() + b"\n", "camid cannot be True"),
        (json.dumps({**vars(record(5)), "quality": {"a": "b"}}).encode() + b"\n", "quality cannot be"),
        (json.dumps({**vars(record(5)), "aspect": 0}).encode() + b"\n", "aspect cannot be 0"),
        (json.dumps({**vars(record(5)), "points": 0}).encode() + b"\n", "points cannot be 0"),
        (b"[" * 100_000 + b"\n", "not a manifest record"),
        (json.dumps({**vars(record(5)), "colour": 1}).encode() + b"\n", "colour"),
    ],
)
def test_a_foreign_manifest_is_refused_by_name(shard, line, words):
    manifest = shard.with_suffix(".jsonl")
    manifest.write_bytes(line)
    with pytest.raises(ValueError, match=f"{manifest}.*{words}"):
        Shard(shard)


def test_a_manifest_of_other_sizes_is_refused(shard):
    manifest = shard.with_suffix(".jsonl")
    manifest.write_text(manifest.read_text().replace("[1, 8]", "[1, 9]"))
    with pytest.raises(ValueError, match=f"{shard}: offsets must agree with the crop sizes"):
        Shard(shard)


@pytest.mark.parametrize(
    ("change", "metadata", "words"),
    [
        ({}, {"format": "other"}, "format must be reid3d-shard-1, got 'other'"),
        ({}, None, "format must be reid3d-shard-1, got None"),
        ({"extra": np.zeros(1)}, {"format": "reid3d-shard-1"}, "tensors must be"),
        ({"xyz": np.zeros((14, 3))}, {"format": "reid3d-shard-1"}, "xyz must be F16 or F32"),
        ({"rgb": np.zeros((13, 3), np.uint8)}, {"format": "reid3d-shard-1"}, r"rgb must be U8 \[14, 3\]"),
        ({"offsets": np.array([1, 5, 6, 14])}, {"format": "reid3d-shard-1"}, "offsets must agree"),
        ({"offsets": np.array([], np.int64)}, {"format": "reid3d-shard-1"}, "must be"),
    ],
)
def test_foreign_safetensors_are_refused_by_name(shard, change, metadata, words):
    save_file({**load_file(shard), **change}, shard, metadata=metadata)
    with pytest.raises(ValueError, match=f"{shard}: .*{words}"):
        Shard(shard)


def test_a_corrupt_cloud_is_refused_by_name(shard):
    tensors = load_file(shard)
    tensors["xyz"][5, 0] = np.nan
    save_file(tensors, shard, metadata={"format": "reid3d-shard-1"})
    opened = Shard(shard)
    assert len(opened[0]) == 5
    with pytest.raises(ValueError, match=f"{shard}: cloud 1 is corrupt: xyz must be finite"):
        opened[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"records": []}, r"records must be as many as clouds \(1\), got 0"),
        ({"records": [record(6)]}, "query/6.jpg must have 1 x 6 points, got 5"),
        ({"dtype": "float64"}, "dtype must be float16 or float32, got 'float64'"),
        ({"path": "a.npz"}, "path must end in .safetensors, got a.npz"),
    ],
)
def test_bad_arguments_of_write_shard(tmp_path, arguments, words):
    values = {"path": tmp_path / "a.safetensors", "clouds": [cloud(5)], "records": [record(5)], "config": {}}
    with pytest.raises(ValueError, match=words):
        write_shard(**{**values, **arguments})
    assert not list(tmp_path.iterdir())


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    far = PointCloud(np.full((1, 3), 7e4, np.float32), np.zeros((1, 3), np.uint8), np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="beyond float16's 65504 m"):
        write_shard(tmp_path / "a.safetensors", [far], [record(1)], config={})
    write_shard(tmp_path / "a.safetensors", [far], [record(1)], config={}, dtype="float32")
    assert same(Shard(tmp_path / "a.safetensors")[0], far)


# Files that appear whole or not at all


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"old")
    for name in ("a", "new"):  # `new` points to what is not there yet
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
        with atomic_write(tmp_path / name) as file:
            file.write(b"new")
        assert (tmp_path / name).is_symlink() and (tmp_path / "real" / name).read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a", "new", "new", "real"]


def test_what_is_not_a_file_is_written_to_and_stays(tmp_path):
    # a pipe, which stands for devices too: a failure of this test must not cost the machine one
    pipe, link, read = tmp_path / "pipe", tmp_path / "link", []
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
        reader.start()
        with atomic_write(path) as file:
            file.write(b"through")
        reader.join(10)
    assert read == [b"through"] * 2 and pipe.is_fifo() and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, pipe]


def test_a_pipe_without_a_reader_is_an_error_naming_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BrokenPipeError, match=f"'{tmp_path / 'pipe'}'"), atomic_write(tmp_path / "pipe") as file:
        os.close(reader)
        file.write(b"to nobody")
    assert (tmp_path / "pipe").is_fifo()


def test_a_full_disk_is_an_error_naming_the_file(tmp_path):
    code = (
        "import resource, sys; from reid3d.io import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with atomic_write(sys.argv[1]) as file: file.write(bytes(5000))\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a"], capture_output=True, text=True)
    assert run.stderr.strip().splitlines()[-1].endswith(f"File too large: '{tmp_path / 'a'}'")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_an_error_naming_the_file(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(NotADirectoryError, match=f"'{tmp_path / 'a' / 'b'}'"), atomic_write(tmp_path / "a" / "b"):
        pass
