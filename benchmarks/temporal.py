"""Measures what the times of a synthetic world are worth: TLift with them, and with times that mean nothing.

    python benchmarks/temporal.py benchmarks/results/temporal-cpu.json RUN CLOUDS [--shuffles 5]

RUN is a trained run, CLOUDS a converted world, such as run_ognet_6_0 and clouds in the folder of
benchmarks/networks.py. Scores are lifted as they are and re-ranked, with the world's times, and with the times of each
camera's images dealt out anew among them, several times.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import reid3d
from reid3d import bench
from reid3d.io import atomic_write
from reid3d.retrieval import Features


def shuffled(q: Features, g: Features, seed: int) -> tuple[Features, Features]:
    """The same with the times of each camera's images, of both sides, in another order."""
    assert q.times is not None and g.times is not None
    times, camids = np.concatenate([q.times, g.times]), np.concatenate([q.camids, g.camids])
    rng = np.random.default_rng(seed)
    for camera in np.unique(camids):
        rows = np.flatnonzero(camids == camera)
        times[rows] = times[rng.permutation(rows)]
    return replace(q, times=times[: len(q)]), replace(g, times=times[len(q) :])


def score(q: Features, g: Features, scores: np.ndarray | None = None) -> dict[str, float]:
    result = reid3d.evaluate(q, g, scores=scores)
    return {"rank1": round(float(result.cmc[0]), 4), "mAP": round(result.mAP, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("clouds", type=Path)
    parser.add_argument("--shuffles", type=int, default=5)
    args = parser.parse_args()
    started = time.perf_counter()
    model, dataset = reid3d.create_model(weights=args.run / "model.safetensors"), reid3d.open_dataset(args.clouds)
    q, g = reid3d.extract(model, dataset.query), reid3d.extract(model, dataset.gallery)
    g = g.subset(np.flatnonzero(g.pids != -1))
    found: dict[str, Any] = {"suite": "temporal", "trained_on": str(model.trained_on), "shuffles": args.shuffles}
    for name, scores in (("cosine", None), ("re-ranked", reid3d.rerank(q, g))):
        anew = []
        for seed in range(args.shuffles):
            sides = shuffled(q, g, seed)
            anew.append(score(*sides, reid3d.tlift(*sides, scores)))
        means = {key: round(statistics.mean(one[key] for one in anew), 4) for key in anew[0]}
        found[name] = {
            "alone": score(q, g, scores),
            "lifted": score(q, g, reid3d.tlift(q, g, scores)),
            "lifted by shuffled times": {**means, "all": anew},
        }
        print(name, json.dumps(found[name]), flush=True)
    threads = torch.get_num_threads()
    found["environment"] = bench.environment("cpu", threads, time.perf_counter() - started, {})
    with atomic_write(args.json) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
