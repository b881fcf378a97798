"""Times the ops beside plain torch and the libraries that do the same, `reid3d bench kernels`, and OG-Net beside its
published form in plain torch, `reid3d bench train`.

All get the same points, in the form they want, and take turns, so that what else the machine does hits all alike.
Reported are median and quartiles of single calls, and which share of the results agrees with an independent reference.
The sizes are those of OG-Net. A library that is not installed is left out.
"""

import importlib
import importlib.metadata
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .. import doctor
from . import kernels, training
from .table import heading, rows, summary
from .timing import measure, one_line

PEERS = {  # distribution: module. The extra [peers] brings all but pytorch3d, which PyPI has no build of.
    "fpsample": "fpsample",
    "pykeops": "pykeops.torch",
    "pytorch3d": "pytorch3d.ops",
    "scipy": "scipy.spatial",
    "torch-cluster": "torch_cluster",
}


def run(
    suite: str, device: str = "cpu", threads: int = 1, seconds: float = 1.0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measure every case: the environment and the results, as plain JSON types. `say` gets the table line by line.

    Args:
        suite: "kernels" or "train".
        device: "cpu" or "cuda", also with a number.
        threads: on the CPU, of ours, of torch, and of the libraries that can use several.
        seconds: time each contender of each case is given; a slow one takes three calls even so.
        say: called with one line at a time.

    Raises:
        RuntimeError: there is no such device.
    """
    from ..models import resolve_device

    where = resolve_device(device)
    before = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read by libraries with an OpenMP of their own when they are loaded
    torch.set_num_threads(threads)
    try:
        peers, absent = load_peers() if suite == "kernels" else ({}, {})
        about = environment(str(where), threads, seconds, peers)
        for line in heading(about, absent):
            say(line)
        results: list[dict[str, Any]] = []
        # Events and the queues of libraries are those of the current device.
        with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
            measured: Iterator[dict[str, Any]]
            if suite == "kernels":
                measured = (measure(case, seconds, where) for case in kernels.cases(where, peers, threads))
            else:
                measured = training.results(where, threads, seconds)
            for result in measured:
                results.append(result)
                for line in rows(result):
                    say(line)
        for line in summary(results):
            say(line)
    finally:
        torch.set_num_threads(before[0])
        os.environ.pop("OMP_NUM_THREADS")
        if before[1] is not None:
            os.environ["OMP_NUM_THREADS"] = before[1]
    return {"suite": suite, "environment": about, "results": results}


def load_peers() -> tuple[dict[str, Any], dict[str, str]]:
    """The libraries that can be imported, and why the others cannot."""
    peers, absent = {}, {}
    for name, module in PEERS.items():
        try:
            peers[name] = importlib.import_module(module)
        except Exception as error:  # built for another torch, say: no reason not to measure the rest
            itself = isinstance(error, ModuleNotFoundError) and error.name in (module, module.split(".")[0])
            absent[name] = "not installed" if itself else f"cannot be imported: {one_line(error)}"
    if "pykeops" in peers:
        importlib.import_module("pykeops").set_verbose(False)
    return peers, absent


def environment(device: str, threads: int, seconds: float, peers: dict[str, Any]) -> dict[str, Any]:
    """Machine, versions and commit of a result."""
    about = doctor.report()
    keys = ("reid3d", "python", "platform", "torch", "numpy", "backend", "isa", "cpu", "cores", "cuda", "gpus")
    return {
        "commit": _commit(),
        "device": device,
        "threads": threads,
        "seconds": seconds,
        **{key: str(about[key]) if key == "torch" else about.get(key) for key in keys},
        "peers": {name: _version(name) if name in peers else None for name in PEERS},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # used from where it was built
        return "unknown"


def _commit() -> str:
    """Of the source tree the package was imported from; no tree that merely has it somewhere below."""
    here = Path(__file__)

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True)

    try:
        known = git("ls-files", "--error-unmatch", here.name).returncode == 0
        return (git("describe", "--always", "--dirty").stdout.strip() if known else "") or "unknown"
    except OSError:
        return "unknown"
