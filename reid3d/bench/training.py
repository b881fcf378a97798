"""What `reid3d bench train` measures: OG-Net beside its plain-torch twin, same weights, same clouds.

The twin (`published.py`) samples and groups with our compiled ops: in plain torch these loops alone would take longer
than all the rest. Agreement is with the twin on exact graphs, for the published search rounds its distances. With
several CPU threads OG-Net with one takes its turns too, and its row says how many times faster the threads are.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import published
from .kernels import bodies
from .timing import Case, measure


class Sizes(NamedTuple):
    """What is measured: a network in its own sizes, and a batch of clouds; 0: 8, and on a GPU the published 36."""

    model: str = "ognet"
    batch: int = 0
    points: int = 4096
    ids: int = 751
    kwargs: tuple[tuple[str, Any], ...] = ()


SIZES = Sizes()
TASKS = ("forward", "forward, training", "step")
WAYS = {"ours": "reid3d.models", "twin": "plain torch, as published"}
ALONE = {"alone": "reid3d.models, one thread"}
NEAR = 1e-4  # of the greatest number


def task(way: str, what: str, sizes: Sizes, device: torch.device) -> Callable[[], Tensor]:
    """A call that does it and returns the features; a step is forward, cross-entropy, backward and Adam."""
    from ..models import create_model

    torch.manual_seed(0)
    model: Any = create_model(sizes.model, sizes.ids, **dict(sizes.kwargs)).to(device).train(what != "forward")
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    xyz = bodies(sizes.batch, sizes.points).to(device)
    xyz = xyz - xyz.mean(1, keepdim=True)
    rgb = torch.rand(xyz.shape, generator=torch.Generator().manual_seed(1)).to(device) - 0.5
    labels = torch.arange(sizes.batch, device=device) % sizes.ids

    def feats() -> Tensor:
        if way in ("ours", "alone"):
            return model(xyz, rgb).feats if model.training else model(xyz, rgb)
        return published.forward(model, xyz, rgb, published.AS_OURS if way == "exact" else published.AS_PUBLISHED)[0]

    def forward() -> Tensor:
        with torch.no_grad():
            return feats()

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        found = feats()
        F.cross_entropy(model.head.classifier(found).float(), labels).backward()
        optimizer.step()
        return found.detach()

    call = step if what == "step" else forward
    return _alone(call) if way == "alone" else call


def _alone(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def on_one_thread() -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return on_one_thread


def results(device: torch.device, threads: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Each task: times, peak memory of a first call, and of the features the share within 1e-4 of the twin's."""
    s = SIZES._replace(batch=SIZES.batch or (36 if device.type == "cuda" else 8))
    ways = WAYS | (ALONE if threads > 1 and device.type == "cpu" else {})
    for kind in ("float32", "tf32", "bfloat16") if device.type == "cuda" else ("float32",):
        for what in TASKS:
            with _precision(kind, device):
                case = Case(what, f"{s.model}, {s.batch} x {s.points}, {kind}")
                expected = task("exact", what, s, device)().float()
                for way, name in ways.items():
                    ours = way != "twin"
                    agrees = _agreement(expected) if ours and kind == "float32" else None
                    case.add(name, task(way, what, s, device), agrees, kind="ours" if ours else "torch")
                found = measure(case, seconds, device)
                for way, entry in zip(ways, found["contenders"], strict=True):
                    entry["peak_mb"] = round(_peak(way, what, s, device, threads) / 2**20)
                    entry["points_per_second"] = round(s.batch * s.points / entry["ms"]["median"] * 1e3)
                    entry["note"] = f"{entry['points_per_second']:,} points/s, {entry['peak_mb']:,} MB"
                yield found


def _agreement(expected: Tensor) -> Callable[[Tensor], float]:
    limit = NEAR * float(expected.abs().max())
    return lambda found: float(((found - expected).abs() <= limit).double().mean())


def _precision(kind: str, device: torch.device) -> Any:
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind == "tf32"
    return torch.autocast(device.type, torch.bfloat16) if kind == "bfloat16" else nullcontext()


def _peak(way: str, what: str, sizes: Sizes, device: torch.device, threads: int) -> int:
    """Bytes that a first call takes beyond what there was before: the weights, the clouds and torch itself. On the CPU
    it is Linux that tells.
    """
    if device.type == "cuda":
        call = task(way, what, sizes, device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    # In a process of its own, whose memory has no holes.
    code = f"from reid3d.bench.training import _print_peak; _print_peak(*{(way, what, tuple(sizes), threads)!r})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if said.returncode:
        raise RuntimeError(f"the measurement of memory failed: {said.stderr.strip().splitlines()[-1:]}")
    return int(said.stdout)


def _print_peak(way: str, what: str, sizes: tuple[Any, ...], threads: int) -> None:
    torch.set_num_threads(threads)
    call = task(way, what, Sizes(*sizes), torch.device("cpu"))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    call()
    print(_resident("VmHWM") - before)


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024
