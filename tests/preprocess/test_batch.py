"""A folder of crops to shards: what is written, what is refused, and what stopping at any moment does."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from reid3d.data import open_dataset
from reid3d.io import Shard, hold_folder
from reid3d.preprocess import engines
from reid3d.preprocess.batch import Report, convert_folder, verify
from reid3d.preprocess.convert import Recipe, convert
from reid3d.preprocess.synth import synth
from tests.cube import CubeFitter


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
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".lock")}


def failures(out):
    lines = (out / "failures.jsonl").read_text().splitlines()
    return {line["name"]: line["reason"] for line in map(json.loads, lines)}


def run(src, out, fitter=None, size=(128, 64), min_confidence=0.2, **options):
    recipe = Recipe(fitter=fitter or CubeFitter(), size=size, min_confidence=min_confidence)
    return convert_folder(src, out, recipe, **{"batch": 3, "shard_size": 4, "progress": False, **options})


# A folder


def test_a_plain_folder(tmp_path):
    report = run(plain(tmp_path / "crops"), tmp_path / "out")
    assert (report.written, report.skipped, report.failed) == (10, 0, 0)
    assert report.clouds_per_second > 0
    assert sorted(contents(tmp_path / "out")) == sorted(
        [f"all-0000{k}.{suffix}" for k in range(3) for suffix in ("jsonl", "safetensors")]
        + ["dataset.json", "failures.jsonl", "quality.json", "worst.png"]
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
    # the left corners miss the centres of their pixels
    assert record.quality == {"confidence": 0.75, "visible": 0.25, "inside": 1.0}
    assert record.fit == "CubeFitter" and record.aspect == 0.5 and record.num_points == 128 * 64


def test_quality_counts_what_falls_outside(tmp_path):
    crop(tmp_path / "a.png", 250)
    run(tmp_path / "a.png", tmp_path / "out", fitter=CubeFitter(half=0.56))  # its right side leaves the crop
    assert open_dataset(tmp_path / "out").all.records[0].quality == {
        "confidence": 0.75,
        "visible": 0.25,
        "inside": 0.5,
    }


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


def test_what_the_source_lacks_is_said(tmp_path):
    crop(tmp_path / "market1501" / "market" / "query" / "0002_c1s1_000451_03.jpg", 90)
    crop(tmp_path / "market1501" / "market" / "bounding_box_train" / "0004_c1s1_000451_03.jpg", 90)
    crop(tmp_path / "market1501" / "market" / "images" / "0000_c1s1_000451_00.jpg", 90)
    report = run(tmp_path / "market1501", tmp_path / "out")
    assert "bounding_box_test is missing: no gallery images" in report.notes
    assert "query: 1 images of 1 people; Market-1501 has 3,368 of 750" in report.notes
    assert str(report).startswith("note: bounding_box_test is missing: no gallery images\n")
    assert run(tmp_path / "market1501" / "market", tmp_path / "out").skipped == 2  # the same source
    assert run(tmp_path / "market1501", tmp_path / "more", distractors=True).written == 3
    (distractor,) = open_dataset(tmp_path / "more").gallery.records
    assert (distractor.name, distractor.pid, distractor.camid) == ("images/0000_c1s1_000451_00.jpg", 0, 1)
    with pytest.raises(ValueError, match="distractors must lie in images/"):
        run(plain(tmp_path / "crops"), tmp_path / "other", distractors=True)


def test_a_table_with_other_labels_is_converted_again(tmp_path):
    plain(tmp_path, 2)
    people = tmp_path / "people.csv"
    for pids in ((1, 2), (8, 9)):
        people.write_text("path,pid\n" + "".join(f"{k:02d}.png,{pid}\n" for k, pid in enumerate(pids)))
        assert run(people, tmp_path / "out").written == 2
        assert open_dataset(tmp_path / "out").all.pids.tolist() == list(pids)
    assert run(people, tmp_path / "out").skipped == 2


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
    "bomb.png": "20000 x 20000 pixels: more than 50 megapixels",
    "dot.png": "1 x 1 pixels: a side must have at least 8",
    "gone.jpg": "cannot be read: No such file or directory",
    "notes.txt": "not an image name: the extension must be one of .jpg .jpeg .png .bmp .webp",
    "text.jpg": "not a JPEG, PNG, BMP or WebP image",
    "zero.jpg": "empty file",
}


def test_bad_files_are_lines_in_the_report_and_the_rest_is_converted(mixed, tmp_path):
    report = run(mixed, tmp_path / "out")
    assert (report.written, report.failed) == (10, 7)
    found = failures(tmp_path / "out")
    assert found.pop("truncated.png").startswith("broken image: ")
    assert found == BAD
    assert list(found) == sorted(found)
    assert open_dataset(tmp_path / "out").all.names == (
        [f"{i:02d}.png" for i in range(6)] + ["black.png", "cmyk.jpg", "palette.png", "sixteen.png"]
    )
    first, second = str(report).splitlines()
    assert first.endswith("0 were there, 7 files failed: see failures.jsonl")
    assert (
        second == "confidence: median 0.75, 5 % below 0.34; 1 of 10 clouds have an upright body; the worst: worst.png"
    )


def test_the_same_call_again_finds_all_done(mixed, tmp_path):
    run(mixed, tmp_path / "out")
    before = contents(tmp_path / "out")
    report = run(mixed, tmp_path / "out")
    assert report == Report(written=0, skipped=10, failed=7, clouds_per_second=0, quality=report.quality)
    assert contents(tmp_path / "out") == before


def test_a_file_that_failed_is_tried_again_once_it_changed(mixed, tmp_path):
    run(mixed, tmp_path / "out")
    (mixed / "zero.jpg").write_bytes((mixed / "cmyk.jpg").read_bytes())
    (mixed / "notes.txt").unlink()
    report = run(mixed, tmp_path / "out")
    assert (report.written, report.skipped, report.failed) == (2, 9, 5)  # its shard is made again
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
        "quality.json",
        "worst.png",
    }
    run(src, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
    (src / "05.png").write_bytes(b"no picture any more")
    report = run(src, out)
    assert (report.written, report.skipped, report.failed) == (3, 6, 1)
    assert failures(out) == {"05.png": "not a JPEG, PNG, BMP or WebP image"}


def test_the_bytes_depend_neither_on_threads_nor_on_when_it_ran(mixed, tmp_path, monkeypatch):
    for threads in (1, 7):
        monkeypatch.setattr(engines, "DECODE_THREADS", threads)
        run(mixed, tmp_path / str(threads))
    assert contents(tmp_path / "1") == contents(tmp_path / "7")


# Stopped and begun again

SLOW = """
import os, sys
os.setsid()
sys.path.insert(0, {tests!r})
from tests.cube import CubeFitter
from tests.preprocess.test_batch import run
run({src!r}, {out!r}, {options}fitter=CubeFitter(seconds={seconds}))
"""


def process(src, out, seconds=0.15, prelude="", options=""):
    code = prelude + SLOW.format(
        options=options,
        tests=os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
        src=str(src),
        out=str(out),
        seconds=seconds,
    )
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
    assert report.skipped >= 4 and report.written + report.skipped == 10 and report.failed == 7
    assert contents(out) == contents(tmp_path / "whole")
    for name in ("all-00000.safetensors", "all-00000.jsonl", "all-00001.safetensors", "all-00001.jsonl"):
        assert contents(out)[name] == done[name]


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []


def in_the_background(src, out, **options):
    """A run in a process of its own, forked, so that it begins at once."""

    def start():
        torch.set_num_threads(1)  # the threads of this process are not in the forked one
        run(src, out, fitter=CubeFitter(seconds=0.04), **options)

    running = multiprocessing.get_context("fork").Process(target=start)
    running.start()
    return running


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_twenty_random_moments_it_ends_with_the_same_bytes(mixed, tmp_path, workers):
    for i in range(6, 20):
        crop(mixed / f"{i:02d}.png", 100 + i)
    start = time.monotonic()
    in_the_background(mixed, tmp_path / "whole", workers=workers).join(60)
    seconds = time.monotonic() - start
    whole, out, rng, kills = contents(tmp_path / "whole"), tmp_path / "out", np.random.default_rng(0), 0
    assert "worst.png" in whole
    while kills < 20:
        running = in_the_background(mixed, out, workers=workers)
        running.join(rng.uniform(0.02, 0.5 * seconds))
        orphans = children(running.pid)
        running.kill()
        running.join(30)
        if running.exitcode == 0:  # it was done before: once more from the beginning
            assert contents(out) == whole
            shutil.rmtree(out)
            continue
        kills += 1
        deadline = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in orphans):  # the workers end with their parent
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for path in out.glob("[!.]*.jsonl"):  # what is there is whole
            if path.name != "failures.jsonl":
                Shard(path.with_suffix(".safetensors")).verify()
    report = run(mixed, out, workers=workers)
    assert report.written + report.skipped == 24 and report.failed == 7
    assert contents(out) == whole and verify(out) == []


# Shared among processes


def test_any_number_of_workers_gives_the_same_bytes(mixed, tmp_path):
    reports = [run(mixed, tmp_path / str(workers), workers=workers) for workers in (1, 2, 7)]
    assert [(r.written, r.failed) for r in reports] == [(10, 7)] * 3
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "7")


def test_the_embedded_fitter_gives_the_same_bytes_in_any_number_of_workers(tmp_path):
    src = synth(tmp_path / "people", ids=4, cams=2, images=3, progress=False)
    for workers in (1, 2):
        convert_folder(src, tmp_path / str(workers), batch=5, shard_size=9, workers=workers, progress=False)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parts_make_the_whole(mixed, tmp_path, order):
    run(mixed, tmp_path / "whole")
    first, second = (run(mixed, tmp_path / "parts", part=(i, 2)) for i in order)
    assert first.quality is None and second.quality == run(mixed, tmp_path / "whole").quality
    assert first.written + second.written == 10 and second.failed == 7
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_parts_at_once(mixed, tmp_path):
    run(mixed, tmp_path / "whole")
    running = [in_the_background(mixed, tmp_path / "out", part=(i, 3)) for i in range(3)]
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_parts_keep_out_whom_they_must(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    out.mkdir()
    with hold_folder(out, "", shared=True), hold_folder(out, "", name=".lock-0-of-2"):  # as part 0 of 2 does
        for part in ((0, 2), (0, 1), (1, 3)):
            with pytest.raises(BlockingIOError, match=f"is writing into {out}"):
                run(src, out, part=part)
        assert run(src, out, part=(1, 2)).written == 4


@pytest.mark.parametrize("part", [(0, 0), (2, 2), (-1, 2)])
def test_parts_that_are_none(tmp_path, part):
    with pytest.raises(ValueError, match=rf"part must be \(i, n\) with 0 <= i < n, got \({part[0]}, {part[1]}\)"):
        run(plain(tmp_path / "crops", 1), tmp_path / "out", part=part)


def test_ray_gives_the_same_bytes(mixed, tmp_path):
    for engine in ("local", "ray"):
        recipe = Recipe(fitter="mean")
        report = convert_folder(mixed, tmp_path / engine, recipe, shard_size=4, engine=engine, progress=False)
        assert (report.written, report.failed) == (10, 7)
    ray.shutdown()
    assert contents(tmp_path / "local") == contents(tmp_path / "ray")
    with pytest.raises(ValueError, match="engine must be one of local, ray, got 'spark'"):
        run(mixed, tmp_path / "spark", engine="spark")


class Deadly(CubeFitter):
    """Ends its process at the crop called 05."""

    def forward(self, crops, names):
        if "05.png" in names:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(crops, names)


def test_a_worker_that_dies_is_an_error_and_what_was_finished_stays(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    with pytest.raises(RuntimeError, match="a worker process was killed, perhaps for want of memory"):
        run(src, out, fitter=Deadly(), workers=2)
    assert "all-00001.jsonl" not in contents(out)


def test_interrupting_the_workers(mixed, tmp_path):
    out = tmp_path / "out"
    running = process(mixed, out, options="workers=2, ")
    wait_for(out / "all-00001.jsonl", running)
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    _, text = running.communicate(timeout=60)
    assert running.returncode != 0 and text.count("Traceback") == 1 and text.strip().endswith("KeyboardInterrupt")
    run(mixed, tmp_path / "whole")
    run(mixed, out)
    assert contents(out) == contents(tmp_path / "whole")


# With evidence


def test_evidence_refines_the_fits_and_what_is_broken_is_listed(tmp_path):
    src = synth(tmp_path / "people", ids=2, cams=2, images=2, seed=4, progress=False)
    truth = np.load(src / "gt.npz")
    masks = np.unpackbits(truth["mask"], axis=1).reshape(-1, 128, 64).astype(bool)
    for name, mask in zip(truth["names"], masks, strict=True):
        path = (tmp_path / "masks" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    without, broken = truth["names"][0], truth["names"][1]
    (tmp_path / "masks" / without).with_suffix(".png").unlink()
    (tmp_path / "masks" / broken).with_suffix(".png").write_bytes(b"no picture")
    recipe = Recipe(fitter="mean", refine=(tmp_path / "masks",))
    for workers in (1, 2):
        report = convert_folder(src, tmp_path / str(workers), recipe, shard_size=8, workers=workers, progress=False)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert report.failed == 1 and report.written == len(masks) - 1
    (reason,) = failures(tmp_path / "1").values()
    assert reason.startswith(f"mask of {broken} in {tmp_path / 'masks'}: ") and "must be a PNG file" in reason
    data = open_dataset(tmp_path / "1")
    records = [r for split in (data.train, data.query, data.gallery) for r in split.records]
    refined = [r for r in records if "iou_after" in r.quality]
    assert len(refined) == len(records) - 1 and without not in [r.name for r in refined]
    before, after = (np.mean([r.quality[f"iou_{when}"] for r in refined]) for when in ("before", "after"))
    assert after > before + 0.1 and after > 0.8
    assert report.quality.means["iou_after"] == pytest.approx(after, abs=1e-3)
    with pytest.raises(ValueError, match="refine was None, is "):
        convert_folder(src, tmp_path / "plain", shard_size=8, progress=False)
        convert_folder(src, tmp_path / "plain", recipe, shard_size=8, progress=False)


# Looking after


def test_verify_reads_every_byte(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    run(src, out)
    assert verify(out) == []
    for name in ("all-00001.safetensors", "all-00001.jsonl"):
        data = (out / name).read_bytes()
        for at in (len(data) // 2, len(data) - 3):
            (out / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            (problem,) = verify(out)
            assert "all-00001" in problem and problem.endswith("convert again to mend it")
        (out / name).write_bytes(data)
    (out / "all-00002.jsonl").unlink()
    (out / "other.safetensors").touch()
    assert verify(out) == [
        f"{out / 'all-00002.jsonl'}: missing, convert again to make it",
        f"{out / 'other.safetensors'}: is no part of this conversion",
    ]
    with pytest.raises(FileNotFoundError, match="out: no such folder"):
        verify(tmp_path / "none")
    with pytest.raises(ValueError, match="out is no folder of clouds, it has no dataset.json"):
        verify(src)


def test_the_summary_counts_and_shows_the_worst_first(mixed, tmp_path):
    report = run(mixed, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert summary == asdict(report.quality)
    assert summary["clouds"] == 10 and summary["fits"] == {"CubeFitter": 9, "mean": 1}
    assert summary["worst"][0] == "black.png" and len(summary["worst"]) == 10
    assert summary["histogram"] == [1, 0, 0, 0, 0, 0, 0, 9, 0, 0]
    assert summary["means"]["confidence"] == pytest.approx(0.675)
    sheet = np.asarray(Image.open(tmp_path / "out" / "worst.png").convert("RGB"))
    assert sheet.shape == (2 * (256 + 28 + 8) + 8, 6 * (2 * 128 + 8) + 8, 3)
    assert (sheet[8 : 8 + 256, 8 : 8 + 128] == 0).all()  # the black crop
    report = run(mixed, tmp_path / "strict", min_confidence=0.8)
    assert report.quality.fits == {"mean": 10}
    assert all(r.fit == "mean" for r in open_dataset(tmp_path / "strict").all.records)


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
    assert sorted(contents(out)) == ["all-00000.jsonl", "all-00000.safetensors", "dataset.json"]
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


def test_a_damaged_shard_is_made_again(tmp_path):
    src, out = plain(tmp_path / "crops"), tmp_path / "out"
    run(src, out)
    before = contents(out)
    os.truncate(out / "all-00001.safetensors", 100)
    (problem,) = verify(out)
    assert problem.startswith(f"{out / 'all-00001.safetensors'}: not a whole safetensors file: ")
    assert problem.endswith("; delete all-00001.jsonl and convert again to mend it")
    assert run(src, out).written == 4
    assert contents(out) == before and verify(out) == []


@pytest.mark.parametrize("option", ["batch", "shard_size", "workers"])
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
