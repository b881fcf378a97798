"""Times QAConv's pair matcher beside the published form and a matrix product of as many products.

    python benchmarks/matcher.py benchmarks/results/matcher-cpu.json [--threads 1 2] [--rounds 15]

Maps of 128 x 24 x 8, 32 queries by 64 gallery items; the ways take turns. Memory is what the process holds at most
beyond what it held before a call, as the system counts it, less the result. All against all: `QAConv.scores` of 512
items with themselves, and with a copy, which it takes for others: it matches blocks of 128 items by 128, those of the
diagonal by 32, so that 53 % of the pairs are left, and fewer of more items.
"""

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reid3d import bench, ops
from reid3d.baselines.qaconv import QAConv
from reid3d.io import atomic_write
from reid3d.retrieval import Features

C, ROWS, COLUMNS, Q, G, ALL = 128, 24, 8, 32, 64, 512
SIDE = 1536  # of the square matrices


def published(query: Tensor, gallery: Tensor) -> Tensor:
    """8 x 8 pairs at a time, as fast as it gets: their similarities stay in the cache."""

    def pairs(q: Tensor, g: Tensor) -> Tensor:
        sim = torch.einsum("qci,gcj->qgij", q, g)
        return torch.stack((sim.amax(3), sim.amax(2)), 2)

    return torch.cat([torch.cat([pairs(q, g) for g in gallery.split(8)], 1) for q in query.split(8)])


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def held(key: str) -> float:
    """MiB by /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def memory(call: Callable[[], Tensor]) -> float:
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    result = call()
    return round(held("VmHWM") - before - result.numel() * 4 / 2**20, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    started = time.perf_counter()
    about = bench.environment("cpu", max(args.threads), 0.0, {})
    torch.manual_seed(0)
    query, gallery = (F.normalize(torch.randn(n, C, ROWS * COLUMNS), dim=1) for n in (Q, G))
    square = torch.randn(SIDE, SIDE)
    products = C * (ROWS * COLUMNS) ** 2  # of a pair
    ways: dict[str, tuple[float, Callable[[], Tensor]]] = {
        "reid3d.ops.match_maps": (Q * G, lambda: ops.match_maps(query, gallery)),
        "einsum, 8 x 8 pairs": (Q * G, lambda: published(query, gallery)),
        "square matrix product": (SIDE**3 / products, lambda: square @ square),
    }
    exact = ops.match_maps_reference(query.double(), gallery.double())[0]
    found: dict[str, Any] = {"suite": "matcher", "environment": about, "pairs": [Q, G], "map": [C, ROWS, COLUMNS]}
    found["largest_error"] = float((ops.match_maps(query, gallery) - exact).abs().max())
    found["pairs_per_second"] = {}
    items = np.random.default_rng(0).standard_normal((ALL, C * ROWS * COLUMNS), dtype=np.float32)
    people = Features(items, np.arange(ALL), np.full(ALL, -1), [str(i) for i in range(ALL)])
    model = QAConv(_Backbone()).eval()
    for threads in args.threads:
        torch.set_num_threads(threads)
        if "MiB_beyond_the_result" not in found:
            found["MiB_beyond_the_result"] = memory(lambda: ops.match_maps(query, gallery))
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, (_, call) in ways.items():
                times[name].append(seconds(call))
        rates = {name: round(ways[name][0] / statistics.median(times[name])) for name in ways}
        found["pairs_per_second"][str(threads)] = rates
        print(threads, json.dumps(rates), flush=True)
    copy = replace(people)
    reused, whole = (seconds(lambda other=other: model.scores(people, other)) for other in (people, copy))
    found["all_against_all"] = {"reused_s": round(reused, 2), "as_others_s": round(whole, 2)}
    print(json.dumps(found["all_against_all"]))
    about["seconds"] = round(time.perf_counter() - started, 1)
    with atomic_write(args.json) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")


class _Backbone(nn.Module):
    """Unused: features are given."""

    channels = 1


if __name__ == "__main__":
    main()
