"""What this installation has, and how to get what it lacks. `reid3d doctor` prints it."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

# distribution: what it is for
OPTIONAL = {
    "torch-geometric": "graphs in and out (torch_geometric.data.Data)",
    "smplx": "SMPL body models",
    "trimesh": "meshes",
    "open3d": "a 3D window",
    "faiss-cpu": "search in large galleries",
    "ray": "conversion on many machines",
    "tensorboard": "training curves",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
}


def report() -> dict[str, Any]:
    """Everything a bug report needs, as plain JSON types: versions, kernels in use, devices, optional packages.

    Imports torch and reid3d.ops, and none of the optional packages. REID3D_NO_EXTENSION=1 in the environment leaves the
    compiled kernels out; the report says so.
    """
    import torch

    from . import __version__, ops

    package = Path(__file__).parent
    extensions = [str(path) for path in sorted(package.glob("_C*.so"))]
    optional = {}
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        optional[name] = {"version": version, "for": purpose}
        if version is None:
            optional[name]["install"] = f"python -m pip install {name}"
    return {
        "reid3d": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "backend": ops.backend(),
        "extensions": extensions,
        "extension_off": os.environ.get("REID3D_NO_EXTENSION") == "1",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "optional": optional,
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    kernels = {
        "torch": "plain torch: slow",
        "cpp": "compiled for the CPU",
        "cpp+cuda": "compiled for the CPU and CUDA",
        "cuda": "compiled for CUDA",
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
        "optional packages",
    ]
    for name, entry in report["optional"].items():
        state = entry["version"] or f"missing ({entry['for']}): {entry['install']}"
        lines.append(f"  {name:<16}{state}")
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
