"""Synthetic people: labels that agree with the pixels, identities that differ, the same data set every time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from math import pi
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reid3d.io import hold_folder
from reid3d.ops import rasterize
from reid3d.preprocess.body import load_body
from reid3d.preprocess.camera import project
from reid3d.preprocess.synth import synth
from reid3d.preprocess.synth.people import BAG, HAIR, TOP, Tailor, hsv_to_rgb, sample_people, sample_poses
from reid3d.preprocess.synth.render import Renderer, sample_backgrounds, sample_views
from reid3d.preprocess.train_fitter import project_joints

NAME = re.compile(r"(-1|\d{4})_c[1-6]s[1-6]_\d{6}_\d{2}\.jpg")


def contents(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file() and p.name != ".lock"
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synth(tmp_path_factory.mktemp("synth") / "set", ids=6, cams=2, images=3, seed=3, progress=False)


@pytest.fixture(scope="module")
def rendered():
    g = torch.Generator().manual_seed(0)
    people = sample_people(24, g)
    poses = sample_poses(people, torch.rand(24, generator=g) * 2 * pi, torch.zeros(24, dtype=torch.bool), g)
    return Renderer()(people, poses, sample_views(24, g), sample_backgrounds(24, 64, g), g)


def test_truth_agrees_with_the_silhouette(rendered) -> None:
    images, truth = rendered
    assert images.shape == (24, 128, 64, 3) and images.dtype == torch.uint8
    body = load_body("low")
    verts, joints = body(truth.rotmats, truth.betas)
    error = (project_joints(joints, truth.cam) - truth.joints2d).norm(dim=-1) * 64
    assert error.mean() < 1.5  # pixels between the true perspective and the weak one
    naked = rasterize(project(verts, truth.cam, 128, 64), body.faces, 128, 64).face >= 0
    both, either = (naked & truth.mask).sum((1, 2)), (naked | truth.mask).sum((1, 2))
    assert (both / either).median() > 0.75  # clothes and backpacks are not in the body


def test_truth_of_naked_people_far_away_is_exact() -> None:
    # From 500 m perspective is weak, and without clothes the silhouette is the body's: labels a pixel off would show.
    g = torch.Generator().manual_seed(0)
    people = sample_people(8, g)
    people = replace(people, thickness=torch.zeros(8, 3), bag=torch.zeros(8))
    poses = sample_poses(people, torch.rand(8, generator=g) * 2 * pi, torch.zeros(8, dtype=torch.bool), g)
    views = replace(sample_views(8, g), distance=torch.full((8,), 500.0))
    _, truth = Renderer()(people, poses, views, sample_backgrounds(8, 64, g), g)
    body = load_body("low")
    verts, joints = body(truth.rotmats, truth.betas)
    assert (project_joints(joints, truth.cam) - truth.joints2d).abs().max() * 64 < 0.1
    naked = rasterize(project(verts, truth.cam, 128, 64), body.faces, 128, 64).face >= 0
    both, either = (naked & truth.mask).sum((1, 2)), (naked | truth.mask).sum((1, 2))
    assert (both / either).min() > 0.93  # shoes stand off by 8 mm


def test_people_differ(rendered) -> None:
    people = sample_people(200, torch.Generator().manual_seed(1))
    assert people.betas.std(0).min() > 0.7
    assert people.colour[:, TOP].std(0).min() > 0.2
    assert 0.1 < (people.bag > 0).float().mean() < 0.4
    assert people.stride.std() > 0.1 and people.cadence.std() > 0.05  # gait


def test_clothes_cover_what_they_should() -> None:
    body = load_body("low")
    tailor = Tailor(body)
    people = sample_people(1, torch.Generator().manual_seed(0))
    dressed = {
        name: tailor.regions(tailor.fields, replace(people, **{
            "sleeve": torch.tensor([[sleeve]]), "hem": torch.tensor([[hem]]), "trouser": torch.tensor([[1.05]]),
            "hair": torch.tensor([[0.0]]), "bag": torch.tensor([[bag]]),
        }))[0]
        for name, sleeve, hem, bag in (("shirt", 0.25, 0.05, 0), ("coat", 1.05, 0.5, 0), ("packed", 0.25, 0.05, 0.1))
    }  # fmt: skip
    count = {name: Counter(region.tolist()) for name, region in dressed.items()}
    assert count["coat"][TOP] > count["shirt"][TOP] + 100
    assert count["shirt"][BAG] == 0 and count["packed"][BAG] > 50
    back = body.v_template[dressed["packed"] == BAG][:, 2]
    assert (back < 0).float().mean() > 0.7  # the pack is behind, only its straps in front
    hair = body.v_template[dressed["shirt"] == HAIR]
    assert (hair[:, 1] > body.j_template[15, 1]).all()


def test_colours() -> None:
    got = hsv_to_rgb(torch.tensor([[0.0, 1, 1], [1 / 3, 1, 1], [2 / 3, 1, 0.5], [0.5, 0, 0.7]]))
    torch.testing.assert_close(got, torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 0.5], [0.7, 0.7, 0.7]]))


def test_layout_is_that_of_market(small: Path) -> None:
    names = {
        f: sorted(p.name for p in (small / f).iterdir()) for f in ("bounding_box_train", "query", "bounding_box_test")
    }
    assert all(NAME.fullmatch(n) for folder in names.values() for n in folder)
    pids = {folder: Counter(n.split("_")[0] for n in files) for folder, files in names.items()}
    assert pids["bounding_box_train"] == {"0001": 6, "0002": 6, "0003": 6}
    assert pids["query"] == {"0004": 2, "0005": 2, "0006": 2}  # one for each camera
    test = pids["bounding_box_test"]
    assert {p: test[p] for p in ("0004", "0005", "0006")} == {"0004": 4, "0005": 4, "0006": 4}
    assert test["0000"] > 0 and test["-1"] > 0
    assert all(Image.open(p).size == (64, 128) for p in (small / "query").iterdir())


def test_truth_file_covers_every_crop(small: Path) -> None:
    truth = np.load(small / "gt.npz")
    names = truth["names"].tolist()
    assert sorted(names) == sorted(str(p.relative_to(small)) for p in small.glob("*/*.jpg"))
    assert len(set(names)) == len(names)
    same = [i for i, n in enumerate(names) if "/0004_" in n]
    assert np.ptp(truth["betas"][same], axis=0).max() == 0  # a person keeps their shape
    mask = np.unpackbits(truth["mask"], axis=1).reshape(-1, 128, 64)
    assert 0.1 < mask[same].mean() < 0.6


def test_same_seed_same_bytes_whatever_the_threads(small: Path, tmp_path: Path) -> None:
    code = f"from reid3d.preprocess.synth import synth; synth({str(tmp_path / 'b')!r}, ids=6, cams=2, images=3, seed=3)"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert contents(tmp_path / "b") == contents(small)


def test_other_seed_other_people(small: Path, tmp_path: Path) -> None:
    other = synth(tmp_path / "b", ids=6, cams=2, images=3, seed=4, progress=False)
    a, b = (np.load(root / "gt.npz")["betas"] for root in (small, other))
    assert np.abs(a - b).min() > 0


def test_killed_run_is_finished_by_the_same_call(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    code = f"from reid3d.preprocess.synth import synth; synth({str(out)!r}, ids=6, cams=2, images=3, seed=3)"
    process = subprocess.Popen([sys.executable, "-c", code])
    while len(list(out.glob("bounding_box_train/*.jpg"))) < 4:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads((out / "synth.json").read_text())["complete"] is False
    synth(out, ids=6, cams=2, images=3, seed=3, progress=False)
    assert contents(out) == contents(small)  # and no temporary file is left


@pytest.mark.parametrize("name", [".gt.npz.1.tmp", ".synth.json.1.tmp", "query/.0004_c1s1_000001_01.jpg.1.tmp"])
def test_what_a_killed_run_left_behind_goes(small: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "query").mkdir()
    (tmp_path / name).write_bytes(b"half")
    plan = {**json.loads((small / "synth.json").read_text()), "complete": False}
    (tmp_path / "synth.json").write_text(json.dumps(plan))
    synth(tmp_path, ids=6, cams=2, images=3, seed=3, progress=False)
    assert contents(tmp_path) == contents(small)


def test_long_walks_stay_in_the_street(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setattr("reid3d.progress.SECONDS_BETWEEN_LINES", -1.0)
    out = synth(tmp_path / "b", ids=2, cams=2, images=120)
    assert len(list(out.glob("query/*.jpg"))) == 2 and len(list(out.glob("bounding_box_train/*.jpg"))) == 240
    assert len(np.load(out / "gt.npz")["names"]) == len(list(out.glob("*/*.jpg")))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "synth: 240 of 960 images" and lines[-1] == "synth: 960 of 960 images"


@pytest.mark.parametrize("limit", [0, 2])
def test_full_disk_is_one_error_and_the_same_call_finishes(small: Path, tmp_path: Path, limit: int) -> None:
    out = tmp_path / "b"
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit} * 512, -1))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"from reid3d.preprocess.synth import synth; synth({str(out)!r}, ids=6, cams=2, images=3, seed=3)"
    )
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert failed.returncode == 1 and str(out) in failed.stderr.splitlines()[-1]
    synth(out, ids=6, cams=2, images=3, seed=3, progress=False)
    assert contents(out) == contents(small)


def test_second_run_into_the_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "b"
    out.mkdir()
    with hold_folder(out, "a test"), pytest.raises(OSError, match="another synth"):
        synth(out, ids=2, cams=2, images=2)


def test_errors(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ids must be in 2\.\.9000, got 1"):
        synth(tmp_path, ids=1)
    with pytest.raises(ValueError, match=r"cams must be in 2\.\.6, got 7"):
        synth(tmp_path, cams=7)
    with pytest.raises(ValueError, match=r"images must be in 2\.\.1000, got 1"):
        synth(tmp_path, images=1)
    with pytest.raises(ValueError, match="out must be empty or made by the same command"):
        synth(small, ids=8, cams=2, images=3, seed=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="with other files"):
        synth(tmp_path / "other")
    for text in ("[]", "", '{"format": 1}'):
        (tmp_path / "other" / "synth.json").write_text(text)
        with pytest.raises(ValueError, match="synth.json is no note of synth"):
            synth(tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out must be a folder, got the file"):
        synth(tmp_path / "file")
    assert (tmp_path / "other" / "thesis.txt").read_text() == "mine"
