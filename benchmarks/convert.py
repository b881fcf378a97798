"""Measures conversion: speed and memory, and the share of wrongly coloured vertices.

    python benchmarks/convert.py benchmarks/results/convert-cpu.json [--folder build/bench]

Everything is synthetic and made anew where it is not there: 4,840 crops in Market-1501's layout for the speed, bodies
with known vertices for the colours.
"""

import argparse
import json
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reid3d import bench
from reid3d.io import atomic_write
from reid3d.ops import rasterize
from reid3d.preprocess.batch import convert_folder, verify
from reid3d.preprocess.body import Body, axis_angle_to_matrix, load_body
from reid3d.preprocess.camera import project
from reid3d.preprocess.convert import Recipe
from reid3d.preprocess.mapping import map_crops
from reid3d.preprocess.synth import synth
from reid3d.preprocess.synth.people import WALK, sample_people, sample_poses

SIZES = ((128, 64), (256, 128), (384, 128))


def memory_of_all() -> float:
    """MiB that this process and its workers hold, shared pages counted once (PSS)."""
    children = Path("/proc/self/task").glob("*/children")
    pids = ["self", *(pid for path in children for pid in path.read_text().split())]
    total = 0
    for pid in pids:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total / 1024


def speed(folder: Path, workers: int, runs: int) -> dict[str, Any]:
    """Crops a minute of whole runs, decode and write included, and memory in every tenth of a run."""
    crops = synth(folder / "people", preset="easy", ids=210, cams=5, images=4, seed=5)
    rates, memory, written = [], [], 0
    for run in range(runs):
        out = folder / "clouds"
        shutil.rmtree(out, ignore_errors=True)
        samples: list[float] = []
        over = threading.Event()

        def watch(samples: list[float] = samples, over: threading.Event = over) -> None:
            while not over.wait(0.2):
                samples.append(memory_of_all())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.perf_counter()
        report = convert_folder(crops, out, workers=workers, progress=False)
        seconds = time.perf_counter() - start
        over.set()
        watcher.join()
        written = report.written
        rates.append(written / seconds * 60)
        memory = [round(max(samples[k * len(samples) // 10 : (k + 1) * len(samples) // 10])) for k in range(10)]
        print(f"run {run}: {rates[-1]:,.0f} crops a minute", flush=True)
        assert not verify(out)
    return {
        "crops": written,
        "workers": workers,
        "crops_a_minute": {"median": round(statistics.median(rates)), "all": [round(rate) for rate in rates]},
        "memory_mib_by_tenth_of_the_last_run": memory,
    }


def walkers(count: int, body: Body) -> tuple[Tensor, Tensor]:
    """Vertices (count,V,3) of synthetic people seen from all sides, and cameras that they fill: ground truth."""
    rng = np.random.default_rng(0)
    people = sample_people(count, rng)
    walk = sample_poses(people, rng.uniform(0, 2 * torch.pi, count), np.full(count, WALK), rng)
    poses, betas = torch.from_numpy(walk).float(), torch.from_numpy(people.betas).float()
    yaw = torch.arange(count) * 2 * torch.pi / count
    turn = axis_angle_to_matrix(torch.stack([0 * yaw, yaw, 0 * yaw], 1))
    poses[:, 0] = axis_angle_to_matrix(torch.tensor([torch.pi, 0, 0])) @ turn @ poses[:, 0]
    verts = body(poses, betas).verts
    low, high = verts.amin(1), verts.amax(1)
    return verts, torch.cat([1.84 / (high - low)[:, 1:2], -(low + high)[:, :2] / 2], 1)


def hidden(verts: Tensor, faces: Tensor) -> Tensor:
    """Whether a face lies more than 1 mm before a vertex, on its ray to the camera, in float64: (V,) bool."""
    a, b, c = verts.double()[faces].unbind(1)

    def area(o: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (a - o)[..., 0] * (b - o)[..., 1] - (b - o)[..., 0] * (a - o)[..., 1]

    front = area(a, b, c) < 0
    a, b, c = a[front], b[front], c[front]
    found = []
    for p in verts.double()[:, None].split(64):
        weights = torch.stack([area(p, b, c), area(p, c, a), area(p, a, b)]) / area(a, b, c)
        depth = (weights * torch.stack([a, b, c])[:, None, :, 2]).sum(0)
        found.append(((weights >= 0).all(0) & (depth < p[..., 2] - 0.001)).any(1))
    return torch.cat(found)


def colours(count: int) -> list[dict[str, Any]]:
    """Coloured vertices that something hides, visible ones that are coloured, as shares, and the z-buffer's time."""
    body = load_body()
    verts, cam = walkers(count, body)
    behind = torch.stack([hidden(v, body.faces) for v in verts])
    rows, aspect = [], torch.full((count,), 0.5)
    for height, width in SIZES:
        images = torch.zeros(count, height, width, 3, dtype=torch.uint8)
        points = project(verts, cam, height, width, aspect)
        times = []
        for _ in range(9):
            start = time.perf_counter()
            rasterize(points, body.faces, height, width)
            times.append((time.perf_counter() - start) / count * 1e3)
        row: dict[str, Any] = {"size": [height, width], "rasterize_ms_a_crop": round(statistics.median(times), 3)}
        for mode in ("paper", "dense", "official"):
            coloured = torch.zeros_like(behind)
            for k, cloud in enumerate(map_crops(images, verts, cam, body.faces, mode, aspect)):
                coloured[k, torch.from_numpy(cloud.vertex[cloud.vertex >= 0]).long()] = True
            row[mode] = {
                "wrong": round(float((coloured & behind).sum() / coloured.sum()), 4),
                "recall": round(float((coloured & ~behind).sum() / (~behind).sum()), 3),
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="for the synthetic crops and clouds")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found: dict[str, Any] = {"suite": "convert", "recipe": repr(Recipe())}
    found["speed"] = speed(args.folder, args.workers, args.runs)
    torch.set_num_threads(1)
    found["colours"] = colours(12)
    found["environment"] = bench.environment("cpu", 1, time.perf_counter() - started, {})
    with atomic_write(args.json) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
