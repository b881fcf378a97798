import io
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from reid3d.data import open_dataset
from reid3d.io import Shard
from reid3d.preprocess import convert as module
from reid3d.preprocess.convert import Report, convert, convert_folder, fit_crops

V = 8


class CubeFitter(nn.Module):
    """A fitter whose body is a cube, as far to the right as the crop is bright; black crops have no body."""

    def __init__(self, half=0.5, seconds=0.0):
        super().__init__()
        corners = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]).float()
        quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
        faces = torch.tensor([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))])
        self.register_buffer("corners", corners * half)
        self.body = SimpleNamespace(faces=faces)
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        brightness = images.float().mean((1, 2, 3)) / 255
        cam = torch.stack([torch.full_like(brightness, 0.8), brightness * 0.2, torch.zeros_like(brightness)], 1)
        cam[brightness == 0] = torch.nan
        return SimpleNamespace(verts=self.corners.expand(len(images), -1, -1), cam=cam)


def crop(path, grey, shape=(64, 128)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(grey)
    pixels = rng.integers(max(grey - 5, 0), grey + 6, (shape[1], shape[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def plain(folder, count=10):
    for i in range(count):
        crop(folder / f"{i:02d}.png", 20 + 20 * i)
    return folder


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def failures(out):
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {line["name"]: line["reason"] for line in map(json.loads, lines)}


def run(src, out, **options):
    return convert_folder(
        src, out, **{"batch": 3, "shard_size": 4, "fitter": CubeFitter(), "progress": False, **options}
    )


# One image


def test_a_crop_becomes_one_point_a_pixel(tmp_path):
    crop(tmp_path / "a.png", 100)
    cloud = convert(tmp_path / "a.png", fitter=CubeFitter())
    assert len(cloud) == 128 * 64
    assert np.array_equal(cloud.vertex[:4], [0, 2, 4, 6])  # the face towards the camera; the rest is hidden
    assert (cloud.vertex[4:] == -1).all()
    assert np.array_equal(cloud.xyz[:4], CubeFitter().corners[::2].numpy())
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    x, y = (0.8 * (np.array([-0.5, -0.5]) + [pixels.mean() / 255 * 0.2, 0]) * 128 + [64, 128]) / 2
    assert np.array_equal(cloud.rgb[0], pixels[int(y), int(x)])


def test_a_picture_in_memory_and_another_size():
    cloud = convert(Image.new("RGB", (30, 50), (10, 20, 30)), size=(64, 32), fitter=CubeFitter())
    assert len(cloud) == 64 * 32
    assert (cloud.rgb == [10, 20, 30]).all()


def test_what_convert_refuses(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=f"image: {tmp_path / 'a.jpg'}: not a JPEG"):
        convert(tmp_path / "a.jpg", fitter=CubeFitter())
    with pytest.raises(FileNotFoundError, match="no.jpg"):
        convert(tmp_path / "no.jpg", fitter=CubeFitter())
    with pytest.raises(ValueError, match="no body could be fitted"):
        convert(Image.new("RGB", (64, 128)), fitter=CubeFitter())
    with pytest.raises(ValueError, match=r"size must be .* at least 8 .*, got \(4, 64\)"):
        convert(Image.new("RGB", (64, 128)), size=(4, 64), fitter=CubeFitter())
    with pytest.raises(ValueError, match=r"size must be .* at most 50 megapixels, got \(9000, 9000\)"):
        convert(Image.new("RGB", (64, 128)), size=(9000, 9000), fitter=CubeFitter())
    with pytest.raises(TypeError, match=r"size must be two integers .*, got \(128.0, 64\)"):
        convert(Image.new("RGB", (64, 128)), size=(128.0, 64), fitter=CubeFitter())


@pytest.mark.parametrize(
    ("verts", "cam"),
    [
        (1.0, [torch.nan, 0, 0]),
        (1.0, [1e-9, 0, 0]),
        (1.0, [-1, 0, 0]),
        (1.0, [1, 1e6, 0]),
        (torch.inf, [1, 0, 0]),
        (1e6, [1, 0, 0]),
    ],
)
def test_a_fit_out_of_this_world_is_none(verts, cam):
    fitter = CubeFitter()
    fit = SimpleNamespace(verts=fitter.corners.repeat(2, 1, 1), cam=torch.tensor([[0.8, 0, 0], cam]))
    fit.verts[1, 3, 2] = verts
    fitter.forward = lambda images: fit
    crops = np.zeros((2, 128, 64, 3), np.uint8)
    good, bad = fit_crops(list(crops), fitter)
    assert bad is None
    assert good.quality == {"visible": 0.5, "inside": 1.0} and len(good.cloud) == 128 * 64


# A folder


def test_a_plain_folder(tmp_path):
    report = run(plain(tmp_path / "crops"), tmp_path / "out")
    assert (report.written, report.skipped, report.failed) == (10, 0, 0)
    assert report.clouds_per_second > 0
    assert sorted(contents(tmp_path / "out")) == sorted(
        [f"all-0000{k}.{suffix}" for k in range(3) for suffix in ("jsonl", "safetensors")]
        + ["dataset.json", "failures.jsonl"]
    )
    split = open_dataset(tmp_path / "out").all
    assert split.names == [f"{i:02d}.png" for i in range(10)]
    for i in (0, 3, 9):
        alone = convert(tmp_path / "crops" / f"{i:02d}.png", fitter=CubeFitter())
        assert np.array_equal(split.cloud(i).rgb, alone.rgb)
        assert np.array_equal(split.cloud(i).vertex, alone.vertex)
        assert np.abs(split.cloud(i).xyz - alone.xyz).max() < 0.001
    record = split.records[3]
    assert record.size == (128, 64)
    assert record.cam[0] == pytest.approx(0.8) and record.cam[1] == pytest.approx(80 / 255 * 0.2, abs=0.001)
    assert record.quality == {"visible": 2 / V, "inside": 1.0}  # the left corners miss the centres of their pixels


def test_quality_counts_what_falls_outside(tmp_path):
    crop(tmp_path / "a.png", 250)
    run(tmp_path / "a.png", tmp_path / "out", fitter=CubeFitter(half=0.56))  # its right side leaves the crop
    assert open_dataset(tmp_path / "out").all.records[0].quality == {"visible": 0.25, "inside": 0.5}


def test_market_layout(tmp_path):
    for i, name in enumerate(
        ["bounding_box_train/0002_c1s1_000451_03.jpg", "query/0005_c2s2_000010_00.jpg"]
        + ["bounding_box_test/-1_c1s1_000401_03.jpg", "bounding_box_test/0000_c6s4_002402_01.jpg"]
    ):
        crop(tmp_path / "market" / name, 50 + 10 * i)
    run(tmp_path / "market", tmp_path / "out")
    data = open_dataset(tmp_path / "out")
    assert [(r.name, r.pid, r.camid, r.time) for s in (data.train, data.query, data.gallery) for r in s.records] == [
        ("bounding_box_train/0002_c1s1_000451_03.jpg", 2, 1, 451),
        ("query/0005_c2s2_000010_00.jpg", 5, 2, 1_000_010),
        ("bounding_box_test/-1_c1s1_000401_03.jpg", -1, 1, 401),
        ("bounding_box_test/0000_c6s4_002402_01.jpg", 0, 6, 3_002_402),
    ]


def test_a_single_file(tmp_path):
    plain(tmp_path / "crops")
    assert run(tmp_path / "crops" / "03.png", tmp_path / "out").written == 1
    assert open_dataset(tmp_path / "out").all.names == ["03.png"]


@pytest.fixture(scope="module")
def bomb():
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def mixed(tmp_path, bomb):
    """Good crops among every kind of bad file."""
    src = plain(tmp_path / "crops", 6)
    Image.new("CMYK", (64, 128), (90, 0, 10, 0)).save(src / "cmyk.jpg")
    Image.fromarray(np.full((128, 64), 30000, np.uint16)).save(src / "sixteen.png")
    Image.open(src / "00.png").convert("P").save(src / "palette.png")
    good = (src / "00.png").read_bytes()
    (src / "zero.jpg").touch()
    (src / "truncated.png").write_bytes(good[: len(good) // 2])
    (src / "text.jpg").write_bytes(b"this is text")
    Image.new("RGB", (1, 1)).save(src / "dot.png")
    (src / "bomb.png").write_bytes(bomb)
    Image.new("RGB", (64, 128)).save(src / "black.png")
    (src / "gone.jpg").symlink_to(src / "nowhere.jpg")
    (src / "notes.txt").write_text("notes")
    (src / "Thumbs.db").write_bytes(b"thumbs")
    return src


BAD = {
    "black.png": "no body could be fitted",
    "bomb.png": "20000 x 20000 pixels: more than 50 megapixels",
    "dot.png": "1 x 1 pixels: a side must have at least 8",
    "gone.jpg": "cannot be read: No such file or directory",
    "notes.txt": "not an image name: the extension must be one of .jpg .jpeg .png .bmp .webp",
    "text.jpg": "not a JPEG, PNG, BMP or WebP image",
    "zero.jpg": "empty file",
}


def test_bad_files_are_lines_in_the_report_and_the_rest_is_converted(mixed, tmp_path):
    report = run(mixed, tmp_path / "out")
    assert (report.written, report.failed) == (9, 8)
    found = failures(tmp_path / "out")
    assert found.pop("truncated.png").startswith("broken image: ")
    assert found == BAD
    assert list(found) == sorted(found)
    assert open_dataset(tmp_path / "out").all.names == (
        [f"{i:02d}.png" for i in range(6)] + ["cmyk.jpg", "palette.png", "sixteen.png"]
    )
    assert str(report).endswith("0 were there, 8 files failed: see failures.jsonl")


def test_the_same_call_again_finds_all_done(mixed, tmp_path):
    run(mixed, tmp_path / "out")
    before = contents(tmp_path / "out")
    report = run(mixed, tmp_path / "out")
    assert report == Report(written=0, skipped=9, failed=8, clouds_per_second=0)
    assert contents(tmp_path / "out") == before


def test_a_file_that_failed_is_tried_again_once_it_changed(mixed, tmp_path):
    run(mixed, tmp_path / "out")
    (mixed / "zero.jpg").write_bytes((mixed / "cmyk.jpg").read_bytes())
    (mixed / "notes.txt").unlink()
    report = run(mixed, tmp_path / "out")
    assert (report.written, report.skipped, report.failed) == (2, 8, 6)  # its shard is made again
    run(mixed, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_crop_that_changed_is_converted_again_with_its_shard(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    run(src, out)
    before = contents(out)
    crop(src / "05.png", 240, shape=(70, 140))
    report = run(src, out)
    assert (report.written, report.skipped, report.failed) == (4, 6, 0)
    assert {name for name, data in contents(out).items() if data != before[name]} == {
        "all-00001.safetensors",
        "all-00001.jsonl",
    }
    run(src, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    (src / "05.png").write_bytes(b"no picture any more")
    report = run(src, out)
    assert (report.written, report.skipped, report.failed) == (3, 6, 1)
    assert failures(out) == {"05.png": "not a JPEG, PNG, BMP or WebP image"}


def test_the_bytes_depend_neither_on_threads_nor_on_when_it_ran(mixed, tmp_path, monkeypatch):
    for threads in (1, 7):
        monkeypatch.setattr(module, "DECODE_THREADS", threads)
        run(mixed, tmp_path / str(threads))
    assert contents(tmp_path / "1") == contents(tmp_path / "7")


# Stopped and begun again

SLOW = """
import sys
sys.path.insert(0, {tests!r})
from test_convert import CubeFitter, run
run({src!r}, {out!r}, fitter=CubeFitter(seconds={seconds}))
"""


def process(src, out, seconds=0.15, prelude=""):
    code = prelude + SLOW.format(tests=os.path.dirname(__file__), src=str(src), out=str(out), seconds=seconds)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path, running):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_is_finished_by_the_same_call(mixed, tmp_path, how):
    run(mixed, tmp_path / "whole")
    out = tmp_path / "out"
    running = process(mixed, out)
    wait_for(out / "all-00001.jsonl", running)
    running.send_signal(how)
    assert running.wait(60) != 0
    running.stderr.close()
    done = contents(out)
    assert "all-00003.jsonl" not in done
    with pytest.raises(ValueError, match="is not finished"):
        open_dataset(out)
    (out / ".all-00002.safetensors.999.tmp").write_bytes(b"half a shard")
    report = run(mixed, out)
    assert report.skipped >= 4 and report.written + report.skipped == 9 and report.failed == 8
    assert contents(out) == contents(tmp_path / "whole")
    for name in ("all-00000.safetensors", "all-00000.jsonl", "all-00001.safetensors", "all-00001.jsonl"):
        assert contents(out)[name] == done[name]


def test_a_shard_without_its_manifest_is_made_again(mixed, tmp_path):
    run(mixed, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "all-00001.jsonl").unlink()
    (tmp_path / "out" / "all-00002.safetensors").unlink()
    run(mixed, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_two_runs_into_one_folder(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    running = process(src, out, seconds=0.3)
    wait_for(out / "dataset.json", running)
    with pytest.raises(BlockingIOError, match=f"out: another conversion is writing into {out}"):
        run(src, out)
    assert running.wait(60) == 0, running.stderr.read()
    running.stderr.close()
    assert run(src, out).skipped == 10


def test_a_full_disk_loses_nothing_and_can_be_gone_on_from(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    for name in ("!a.jpg", "!b.jpg"):  # leave two clouds in the first shard, which then fits
        (src / name).touch()
    run(src, tmp_path / "whole")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))\n"
    running = process(src, out, seconds=0, prelude=limit)
    _, text = running.communicate(timeout=60)
    assert running.returncode == 1
    assert text.strip().splitlines()[-1] == f"OSError: [Errno 27] File too large: '{out / 'all-00001.safetensors'}'"
    assert sorted(contents(out)) == ["all-00000.jsonl", "all-00000.safetensors", "dataset.json", "failures.jsonl"]
    assert run(src, out).skipped == 2
    assert contents(out) == contents(tmp_path / "whole")


def test_an_output_that_cannot_be_written(tmp_path):
    src = plain(tmp_path / "crops", 2)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"'{tmp_path / 'file'}'"):
        run(src, tmp_path / "file")
    with pytest.raises(OSError, match=f"'{tmp_path / 'file' / 'out'}'"):
        run(src, tmp_path / "file" / "out")
    with pytest.raises(OSError, match="/proc/reid3d"):  # a place where not even root may write
        run(src, "/proc/reid3d")


# What cannot be converted


def test_a_missing_or_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no such folder or image: {tmp_path / 'no'}"):
        run(tmp_path / "no", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"src holds no crops to convert: {tmp_path / 'empty'} \(it is empty\)"):
        run(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "a.txt").touch()
    with pytest.raises(ValueError, match=r"src holds no crops .*\(a.txt: not an image name"):
        run(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_converted_is_an_error_until_something_is(tmp_path):
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a.jpg").touch()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"not one file in {tmp_path / 'crops'} could be converted: see "):
            run(tmp_path / "crops", tmp_path / "out")
    assert failures(tmp_path / "out") == {"a.jpg": "empty file"}
    crop(tmp_path / "crops" / "a.jpg", 100)
    assert run(tmp_path / "crops", tmp_path / "out").written == 1


def test_an_output_begun_otherwise_is_refused_and_left_alone(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    run(src, out)
    before = contents(out)
    for options, words in (
        ({"size": (64, 32)}, r"size was \[128, 64\], is \[64, 32\]"),
        ({"shard_size": 5}, "shard_size was 4, is 5"),
        ({"fitter": CubeFitter(half=0.4)}, "fitter was "),
    ):
        with pytest.raises(ValueError, match=rf"choose another folder than {out} \(.*{words}"):
            run(src, out, **options)
    crop(src / "new.png", 100)
    with pytest.raises(ValueError, match=r"images was 10, is 11, names was \w+, is \w+"):
        run(src, out)
    (src / "new.png").unlink()
    (tmp_path / "crops").rename(tmp_path / "renamed")
    with pytest.raises(ValueError, match="source was crops, is renamed"):
        run(tmp_path / "renamed", out)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model.safetensors", ""),
        ("failures.jsonl", '{"mine": 1}'),
        ("notes.jsonl", ""),
        ("dataset.json", '{"mine": 1}'),
        ("dataset.json", '{"shards": {"all": 1}}'),
        ("dataset.json", "[1]"),
        ("dataset.json", "\xff no JSON"),
    ],
)
def test_an_output_with_foreign_files_is_refused_and_left_alone(tmp_path, name, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(text, encoding="latin-1")
    (out / ".all-00000.jsonl.12.tmp").touch()
    with pytest.raises(ValueError, match=f"out holds files that no conversion wrote: {out / name}"):
        run(plain(tmp_path / "crops", 1), out)
    assert sorted(path.name for path in out.iterdir()) == sorted([name, ".all-00000.jsonl.12.tmp"])
    assert (out / name).read_text(encoding="latin-1") == text


def test_only_what_a_killed_conversion_left_is_cleaned_up(tmp_path):
    src, out = plain(tmp_path / "crops", 1), tmp_path / "out"
    mine = [".all-00000.safetensors.12.tmp", ".query-00003.jsonl.9.tmp", ".dataset.json.7.tmp", ".failures.jsonl.8.tmp"]
    foreign = [".notes.tmp", ".notes.jsonl.12.tmp", ".all-00000.safetensors.tmp", "all-00000.jsonl.12.tmp", "notes.txt"]
    out.mkdir()
    for name in mine + foreign:
        (out / name).write_text("text")
    run(src, out)
    left = {path.name for path in out.iterdir()}
    assert left.issuperset(foreign) and left.isdisjoint(mine)


def test_an_output_inside_the_source_is_refused(tmp_path):
    src = plain(tmp_path / "crops", 1)
    for out in (src, src / "out"):
        with pytest.raises(ValueError, match="out must not lie in src"):
            run(src, out)


def test_a_damaged_shard_is_named(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    run(src, out)
    os.truncate(out / "all-00001.safetensors", 100)
    with pytest.raises(ValueError, match=f"{out / 'all-00001.safetensors'}: not a whole safetensors file"):
        run(src, out)


@pytest.mark.parametrize("option", ["batch", "shard_size"])
def test_counts_must_be_positive(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option} must be >= 1, got 0"):
        run(tmp_path, tmp_path / "out", **{option: 0})


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reid3d.progress.SECONDS_BETWEEN_LINES", -1.0)
    run(plain(tmp_path / "crops", 6), tmp_path / "out", progress=True)
    assert capsys.readouterr().err.splitlines() == [f"convert: {n} of 6 crops" for n in (3, 4, 6)]
    run(tmp_path / "crops", tmp_path / "again")
    assert capsys.readouterr().err == ""


def test_shards_say_how_they_were_made(tmp_path):
    run(plain(tmp_path / "crops", 2), tmp_path / "out")
    config = json.loads(Shard(tmp_path / "out" / "all-00000.safetensors").metadata["config"])
    assert len(config.pop("sources")) == 16
    assert config == json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert config["size"] == [128, 64] and config["images"] == 2 and config["source"] == "crops"
    assert config["shards"] == {"all": 1}
