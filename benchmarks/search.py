"""Times exact search beside FAISS's flat index, and an IVF-PQ index with exact re-scoring beside exact search.

    python benchmarks/search.py benchmarks/results/search-cpu.json [--items 1000000] [--threads 1 2]
                                [--index-items 1000000] [--folder build/search]

The features are synthetic, 512 numbers each: people have a middle drawn from a normal distribution, 50 images each
stray from it, and queries are further images of them. The contenders of a case take turns, so that what else the
machine does hits both alike; both times are reported, that of the clock and that of the processor. Memory is what the
process holds at most beyond what it held before the first call, as the system counts it. Needs faiss-cpu, 10 GB of
memory and 2 GB in the folder for a million items.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from reid3d import bench
from reid3d.io import atomic_write
from reid3d.retrieval import Features, build_index, search

DIM, K, IMAGES, STRAY = 512, 10, 50, 1.0


def people(count: int, rng: np.random.Generator, middles: np.ndarray) -> Features:
    """`count` images of the people that have these middles, as unit vectors."""
    pids = rng.integers(1, len(middles) + 1, count)
    feats = rng.standard_normal((count, DIM), dtype=np.float32)
    for at in range(0, count, 4096):
        part = feats[at : at + 4096]
        part *= STRAY
        part += middles[pids[at : at + 4096] - 1]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return Features(feats, pids, np.full(count, -1), [f"{i}.jpg" for i in range(count)], made_by="benchmark")


def held(key: str) -> float:
    """MiB by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def memory(call: Callable[[], Any]) -> float:
    """MiB held at most beyond what was held before, without what has been freed and not given back."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    call()
    return round(held("VmHWM") - before, 1)


def turns(calls: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Medians and the fastest of `rounds` calls of each, in seconds, and what a first one gave, which is not timed."""
    clock: dict[str, list[float]] = {name: [] for name in calls}
    processor: dict[str, list[float]] = {name: [] for name in calls}
    gave = {name: call() for name, call in calls.items()}
    for _ in range(rounds):
        for name, call in calls.items():
            start, spent = time.perf_counter(), time.process_time()
            call()
            clock[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - spent)
    times = {
        name: {
            "median_s": round(statistics.median(clock[name]), 3),
            "fastest_s": round(min(clock[name]), 3),
            "processor_median_s": round(statistics.median(processor[name]), 3),
        }
        for name in calls
    }
    return times, gave


def threads_of_all(count: int) -> None:
    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)


def exact(g: Features, mapped: Features, queries: dict[int, Features], threads: int, rounds: int) -> list[dict]:
    threads_of_all(threads)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(g.feats)
    found = []
    for count, q in queries.items():
        calls = {
            "reid3d": lambda q=q: search(q, g, K),
            "reid3d, memory map": lambda q=q: search(q, mapped, K),
            "faiss flat": lambda q=q: flat.search(q.feats, K),
        }
        times, gave = turns(calls, rounds)
        ours, theirs = times["reid3d"], times["faiss flat"]
        row = {
            "queries": count,
            "items": len(g),
            "threads": threads,
            "same_items": round(float((gave["reid3d"].idx == gave["faiss flat"][1]).mean()), 6),
            "times": times,
            "times_of_faiss": round(ours["median_s"] / theirs["median_s"], 3),
            "processor_times_of_faiss": round(ours["processor_median_s"] / theirs["processor_median_s"], 3),
        }
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def indexed(g: Features, q: Features, path: Path, threads: int, rounds: int) -> dict[str, Any]:
    threads_of_all(threads)
    start, spent = time.perf_counter(), time.process_time()
    build_index(g, path)
    build, processor = time.perf_counter() - start, time.process_time() - spent
    index = faiss.read_index(str(path))
    calls = {"exact": lambda: search(q, g, K), "ivfpq": lambda: search(q, g, K, index=index)}
    times, gave = turns(calls, rounds)
    wanted = gave["exact"].idx

    def recall(shortlist: int) -> float:
        found = search(q, g, K, index=index, shortlist=shortlist).idx
        same = [len(np.intersect1d(a, b)) for a, b in zip(found, wanted, strict=True)]
        return round(sum(same) / wanted.size, 4)

    return {
        "queries": len(q),
        "items": len(g),
        "threads": threads,
        "lists": index.nlist,
        "probes": index.nprobe,
        "codes": index.pq.M,
        "build_s": round(build, 1),
        "build_processor_s": round(processor, 1),
        "file_MB": round(path.stat().st_size / 1e6, 1),
        "recall_at_10": {str(shortlist): recall(shortlist) for shortlist in (10, 100, 1000)},
        "times": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--index-items", type=int, default=1_000_000, help="as many of them in the index; 0: no index")
    parser.add_argument("--queries", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("build/search"), help="for files that are removed again")
    args = parser.parse_args()
    started = time.perf_counter()
    about = bench.environment("cpu", max(args.threads), 0.0, {})
    about["peers"] = {"faiss-cpu": faiss.__version__}
    rng = np.random.default_rng(0)
    middles = rng.standard_normal((max(1, args.items // IMAGES), DIM), dtype=np.float32)
    g = people(args.items, rng, middles)
    queries = {count: people(count, rng, middles) for count in args.queries}
    found: dict[str, Any] = {"suite": "search", "environment": about, "k": K, "dim": DIM, "stray": STRAY}
    args.folder.mkdir(parents=True, exist_ok=True)
    files = [args.folder / f"search-{os.getpid()}{ending}" for ending in (".safetensors", ".faiss")]
    try:
        g.save(files[0])
        mapped = Features.load(files[0], mmap=True)
        threads_of_all(max(args.threads))
        found["MiB_beyond_inputs"] = {str(n): memory(lambda q=q: search(q, g, K)) for n, q in queries.items()}
        print(json.dumps(found["MiB_beyond_inputs"]), flush=True)
        found["exact"] = [row for count in args.threads for row in exact(g, mapped, queries, count, args.rounds)]
        if args.index_items:
            some = g.subset(range(args.index_items)) if args.index_items < len(g) else g
            found["ivfpq"] = indexed(some, queries[args.queries[0]], files[1], max(args.threads), args.rounds)
            print(json.dumps(found["ivfpq"]), flush=True)
    finally:
        for path in files:
            path.unlink(missing_ok=True)
    about["seconds"] = round(time.perf_counter() - started, 1)
    with atomic_write(args.json) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
