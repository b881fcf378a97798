"""Times the ops against their plain-torch references: median and quartiles in ms, forward, on one device.

python benchmarks/ops.py [--device cuda] [--threads 1]
"""

import argparse
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from reid3d import ops


def measure(call: Callable[[], object], threads: int, seconds: float) -> str:
    result = Timer("call()", globals={"call": call}, num_threads=threads).blocked_autorange(min_run_time=seconds)
    low, median, high = torch.tensor(result.times).mul(1e3).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{median:9.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on every figure")
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
    for name, (kernel, reference) in cases.items():
        figures = [measure(call, options.threads, options.seconds) for call in (kernel, reference)]
        print(f"{name:32}{figures[0]:>28}{figures[1]:>32}")


if __name__ == "__main__":
    main()
