"""Feature files, what is written for other tools, and extraction."""

import csv
import json
import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

from reid3d.data import EvalTransform, open_dataset
from reid3d.retrieval import Features, extract
from tests.capsules import write_capsules


def some(n: int = 3, **changes) -> Features:
    values = dict(
        feats=np.arange(n * 4, dtype=np.float32).reshape(n, 4),
        pids=np.arange(n) - 1,
        camids=np.full(n, 2),
        names=[f"query/ü {i}.jpg" for i in range(n)],
        times=np.arange(n) * 10,
        source="/data/market3d",
        split="query",
        made_by="0123",
    )
    return Features(**{**values, **changes})


class Moments(nn.Module):
    """Stands in for a network: mean and deviation of each input, which a scale changes."""

    inputs = "cloud"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, xyz: torch.Tensor, rgb: torch.Tensor) -> torch.Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        both = torch.cat([xyz, rgb], -1)
        return self.weight * torch.cat([both.std(1), both.mean(1) ** 2, torch.ones(len(both), 1)], -1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(write_capsules(tmp_path_factory.mktemp("features") / "shards"))


@pytest.mark.parametrize("features", [some(), some(0), some(times=None), some(names=["\udcff", "a\nb", "<"])])
def test_a_file_gives_back_what_was_saved(features, tmp_path):
    features.save(tmp_path / "f.safetensors")
    back = Features.load(tmp_path / "f.safetensors")
    for name in ("feats", "pids", "camids", "times"):
        np.testing.assert_array_equal(getattr(back, name), getattr(features, name))
    words = ("names", "source", "split", "made_by")
    assert [getattr(back, name) for name in words] == [getattr(features, name) for name in words]
    assert os.listdir(tmp_path) == ["f.safetensors"]


def test_the_same_features_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        some().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_save_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    some().save(tmp_path / "f")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        some(2).save(tmp_path / "f")
    assert len(Features.load(tmp_path / "f")) == 3
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("features", [some(), some(0), some(times=None), some(700)])
def test_a_memory_map_is_what_is_loaded(features, tmp_path, monkeypatch):
    monkeypatch.setattr("reid3d.retrieval.features._BLOCK", 10)
    features.save(tmp_path / "f")
    mapped = Features.load(tmp_path / "f", mmap=True)
    assert isinstance(mapped.feats, np.memmap) == (len(features) > 0) and mapped.feats.ctypes.data % 4 == 0
    for name in ("feats", "pids", "camids", "times"):
        np.testing.assert_array_equal(getattr(mapped, name), getattr(features, name))
    mapped.save(tmp_path / "g")
    assert (tmp_path / "g").read_bytes() == (tmp_path / "f").read_bytes()
    mapped.save(tmp_path / "f")  # over the very file
    np.testing.assert_array_equal(mapped.feats, features.feats)
    if len(features):
        with pytest.raises(ValueError, match="read-only"):
            mapped.feats[0] = 0
        mapped.subset([0])  # is no map, and checked


def test_files_that_safetensors_wrote_are_read_too(tmp_path):
    from safetensors.numpy import save_file

    text = json.dumps({"names": some().names, "source": "", "split": "", "made_by": ""}).encode()
    tensors = {name: getattr(some(), name) for name in ("feats", "pids", "camids", "times")}
    save_file(tensors | {"text": np.frombuffer(text, np.uint8)}, tmp_path / "f", {"format": "reid3d-features-1"})
    for mmap in (False, True):
        np.testing.assert_array_equal(Features.load(tmp_path / "f", mmap=mmap).feats, some().feats)
    tensors["feats"] = some().feats.astype(np.float16)
    save_file(tensors | {"text": np.frombuffer(text, np.uint8)}, tmp_path / "f", {"format": "reid3d-features-1"})
    for mmap in (False, True):
        with pytest.raises(ValueError, match="f is not a reid3d feature file: feats must be"):
            Features.load(tmp_path / "f", mmap=mmap)


def test_a_subset():
    part = some().subset(np.array([2, 0]))
    np.testing.assert_array_equal(part.feats, some().feats[[2, 0]])
    assert (part.pids.tolist(), part.camids.tolist(), part.times.tolist()) == ([1, -1], [2, 2], [20, 0])
    assert part.names == [some().names[2], some().names[0]]
    assert (part.source, part.split, part.made_by) == ("/data/market3d", "query", "0123")
    assert some(times=None).subset([1]).times is None and len(some().subset([])) == 0


AWKWARD = ["ü.jpg", "a,b.jpg", 'line\n"quoted"', "\udcff", "e.jpg"]


@pytest.mark.parametrize("times", [None, np.arange(5)])
def test_npy_and_its_table(times, tmp_path, monkeypatch):
    monkeypatch.setattr("reid3d.retrieval.features._BLOCK", 8)  # two rows
    features = some(5, names=AWKWARD, times=times)
    assert features.export(tmp_path / "f.npy") == [tmp_path / "f.npy", tmp_path / "f.csv"]
    written = np.load(tmp_path / "f.npy")
    assert written.dtype == np.float32 and written.tolist() == features.feats.tolist()
    with open(tmp_path / "f.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "pid", "camid", "time"]
    moments = [""] * 5 if times is None else [str(i) for i in range(5)]
    assert rows == [[name, str(i - 1), "2", moments[i]] for i, name in enumerate(AWKWARD)]
    some(0).export(tmp_path / "none.npy")
    assert np.load(tmp_path / "none.npy").shape == (0, 4)


@pytest.mark.parametrize("times", [None, np.arange(5)])
def test_parquet(times, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr("reid3d.retrieval.features._BLOCK", 8)
    features = some(5, names=AWKWARD, times=times)
    assert features.export(tmp_path / "f.parquet") == [tmp_path / "f.parquet"]
    table = pq.read_table(tmp_path / "f.parquet")
    assert table.column_names == ["id", "name", "pid", "camid", "time", "vector"]
    assert table["id"].to_pylist() == list(range(5)) and table["name"].to_pylist() == [*AWKWARD[:3], "?", "e.jpg"]
    assert table["pid"].to_pylist() == features.pids.tolist() and table["camid"].to_pylist() == [2] * 5
    assert table["time"].to_pylist() == ([None] * 5 if times is None else list(range(5)))
    assert table["vector"].to_pylist() == features.feats.tolist()
    assert table.schema.metadata == {b"made_by": b"0123", b"source": b"/data/market3d", b"split": b"query"}
    some(0).export(tmp_path / "none.parquet")
    assert len(pq.read_table(tmp_path / "none.parquet")) == 0


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_what_cannot_be_exported_leaves_nothing(name, tmp_path, monkeypatch):
    np.save(tmp_path / "nan", np.full((3, 4), np.nan, np.float32))
    broken = some(feats=np.load(tmp_path / "nan.npy", mmap_mode="r"))
    with pytest.raises(ValueError, match="feats must be finite, got NaN or infinity for query/ü 0.jpg"):
        broken.export(tmp_path / name)
    with pytest.raises(ValueError, match="path must end in .npy or .parquet, got .*f.bin"):
        some().export(tmp_path / "f.bin")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match="^a .parquet file needs pyarrow: pip install pyarrow$"):
        some().export(tmp_path / "f.parquet")
    assert os.listdir(tmp_path) == ["nan.npy"]


def test_other_files_are_refused(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(FileNotFoundError, match="no such feature file"):
        Features.load(tmp_path / "none")
    some().save(tmp_path / "f")
    whole = (tmp_path / "f").read_bytes()
    for damaged in (b"", whole[:40], whole[:-1], b"not a feature file"):
        (tmp_path / "damaged").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged is not a reid3d feature file"):
            Features.load(tmp_path / "damaged")
    save_file({"feats": np.zeros((1, 2), np.float32)}, tmp_path / "other")
    with pytest.raises(ValueError, match="its format is None"):
        Features.load(tmp_path / "other")
    tensors = {"feats": np.zeros((1, 2), np.float32), "text": np.frombuffer(b'{"names": ["a"]}', np.uint8)}
    save_file(tensors, tmp_path / "part", {"format": "reid3d-features-1"})
    with pytest.raises(ValueError, match="part is not a reid3d feature file"):
        Features.load(tmp_path / "part")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(feats=[[1.0]]), TypeError, "feats must be a float32 NumPy array"),
        (dict(feats=np.zeros((3, 4))), TypeError, "feats must be a float32 NumPy array, got float64"),
        (dict(feats=np.zeros((2, 4), np.float32)), ValueError, r"feats must have shape \(N, D\) with N = 3 names"),
        (dict(pids=np.zeros((3, 1), np.int64)), ValueError, r"pids must have shape \(N,\)"),
        (dict(camids=np.zeros(3, np.int32)), TypeError, "camids must be a int64 NumPy array, got int32"),
        (dict(times=np.zeros(2, np.int64)), ValueError, "times must have shape"),
        (dict(feats=np.full((3, 4), np.inf, np.float32)), ValueError, "feats must be finite, .* 3 of 3"),
    ],
)
def test_bad_features(changes, error, message):
    with pytest.raises(error, match=message):
        some(**changes)


def test_extract_sums_the_scales_and_normalises(dataset):
    model = Moments().eval()
    features = extract(model, dataset.gallery, batch=3, progress=False)
    with torch.inference_mode():
        for i in range(len(dataset.gallery)):
            xyz, rgb, *_ = dataset.gallery[i]
            total = model(xyz[None], rgb[None]) + model(1.1 * xyz[None], rgb[None])
            np.testing.assert_allclose(features.feats[i], (total / total.norm())[0].numpy(), atol=1e-6)
    split = dataset.gallery
    assert features.names == [record.name for record in split.records]
    np.testing.assert_array_equal(features.pids, split.pids)
    np.testing.assert_array_equal(features.camids, split.camids)
    assert (features.source, features.split) == (str(dataset.root), "gallery")
    one = extract(model, dataset.gallery, scales=[1.0], progress=False)
    assert np.abs(one.feats - features.feats).max() > 1e-3


def test_extract_does_not_depend_on_batch_or_workers_and_leaves_the_mode(dataset):
    model = Moments().train()
    first = extract(model, dataset.query, batch=1, progress=False)
    second = extract(model, dataset.query, batch=64, workers=1, progress=False)
    np.testing.assert_allclose(first.feats, second.feats, atol=1e-6)
    assert model.training


def test_extract_takes_as_many_points_as_the_model_was_trained_with(dataset):
    """Asked for, chosen for the split, trained with, 4096: the first of these that is there."""
    model, split = Moments(), dataset.gallery
    chosen = split.with_transform(EvalTransform(100))

    def with_points(points):
        return extract(Moments(), split.with_transform(EvalTransform(points)), progress=False).feats

    assert (extract(model, split, progress=False).feats == with_points(4096)).all()
    model.points = 200
    assert (extract(model, split, progress=False).feats == with_points(200)).all()
    assert (extract(model, chosen, progress=False).feats == with_points(100)).all()
    assert (extract(model, chosen, points=50, progress=False).feats == with_points(50)).all()
    model.background = False
    body = EvalTransform(200, background=False)
    assert (
        extract(model, split, progress=False).feats
        == extract(Moments(), split.with_transform(body), progress=False).feats
    ).all()
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        extract(model, split, points=0)


def test_made_by_is_that_of_weights_points_and_scales(dataset):
    def made_by(split=dataset.query, weight=1.0, **more):
        model = Moments()
        nn.init.constant_(model.weight, weight)
        return extract(model, split, progress=False, **more).made_by

    same = made_by()
    assert same and made_by(dataset.gallery, batch=1) == same
    assert len({same, made_by(points=100), made_by(weight=2.0), made_by(scales=[1.0])}) == 4
    assert some(made_by="").made_by == ""
    model = Moments()
    model.background = False
    assert extract(model, dataset.query, progress=False).made_by != made_by()


def test_extract_follows_the_device(dataset, device):
    model = Moments()
    features = extract(model, dataset.query, device=device, progress=False)
    assert next(model.parameters()).device.type == torch.device(device).type
    np.testing.assert_allclose(features.feats, extract(Moments(), dataset.query, progress=False).feats, atol=1e-5)


def test_extract_errors(dataset):
    model = Moments()
    with pytest.raises(ValueError, match="split must not be empty, got 'all' of "):
        extract(model, dataset.all)
    with pytest.raises(ValueError, match="scales must not be empty"):
        extract(model, dataset.query, scales=[])
    with pytest.raises(ValueError, match="batch must be at least 1 and workers at least 0, got 0 and 0"):
        extract(model, dataset.query, batch=0)
    model.inputs = "image"
    with pytest.raises(ValueError, match="model must take clouds, as .* holds, got one that takes images"):
        extract(model, dataset.query)


def test_extract_refuses_nan(dataset):
    model = Moments().train()
    nn.init.constant_(model.weight, torch.nan)
    with pytest.raises(ValueError, match="feats must be finite"):
        extract(model, dataset.query, progress=False)
    assert model.training


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(dataset, monkeypatch, capsys):
    monkeypatch.setattr("reid3d.progress.SECONDS_BETWEEN_LINES", -1.0)
    extract(Moments(), dataset.gallery, batch=4)
    assert capsys.readouterr().err == "features of gallery: 4 of 6 clouds\nfeatures of gallery: 6 of 6 clouds\n"
    extract(Moments(), dataset.gallery, progress=False)
    assert capsys.readouterr().err == ""
