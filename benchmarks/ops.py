"""Times the ops against their plain-torch references: median and quartiles in ms, forward, on one device.

python benchmarks/ops.py [--device cuda] [--threads 1] [--json benchmarks/results/ops-cpu.json]
"""

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from reid3d import doctor, ops


def measure(call: Callable[[], object], threads: int, seconds: float) -> dict[str, float]:
    """Milliseconds: median and quartiles."""
    result = Timer("call()", globals={"call": call}, num_threads=threads).blocked_autorange(min_run_time=seconds)
    quartiles = torch.tensor(result.times).mul(1e3).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return dict(zip(("q1", "median", "q3"), (round(q, 3) for q in quartiles), strict=True))


def environment(device: str, threads: int) -> dict[str, Any]:
    """Machine, versions and commit of a result."""
    about = doctor.report()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    keys = ("reid3d", "python", "platform", "torch", "numpy", "backend", "cpu", "cores", "cuda", "gpus")
    return {
        "commit": commit.stdout.strip(),
        "device": device,
        "threads": threads,
        **{k: str(about[k]) if k == "torch" else about[k] for k in keys},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on every figure")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    xyz = torch.rand(4, 4096, 3, generator=generator).to(options.device)
    feats = torch.rand(4, 768, 128, generator=generator).to(options.device)
    wide = torch.rand(4, 4096, 64, generator=generator).to(options.device)
    centers = xyz[:, :768].contiguous()
    idx = ops.ball_query(centers, xyz, 0.2, 32)
    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "knn 4x4096x3, k=20": (lambda: ops.knn(xyz, xyz, 20), lambda: ops.knn_reference(xyz, xyz, 20)),
        "knn 4x768x128, k=20": (lambda: ops.knn(feats, feats, 20), lambda: ops.knn_reference(feats, feats, 20)),
        "fps 4x4096 -> 768": (
            lambda: ops.farthest_point_sample(xyz, 768),
            lambda: ops.farthest_point_sample_reference(xyz, 768, 0),
        ),
        "ball query 4x768 in 4096, k=32": (
            lambda: ops.ball_query(centers, xyz, 0.2, 32),
            lambda: ops.ball_query_reference(centers, xyz, 0.2, 32),
        ),
        "group max 4x768x32, C=64": (lambda: ops.group_max(wide, idx), lambda: ops.group_max_reference(wide, idx)),
    }
    print(f"torch {torch.__version__}, backend {ops.backend()}, {options.device}, {options.threads} threads")
    print(f"{'':32}{'reid3d.ops, ms':>28}{'plain torch, ms':>32}")
    results = []
    for name, calls in cases.items():
        figures = [measure(call, options.threads, options.seconds) for call in calls]
        text = [f"{f['median']:9.3f} ({f['q1']:.3f}-{f['q3']:.3f})" for f in figures]
        print(f"{name:32}{text[0]:>28}{text[1]:>32}")
        results.append({"case": name, "reid3d_ms": figures[0], "torch_reference_ms": figures[1]})
    if options.json:
        where = environment(options.device, options.threads)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": where, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
