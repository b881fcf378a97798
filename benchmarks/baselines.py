"""Trains the 2D methods and OG-Net-Small by their recipes for a CPU on a synthetic world, and searches people not seen.

    python benchmarks/baselines.py benchmarks/results/baselines-cpu.json [--folder build/baselines] [--seeds 1]
                                   [--workers 2] [--recipes synth_rmgl synth_relation_s ...]

What `reid3d study compare` does, several recipes at a time, one thread each. The same command goes on where it stopped.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from reid3d import bench
from reid3d.io import atomic_write
from reid3d.preprocess.synth import synth
from reid3d.study import compare

RECIPES = ["synth_rmgl", "synth_relation_s", "synth_qaconv50", "synth_plr_osnet", "synth"]  # the longest first


def compared(recipe: str, world: Path, folder: Path, seeds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return compare([recipe], world, folder / recipe, seeds=seeds, device="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/baselines"), help="for the world and the runs")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="recipes at a time, of one thread each")
    args = parser.parse_args()
    started = time.perf_counter()
    environment = bench.environment("cpu", 1, 0.0, {})  # of now: a repository may go on meanwhile
    world = synth(args.folder / "standard", preset="standard")
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(compared, recipe, world, args.folder, args.seeds) for recipe in args.recipes]
        tables = [run.result() for run in runs]
    environment["seconds"] = round(time.perf_counter() - started, 1)
    rows = [row for table in tables for row in table["rows"]]
    found = {"suite": "baselines", "world": "standard", "environment": environment, "rows": rows}
    with atomic_write(args.json) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
