"""Times `evaluate` at the size of Market-1501 beside other evaluators, and compares what they say.

    python benchmarks/evaluate.py benchmarks/results/evaluate-cpu.json [--peers FOLDER] [--rounds 3]

3,368 queries, 19,732 gallery items, 750 people, 6 cameras; rankings at random, and as of a good model. No row has two
equal similarities, for which the others have no rule. FOLDER is one to import peers from, each left out where it is
not there: torchreid_rank, metrics/rank.py of torchreid as PyPI has it, which comes without its Cython;
torchreid_rank_cy and fastreid_rank_cy, rank_cylib/rank_cy.pyx of the two repositories, compiled by Cython. All get a
float32 matrix, and take turns after a first call that is not counted. Memory is the peak of a first call in a process
of its own, beyond the inputs.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: threads that spin wait for whatever else runs

import numpy as np
import torch

from reid3d import bench
from reid3d.io import atomic_write
from reid3d.retrieval import Features, Result, evaluate, roc

QUERIES, ITEMS, PEOPLE, CAMERAS, DIMS = 3368, 19732, 750, 6, 512
FEW = 200  # queries of the comparison with torchreid's Python, which takes a minute for all
PEERS = ("torchreid_rank_cy", "fastreid_rank_cy")


def sides(kind: str) -> tuple[Features, Features]:
    """Features at random, or of their person, with something of their camera and noise: a Rank-1 of some 90 %."""
    rng = np.random.default_rng(0)
    person = rng.standard_normal((PEOPLE + 1, DIMS), dtype=np.float32)
    camera = 0.8 * rng.standard_normal((CAMERAS + 1, DIMS), dtype=np.float32)
    found = []
    for name, n in (("query", QUERIES), ("gallery", ITEMS)):
        pids, camids = rng.integers(1, PEOPLE + 1, n), rng.integers(1, CAMERAS + 1, n)
        feats = (
            1.25 * rng.standard_normal((n, DIMS), dtype=np.float32) * rng.uniform(0.5, 1.5, (n, 1)).astype(np.float32)
        )
        if kind == "real":
            feats += person[pids] + camera[camids]
        found.append(Features(feats, pids, camids, [f"{name}/{i}" for i in range(n)]))
    return found[0], found[1]


def matrix(kind: str, q: Features, g: Features) -> np.ndarray:
    """Similarities that rank as the features do, or at random, all different within a row."""
    steps = np.linspace(1, -1, len(g), dtype=np.float32)
    scores = np.empty((len(q), len(g)), np.float32)
    rng = np.random.default_rng(1)
    unit = [side.feats / np.linalg.norm(side.feats, axis=1, keepdims=True) for side in (q, g)]
    for first in range(0, len(q), 64):
        rows = scores[first : first + 64]
        found = unit[0][first : first + 64] @ unit[1].T if kind == "real" else rng.random(rows.shape, dtype=np.float32)
        np.put_along_axis(rows, np.argsort(-found), steps[None], 1)
    return scores


def by_argsort(scores: np.ndarray, q: Features, g: Features) -> tuple[float, np.ndarray]:
    """mAP, by the mean of precisions, and CMC: a sort of each row, and NumPy."""
    aps, curves = [], []
    for i in range(len(q)):
        order = np.argsort(-scores[i])
        same = g.pids[order] == q.pids[i]
        places = np.flatnonzero(same[~(same & (g.camids[order] == q.camids[i]))]) + 1
        if len(places):
            aps.append((np.arange(1, len(places) + 1) / places).mean())
            curves.append(places[0] <= np.arange(1, 51))
    return float(np.mean(aps)), np.mean(curves, 0)


def peer(name: str, distances: np.ndarray, q: Features, g: Features) -> tuple[float, np.ndarray]:
    """mAP and CMC of a peer's function."""
    module = import_module(name)
    call = module.eval_market1501 if name == "torchreid_rank" else module.evaluate_cy
    cmc, found, *_ = call(distances, q.pids, g.pids, q.camids, g.camids, 50)
    return float(np.mean(found)), np.asarray(cmc)  # a mean already, or APs of all queries, which all have a match


def ways(kind: str, peers: list[str]) -> dict[str, Callable[[], Any]]:
    q, g = sides(kind)
    scores = matrix(kind, q, g)
    distances = -scores if peers else scores
    return {
        "reid3d, from the matrix": lambda: evaluate(q, g, "mean", scores=scores),
        "reid3d, from 512-d features": lambda: evaluate(q, g, "mean"),
        "reid3d roc, from the matrix": lambda: roc(q, g, scores=scores),
        "NumPy argsort": lambda: by_argsort(scores, q, g),
        **{name: partial(peer, name, distances, q, g) for name in peers},
    }


def peak(folder: str | None, name: str, threads: int) -> float:
    """MiB that a first call takes beyond what there was before; Linux tells."""
    sys.path += [folder] if folder else []
    torch.set_num_threads(threads)
    call = ways("random", [name] if name in PEERS else [])[name]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    def memory(which: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(which))

    before = memory("VmRSS")
    call()
    return round((memory("VmHWM") - before) / 1024, 1)


def timed(calls: dict[tuple[str, int], Callable[[], Any]], rounds: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Seconds by the clock and of all cores together, over rounds in which all take turns."""
    spent: dict[tuple[str, int], list[tuple[float, float]]] = {key: [] for key in calls}
    for _ in range(rounds):
        for (name, threads), call in calls.items():
            torch.set_num_threads(threads)
            start, cpu = time.perf_counter(), time.process_time()
            call()
            spent[name, threads].append((time.perf_counter() - start, time.process_time() - cpu))
    return {
        key: {
            "name": key[0],
            "threads": key[1],
            "seconds": round(statistics.median(wall for wall, _ in runs), 4),
            "all_seconds": [round(wall, 4) for wall, _ in runs],
            "cpu_seconds": round(statistics.median(cpu for _, cpu in runs), 4),
        }
        for key, runs in spent.items()
    }


def difference(result: Result, other: tuple[float, np.ndarray]) -> dict[str, float]:
    return {"mAP": abs(result.mAP - other[0]), "cmc": float(np.abs(result.cmc - other[1]).max())}


def single_gallery_shot(rounds: int) -> dict[str, Any]:
    """The expected CMC at the size of CUHK03-NP: 1,400 queries, 5,332 items, 700 people, 2 cameras."""
    rng = np.random.default_rng(2)
    q, g = (
        Features(
            np.zeros((n, 1), np.float32), rng.integers(1, 701, n), rng.integers(1, 3, n), [f"{i}" for i in range(n)]
        )
        for n in (1400, 5332)
    )
    scores = rng.random((1400, 5332), dtype=np.float32)
    call = partial(evaluate, q, g, scores=scores, single_gallery_shot=True)
    return timed({("single gallery shot", 1): call}, rounds)["single gallery shot", 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--peers", type=Path, help="a folder to import other evaluators from")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    started = time.perf_counter()
    folder = str(args.peers) if args.peers else None
    sys.path += [folder] if folder else []
    peers = [name for name in PEERS if folder and list(args.peers.glob(f"{name}.*"))]
    found: dict[str, Any] = {"suite": "evaluate", "size": [QUERIES, ITEMS, PEOPLE, CAMERAS], "rankings": {}}
    for kind in ("random", "real"):
        calls = ways(kind, peers)
        result = calls["reid3d, from the matrix"]()
        compared = {name: difference(result, calls[name]()) for name in ("NumPy argsort", *peers)}
        by_thread = {
            (name, n): call for name, call in calls.items() for n in ((1, 2) if name.startswith("reid3d,") else (1,))
        }
        print(f"{kind}: timing", flush=True)
        rows = timed(by_thread, args.rounds)
        print(f"{kind}: timed", flush=True)
        if folder and (args.peers / "torchreid_rank.py").is_file():
            q, g = sides(kind)
            q = Features(q.feats[:FEW], q.pids[:FEW], q.camids[:FEW], q.names[:FEW])
            scores = matrix(kind, q, g)
            few = evaluate(q, g, "mean", scores=scores)
            compared["torchreid_rank"] = difference(few, peer("torchreid_rank", -scores, q, g))
        found["rankings"][kind] = {
            "rank1": float(result.cmc[0]),
            "mAP": result.mAP,
            "ways": list(rows.values()),
            "differences": compared,
        }
    print("shot: timing", flush=True)
    found["single_gallery_shot"] = single_gallery_shot(args.rounds)
    print("shot: timed", flush=True)
    for row in found["rankings"]["random"]["ways"]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row["peak_mib"] = pool.submit(peak, folder, row["name"], row["threads"]).result()
    found["environment"] = bench.environment("cpu", 2, time.perf_counter() - started, {})
    with atomic_write(args.json) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")
    for kind, ranking in found["rankings"].items():
        print(f"{kind}: Rank-1 {ranking['rank1']:.2%}, mAP {ranking['mAP']:.2%}, differences {ranking['differences']}")
        for row in ranking["ways"]:
            print(f"  {row['name']:<30}{row['threads']} threads {row['seconds']:8.3f} s {row.get('peak_mib', '')} MiB")


if __name__ == "__main__":
    main()
