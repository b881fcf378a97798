"""Measures synthetic worlds: how fast they are made, and how hard it is to find people in them.

    python benchmarks/synth.py benchmarks/results/synth-cpu.json [--folder build/worlds] [--presets standard hard]
                               [--bodies fitted true mean]

A world is made, converted, learnt (the recipe `synth`; hours, and it goes on where it was stopped) and searched, with
the bodies that the embedded fitter finds, and if asked for with the true ones and with an upright one for everybody.
Beside what was learnt stand histograms of colours, of the whole crop and, by the ground truth, of the person alone.
"""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import reid3d
from reid3d import bench
from reid3d.config import read_config
from reid3d.data.layouts import list_images
from reid3d.io import atomic_write
from reid3d.preprocess.batch import convert_folder
from reid3d.preprocess.convert import Recipe
from reid3d.preprocess.synth import TrueBodies, synth
from reid3d.retrieval.features import Features
from reid3d.train import train

BINS = 8  # of each of red, green, blue
STRIPES = 6
OGNET = {"fitted": "ognet_small", "true": "ognet_small_on_true_bodies", "mean": "ognet_small_on_upright_bodies"}


def speed(folder: Path, runs: int) -> dict[str, Any]:
    """Crops a second of whole runs of the standard preset, from nothing to files; whether all gave the same bytes."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    sums = set()
    for _ in range(runs):
        for workers, found in rates.items():
            out = folder / "speed"
            shutil.rmtree(out, ignore_errors=True)
            started = time.perf_counter()
            synth(out, workers=workers, progress=False)
            note = json.loads((out / "synth.json").read_text())
            found.append(note["crops"] / (time.perf_counter() - started))
            sums.add(note["sha256"])
            print(f"{workers} workers: {found[-1]:,.0f} crops a second", flush=True)
    shutil.rmtree(folder / "speed")
    assert len(sums) == 1
    return {
        "crops": note["crops"],
        "crops_a_second": {
            str(workers): {"median": round(statistics.median(found)), "all": [round(rate) for rate in found]}
            for workers, found in rates.items()
        },
        "sha256": sums.pop(),
    }


def histogram(image: np.ndarray, counted: np.ndarray, stripes: int) -> np.ndarray:
    """Square roots of the shares of colours in horizontal stripes of the box of what is counted: of unit length."""
    code = (image // (256 // BINS)).astype(np.int64) @ np.array([BINS * BINS, BINS, 1])
    rows = np.flatnonzero(counted.any(1))
    box = np.arange(rows[0], rows[-1] + 1) if len(rows) else np.arange(len(image))
    parts = [np.bincount(code[r][counted[r]], minlength=BINS**3) for r in np.array_split(box, stripes)]
    root = np.sqrt(np.concatenate(parts)).astype(np.float32)
    return root / max(float(np.linalg.norm(root)), 1e-6)


def by_colour(people: Path, alone: bool, stripes: int) -> dict[str, float]:
    """Retrieval by histograms, of the person alone or of the whole crop."""
    with np.load(people / "gt.npz") as truth:
        seen = np.unpackbits(truth["seen"], axis=1).reshape(-1, 128, 64).astype(bool)
        rows = {name: i for i, name in enumerate(truth["names"].tolist())}
    images = list_images(people).images
    sides = {}
    for split in ("query", "gallery"):
        records = [image for image in images if image.split == split]
        feats = []
        for record in records:
            counted = seen[rows[record.path.relative_to(people).as_posix()]]
            picture = np.asarray(Image.open(record.path))
            feats.append(histogram(picture, counted if alone else np.ones_like(counted), stripes))
        pids, camids = (np.array([getattr(r, k) for r in records], dtype=np.int64) for k in ("pid", "camid"))
        sides[split] = Features(np.stack(feats), pids, camids, [record.name for record in records])
    return figures(sides["query"], sides["gallery"])


def figures(query: Features, gallery: Features) -> dict[str, float]:
    result = reid3d.evaluate(query, gallery)
    return {"rank1": round(float(result.cmc[0]), 4), "mAP": round(float(result.mAP), 4)}


def learned(preset: str, folder: Path, bodies: str) -> dict[str, Any]:
    """Train the recipe `synth` on the clouds of a world, or go on, and search the people it has not seen."""
    clouds, run = folder / f"clouds_{preset}_{bodies}", folder / f"run_{preset}_{bodies}"
    fitter = {"fitted": "default", "mean": "mean", "true": TrueBodies(folder / preset)}[bodies]
    convert_folder(folder / preset, clouds, Recipe(fitter=fitter), workers=2)
    train(read_config("synth", ["--data", str(clouds), "--out", str(run)]))
    model, dataset = reid3d.create_model(weights=run / "model.safetensors"), reid3d.open_dataset(clouds)
    found = figures(reid3d.extract(model, dataset.query), reid3d.extract(model, dataset.gallery))
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    hours = sum(epoch["seconds"] for epoch in epochs) / 3600
    return {**found, "recipe": "synth", "epochs": len(epochs), "hours_of_training": round(hours, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/worlds"), help="for worlds, clouds and runs")
    parser.add_argument("--presets", nargs="+", default=["standard", "hard"])
    parser.add_argument("--bodies", nargs="+", default=["fitted"], choices=list(OGNET))
    parser.add_argument("--runs", type=int, default=3, help="of the measurement of speed")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    found: dict[str, Any] = {"suite": "synth", "speed": speed(args.folder, args.runs), "worlds": {}}
    for preset in args.presets:
        people = synth(args.folder / preset, preset=preset)  # type: ignore[arg-type]
        found["worlds"][preset] = {
            **json.loads((people / "synth.json").read_text()),
            "colours_of_the_crop": by_colour(people, False, 1),
            "colours_of_the_crop_in_stripes": by_colour(people, False, STRIPES),
            "colours_of_the_person": by_colour(people, True, 1),
            "colours_of_the_person_in_stripes": by_colour(people, True, STRIPES),
            **{OGNET[bodies]: learned(preset, args.folder, bodies) for bodies in args.bodies},
        }
        print(json.dumps(found["worlds"][preset]), flush=True)
    found["environment"] = bench.environment("cpu", 2, time.perf_counter() - started, {})
    with atomic_write(args.json) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
