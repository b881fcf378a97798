"""Times re-ranking, query expansion and TLift at the sizes of data sets, on clustered features made up for it.

    OMP_WAIT_POLICY=passive python benchmarks/rerank.py benchmarks/results/rerank-cpu.json [--threads 2]
        [--cases market msmt17 single expand tlift torchreid] [--rounds 3] [--torchreid FOLDER]

Each case runs in a process of its own: seconds on the clock, of the processors, and the memory taken beyond the inputs,
results included. Cases that were measured before stay in the file. msmt17 takes minutes and 4 GiB. torchreid, at
1,000 x 5,000, loads only utils/rerank.py from FOLDER (`pip download --no-deps torchreid`, unpacked).
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reid3d import bench
from reid3d.bench.training import _resident
from reid3d.io import atomic_write
from reid3d.retrieval import Features, GalleryGraph, expand, rerank, tlift

CASES = ("market", "msmt17", "single", "expand", "tlift", "torchreid")
MARKET, MSMT17, DUKE, SMALL = (3368, 19732), (11659, 82161), (2228, 17661), (1000, 5000)
IDS = {MARKET: 750, MSMT17: 3060, DUKE: 702, SMALL: 190}


def people(size: tuple[int, int], dims: int = 512, noise: float = 1.6) -> tuple[Features, Features]:
    """Queries and gallery: around each person's unit vector, noise of that length."""
    rng = np.random.default_rng(0)
    n = sum(size)
    pids = rng.integers(1, IDS[size] + 1, n)
    centres = rng.standard_normal((IDS[size] + 1, dims), np.float32)
    feats = rng.standard_normal((n, dims), np.float32)
    feats *= noise / dims**0.5
    feats += centres[pids] / np.linalg.norm(centres[pids], axis=1, keepdims=True)
    camids, times = rng.integers(1, 9, n), rng.integers(0, 5000 * 25, n)  # 8 cameras, 5,000 seconds
    names = [f"{i}.jpg" for i in range(n)]
    parts = slice(0, size[0]), slice(size[0], n)
    made = [Features(feats[part].copy(), pids[part], camids[part], names[part], times[part]) for part in parts]
    return made[0], made[1]


def few(q: Features, n: int) -> Features:
    return Features(q.feats[:n], q.pids[:n], q.camids[:n], q.names[:n], None if q.times is None else q.times[:n])


def measured(call: Callable[[], Any], rounds: int) -> dict[str, Any]:
    wall, cpu, peak = [], [], 0
    for _ in range(rounds):
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        started, worked = time.perf_counter(), time.process_time()
        result = call()
        wall.append(round(time.perf_counter() - started, 3))
        cpu.append(round(time.process_time() - worked, 3))
        peak = max(peak, _resident("VmHWM") - before)
        del result
    return {"seconds": statistics.median(wall), "all": wall, "cpu_seconds": cpu, "peak_mib": round(peak / 2**20)}


def quality(scores: np.ndarray, q: Features, g: Features) -> float:
    """Share of queries whose first is right."""
    return round(float((g.pids[scores.argmax(1)] == q.pids).mean()), 4)


def case(name: str, rounds: int, peer: Path | None) -> dict[str, Any]:
    sizes = {"msmt17": MSMT17, "tlift": DUKE, "torchreid": SMALL}
    size = sizes.get(name, MARKET)
    q, g = people(size)
    rerank(few(q, 50), few(g, 200))  # what is loaded and made at a first call
    about: dict[str, Any] = {"queries": size[0], "gallery": size[1], "dims": q.feats.shape[1]}
    if name in ("market", "msmt17"):
        return {**about, **measured(lambda: rerank(q, g), rounds if name == "market" else 1)}
    if name == "expand":
        return {**about, "k": 5, **measured(lambda: expand(q, g, k=5), rounds)}
    if name == "tlift":
        scores = np.random.default_rng(1).random(size, np.float32)
        tlift(few(q, 50), g, scores[:50])
        return {**about, "cameras": 8, **measured(lambda: tlift(q, g, scores), rounds)}
    if name == "single":
        started = time.perf_counter()
        graph = GalleryGraph(g)
        made = time.perf_counter() - started
        one = [few(Features(q.feats[i:], q.pids[i:], q.camids[i:], q.names[i:]), 1) for i in range(110)]
        found = [measured(lambda query=query: graph.rerank(query), 1) for query in one][10:]  # the first ones warm up
        wall = sorted(row["seconds"] for row in found)
        cpu = statistics.median(row["cpu_seconds"][0] for row in found)
        alone = rerank(one[0], g)
        return {
            **about,
            "graph_seconds": round(made, 2),
            "seconds": wall[50],
            "q1": wall[25],
            "q3": wall[75],
            "cpu_seconds": cpu,
            "farthest_from_rerank": float(np.abs(graph.rerank(one[0]) - alone).max()),
        }
    assert peer is not None  # see main
    spec = importlib.util.spec_from_file_location("peer", next(peer.glob("**/utils/rerank.py")))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unit = [x.feats / np.linalg.norm(x.feats, axis=1, keepdims=True) for x in (q, g)]
    # It squares what it gets: Euclidean distances of unit vectors become the squared ones of the paper.
    blocks = [
        np.sqrt(np.clip(2 - 2 * a @ b.T, 0, None)) for a, b in ((unit[0], unit[1]), (unit[0],) * 2, (unit[1],) * 2)
    ]
    theirs: list[np.ndarray] = []
    slow = measured(lambda: theirs.append(module.re_ranking(*blocks)), 1)
    given = tuple(blocks[i] ** 2 for i in (1, 0, 2))
    ours = rerank(q, g, distances=given)  # type: ignore[arg-type]
    return {
        **about,
        "reid3d": measured(lambda: rerank(q, g), rounds),
        "torchreid": slow,
        "farthest_apart": float(np.abs(1 - theirs[0] - ours).max()),
        "within_1e-5": float((np.abs(1 - theirs[0] - ours) <= 1e-5).mean()),
        "rank1": {"reid3d": quality(ours, q, g), "torchreid": quality(1 - theirs[0], q, g)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="?")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--torchreid", type=Path, metavar="FOLDER")
    parser.add_argument("--here", action="store_true", help="one case, in this process, to the output")
    args = parser.parse_args()
    if "torchreid" in args.cases and args.torchreid is None:
        parser.error("--torchreid must say where torchreid is, or --cases leave it out")
    torch.set_num_threads(args.threads)
    if args.here:
        print(json.dumps(case(args.cases[0], args.rounds, args.torchreid)))
        return
    found: dict[str, Any] = (
        json.loads(args.json.read_text()) if args.json.exists() else {"suite": "rerank", "cases": {}}
    )
    for name in args.cases:
        about, started = bench.environment("cpu", args.threads, 0.0, {}), time.perf_counter()
        words = ["--here", "--cases", name, "--threads", str(args.threads), "--rounds", str(args.rounds)]
        if args.torchreid:
            words += ["--torchreid", str(args.torchreid)]
        said = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
        about["seconds"] = round(time.perf_counter() - started, 1)
        found["environment"] = about
        found["cases"][name] = {**json.loads(said.stdout), "commit": about["commit"]}
        print(name, json.dumps(found["cases"][name]), flush=True)
        with atomic_write(args.json) as file:
            file.write(json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
