"""Trains the networks of the OG-Net paper on a synthetic world, each from several seeds, and searches people not seen.

    python benchmarks/networks.py benchmarks/results/networks-cpu.json [--folder build/networks] [--seeds 3]
                                  [--workers 2] [--networks ognet ognet_strong pointnet2_msg dgcnn]

All learn from the clouds of the recipe `synth`, for as many epochs with as many clouds a batch. ognet, pointnet2_msg
and dgcnn are trained as it says (cross-entropy, balanced draws, Adam); ognet_strong, of the same parameters as ognet,
as its own recipe says. Hours; what was done is kept, in the folder and in the file, and the same command goes on.
Commands for other networks may run beside it.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import reid3d
from reid3d import bench
from reid3d.config import TrainConfig, read_config
from reid3d.io import atomic_write
from reid3d.preprocess.batch import convert_folder
from reid3d.preprocess.convert import Recipe
from reid3d.preprocess.synth import synth
from reid3d.train import train

SMALL = "dropout: 0.3"  # sizes that fit clouds of 512 points, as in the recipe synth
NETWORKS = {
    "ognet": ["synth", "--model.name", "ognet"],
    "ognet_strong": [
        *("ognet_strong", "--model.kwargs", f"{{grouping: spread, k: 8, init_points: 128, {SMALL}}}"),
        *("--sampling.p", "12", "--cloud.points", "512", "--cloud.background", "false", "--cloud.workers", "0"),
        *("--train.warmup", "0", "--train.average_from", "1"),  # hundredths of the epochs, of which there are a few
    ],
    "pointnet2_msg": [
        *("synth", "--model.name", "pointnet2_msg", "--model.kwargs", f"{{points: [128, 32], {SMALL}}}"),
    ],
    "pointnet2_msg_relu": [
        *("synth", "--model.name", "pointnet2_msg", "--model.kwargs", f"{{points: [128, 32], relu: true, {SMALL}}}"),
    ],
    "dgcnn": ["synth", "--model.name", "dgcnn", "--model.kwargs", f"{{k: 8, {SMALL}}}"],
}


def config(name: str, seed: int, epochs: int, clouds: Path, run: Path) -> TrainConfig:
    recipe, *changes = NETWORKS[name]
    common = {"--data": clouds, "--out": run, "--train.seed": seed, "--train.epochs": epochs}
    return read_config(recipe, [*changes, *(str(word) for pair in common.items() for word in pair)])


def learned(name: str, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """Train, or go on, and search; one thread."""
    torch.set_num_threads(1)
    clouds, run = folder / "clouds", folder / f"run_{name}_{epochs}_{seed}"
    train(config(name, seed, epochs, clouds, run))
    model, dataset = reid3d.create_model(weights=run / "model.safetensors"), reid3d.open_dataset(clouds)
    query, gallery = (reid3d.extract(model, split, progress=False) for split in (dataset.query, dataset.gallery))
    result = reid3d.evaluate(query, gallery)
    spent = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "seed": seed,
        "commit": bench.environment("cpu", 1, 0.0, {})["commit"],
        "rank1": round(float(result.cmc[0]), 4),
        "mAP": round(float(result.mAP), 4),
        "accuracy": round(spent[-1]["accuracy"], 4),
        "minutes_of_training": round(sum(epoch["seconds"] for epoch in spent) / 60, 1),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    found = {}
    for key in ("rank1", "mAP"):
        values = [run[key] for run in runs]
        found[key] = round(statistics.mean(values), 4)
        found[f"{key}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
    return found


def results(path: Path, epochs: int) -> dict[str, Any]:
    """What is known of so many epochs."""
    known = json.loads(path.read_text()) if path.exists() else {}
    networks = known["networks"] if known.get("epochs") == epochs else {}
    return {"suite": "networks", "world": "standard", "epochs": epochs, "networks": networks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/networks"), help="for the world, clouds and runs")
    parser.add_argument("--networks", nargs="+", default=["ognet", "ognet_strong", "pointnet2_msg", "dgcnn"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, of one thread each")
    args = parser.parse_args()
    started = time.perf_counter()
    people = synth(args.folder / "standard", preset="standard")
    convert_folder(people, args.folder / "clouds", Recipe(), workers=args.workers)
    known = results(args.json, args.epochs)["networks"]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        waiting = {}
        for seed in range(args.seeds):
            for name in args.networks:
                if seed not in [run["seed"] for run in known.get(name, {"runs": []})["runs"]]:
                    waiting[pool.submit(learned, name, seed, args.epochs, args.folder)] = name
        for future in as_completed(waiting):
            name, run = waiting[future], future.result()
            print(name, json.dumps(run), flush=True)
            found = results(args.json, args.epochs)  # with what others have found meanwhile
            runs = sorted([*found["networks"].get(name, {"runs": []})["runs"], run], key=lambda one: one["seed"])
            found["networks"][name] = {**summary(runs), "runs": runs}
            found["environment"] = bench.environment("cpu", 1, time.perf_counter() - started, {})
            with atomic_write(args.json) as file:
                file.write(json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
