"""What this installation has and whether it works. `reid3d doctor` prints it."""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any


def report() -> dict[str, Any]:
    """Everything a bug report needs, as plain JSON types: versions, kernels in use, devices, a run of every op.

    An extension that cannot be loaded is an entry of the report, not an error. REID3D_NO_EXTENSION=1 in the environment
    leaves the compiled kernels out; the report says so.
    """
    import torch

    from . import __version__

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    backend, isa, broken, checks = "none", None, None, {}
    try:
        from . import ops

        backend, checks = ops.backend(), {device: check_ops(device) for device in devices}
        if "cpp" in backend:
            isa = {512: "avx512", 256: "avx2", 0: "portable"}[torch.ops.reid3d.vector_bits()]
    except ImportError as error:
        broken = str(error)
    package = Path(__file__).parent
    extensions = [str(path) for path in sorted(package.glob("_C*.so"))]
    return {
        "reid3d": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "backend": backend,
        "isa": isa,
        "extensions": extensions,
        "extension_error": broken,
        "extension_off": os.environ.get("REID3D_NO_EXTENSION") == "1",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ops": checks,
    }


def check_ops(device: str) -> dict[str, str]:
    """Run every op once on three points of a line: {op: "ok", or "failed: " and why}."""
    import torch

    from . import ops

    line = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]], device=device)
    pairs = torch.tensor([[[0, 1], [1, 0], [2, 1]]], device=device)
    corner = torch.tensor([[[0.0, 0, 1], [0, 2, 1], [2, 0, 1]]], device=device)
    runs: dict[str, tuple[Callable[[], torch.Tensor], list]] = {
        "knn": (lambda: ops.knn(line, line, 2).idx, pairs.tolist()),
        "farthest_point_sample": (lambda: ops.farthest_point_sample(line, 3), [[0, 2, 1]]),
        "ball_query": (lambda: ops.ball_query(line, line, 1.5, 2), [[[0, 1], [0, 1], [2, 2]]]),
        "group_max": (lambda: ops.group_max(line, pairs), [[[1, 0, 0], [1, 0, 0], [3, 0, 0]]]),
        "edge_pool": (lambda: ops.edge_pool(line, pairs).sumsq, [[[1, 0, 0], [1, 0, 0], [10, 0, 0]]]),
        "morton_order": (lambda: ops.morton_order(line), [[0, 1, 2]]),
        "transpose_graph": (lambda: ops.transpose_graph(pairs, 3).edges, [[0, 3, 1, 2, 5, 4]]),
        "rasterize": (lambda: ops.rasterize(corner, pairs.new_tensor([[0, 1, 2]]), 2, 2).face, [[[0, 0], [0, -1]]]),
    }
    results = {}
    for name, (run, expected) in runs.items():
        try:
            found = run().tolist()
            results[name] = "ok" if found == expected else f"failed: gives {found}, not {expected}"
        except Exception as error:  # whatever it is, the report has to tell it
            results[name] = f"failed: {' '.join(str(error).split())}"
    return results


def format_report(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    kernels = {
        "torch": "plain torch: slow",
        "cpp": f"compiled for the CPU ({report['isa']})",
        "cpp+cuda": f"compiled for the CPU ({report['isa']}) and CUDA",
        "cuda": "compiled for CUDA",
        "none": report["extension_error"],
    }[report["backend"]]
    if report["backend"] == "torch":
        kernels += ", switched off by REID3D_NO_EXTENSION=1" if report["extension_off"] else ", no extension was built"
    lines = [
        f"reid3d    {report['reid3d']}",
        f"python    {report['python']} on {report['platform']}",
        f"torch     {report['torch']}, numpy {report['numpy']}",
        f"kernels   {kernels}",
        *(f"          {path}" for path in report["extensions"]),
        f"cpu       {report['cpu']}, {report['cores']} cores, {report['threads']} threads in use",
        f"cuda      {report['cuda'] or 'not in this torch'}, {', '.join(report['gpus']) or 'no GPU'}",
    ]
    for device, results in report["ops"].items():
        lines += [f"{f'on {device}':<10}{name}: {result}" for name, result in results.items()]
    return "\n".join(lines)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
