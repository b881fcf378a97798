"""What this installation has and whether it works, and what a data set holds. `reid3d doctor` prints it."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPEN3D_PACKAGES = "apt-get install libusb-1.0-0 libidn2-0 libegl1 libgl1 libgl1-mesa-dri"
OPEN3D_PROBE = """
import sys
import open3d
window = open3d.visualization.Visualizer()
if not window.create_window(width=16, height=16, visible=False):
    sys.exit("it finds no OpenGL driver")
window.poll_events()
"""


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
        "open3d": why_no_open3d() or "ok",
    }


def why_no_open3d() -> str | None:
    """Why Open3D cannot draw here, with what to install; None where it can. It is tried in another process, which ends
    where a driver is missing.
    """
    tried = subprocess.run(
        [sys.executable, "-c", OPEN3D_PROBE], capture_output=True, text=True, errors="replace", check=False
    )
    if tried.returncode == 0:
        return None
    said = [line for line in tried.stderr.splitlines() if line.strip()] or [f"it ended with {tried.returncode}"]
    if "No module named 'open3d'" in said[-1]:
        return "Open3D is not installed: pip install 'reid3d[view]'"
    return f"Open3D cannot draw here ({said[-1].strip()}): {OPEN3D_PACKAGES}"


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
        "gated_pool": (
            lambda: ops.gated_pool(line, line, pairs, line[0]).extreme,
            [[[0, 1, 3], [0, 2, 6], [0, 6, 18]]],
        ),
        "match_maps": (lambda: ops.match_maps(line, line[:, :, [1, 0, 2]]), [[[[10, 0, 0], [0, 10, 0]]]]),
        "match_places": (lambda: ops.match_places(line[:, 1], pairs[:, 0, 1:], pairs[:, 0, :1] - 1), [[2]]),
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
        f"open3d    {report['open3d']}",
    ]
    for device, results in report["ops"].items():
        lines += [f"{f'on {device}':<10}{name}: {result}" for name, result in results.items()]
    return "\n".join(lines)


def report_data(root: str | Path) -> dict[str, Any]:
    """What a data set holds, as plain JSON types: of images, see `reid3d.data.list_images`, or of clouds.

    {"root", "layout", "splits": {name: {"images", "people", "cameras", "junk", "distractors", "without_camera",
    "without_time"}}, "rejected": {reason: [count, first name]}, "notes"}. Junk has pid -1 (in split "all": people who
    are not known), distractors have pid 0; neither counts among the people.

    Raises: as `reid3d.data.list_images` and `reid3d.data.open_dataset`; ValueError when there is nothing in it.
    """
    from .data import list_images, open_clouds
    from .data.layouts import SPLITS
    from .io import DATASET_FILE, FAILURES_FILE, manifest_path

    root = Path(root)
    if (root / DATASET_FILE).is_file() or any(manifest_path(path).is_file() for path in root.glob("[!.]*.safetensors")):
        dataset = open_clouds(root)
        records: list[Any] = [r for name in SPLITS for r in getattr(dataset, name).records]
        layout, notes, rejected = "clouds", [], _failures(root / FAILURES_FILE)
    else:
        listing = list_images(root)
        records, rejected, layout, place, notes = list(listing.images), *listing[1:]
        root = root if root.is_file() else place
    if not records:
        why = "; ".join(f"{name}: {reason}" for name, reason in rejected[:3]) or "it is empty"
        raise ValueError(f"data: nothing to use in {root} ({why})")
    splits = {}
    for split in SPLITS:
        if mine := [record for record in records if record.split == split]:
            cameras = {record.camid for record in mine} - {-1}
            splits[split] = {
                "images": len(mine),
                "people": len({record.pid for record in mine} - {-1, 0}),
                "cameras": len(cameras),
                "junk": sum(record.pid == -1 for record in mine),
                "distractors": sum(record.pid == 0 for record in mine),
                "without_camera": sum(record.camid == -1 for record in mine),
                "without_time": sum(record.time == -1 for record in mine),
            }
    reasons: dict[str, list[Any]] = {}
    for name, reason in rejected:
        reasons.setdefault(reason, [0, name])[0] += 1
    return {"root": str(root), "layout": layout, "splits": splits, "rejected": reasons, "notes": notes}


def format_data(report: dict[str, Any]) -> str:
    """What `report_data` found, as lines of text."""
    lines = [f"{report['layout']} in {report['root']}"]
    for split, has in report["splits"].items():
        known = f"{has['people']:,} people, {has['cameras']} cameras"
        apart = [f"{has[kind]:,} {kind}" for kind in ("junk", "distractors") if has["images"] > has[kind] > 0]
        for what in ("camera", "time"):
            if without := has[f"without_{what}"]:
                apart.append(f"no {what}s" if without == has["images"] else f"{without:,} without a {what}")
        lines.append(f"{split:<10}{has['images']:>9,} images, {', '.join([known, *apart])}")
    for reason, (number, first) in report["rejected"].items():
        lines.append(f"not used  {number:>9,} files, such as {first}: {reason}")
    lines += [f"note      {note}" for note in report["notes"]]
    return "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)


def _failures(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return [(str(line["name"]), str(line["reason"])) for line in map(json.loads, lines)]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not the failures of a conversion: {error!r}") from error


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
