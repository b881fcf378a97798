"""The contenders of a case take turns, and each call is timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

ROUNDS = 10  # turns that each contender gets
LEAST = 3  # of them, even if they take longer than it was given


@dataclass
class Contender:
    """One way to do it: `call` is timed; `agrees` gives the share of its result that is right."""

    name: str
    kind: str  # "ours", "torch" or "peer"
    call: Callable[[], Any]
    agrees: Callable[[Any], float] | None = None
    note: str = ""


@dataclass
class Case:
    """An op on one input: those that compute it, ours first, as most will call it."""

    op: str
    shape: str
    contenders: list[Contender] = field(default_factory=list)

    def add(
        self,
        name: str,
        call: Callable[[], Any],
        agrees: Callable[[Any], float] | None = None,
        kind: str = "torch",
        note: str = "",
    ) -> None:
        self.contenders.append(Contender(name, kind, call, agrees, note))


def measure(case: Case, seconds: float, device: torch.device) -> dict[str, Any]:
    """Times and shares of agreement of a case."""
    found = {}
    for contender in case.contenders:
        entry: dict[str, Any] = {"name": contender.name, "kind": contender.kind}
        try:
            result = contender.call()  # the first call, which may load, compile or allocate, is not timed
            entry["agrees"] = None if contender.agrees is None else contender.agrees(result)
        except Exception as error:
            if contender.kind == "ours":
                raise
            entry["failed"] = one_line(error)
        if contender.note:
            entry["note"] = contender.note
        found[contender.name] = entry
    able = [contender for contender in case.contenders if "failed" not in found[contender.name]]
    times: dict[str, list[float]] = {contender.name: [] for contender in able}
    clock = _clock_cuda if device.type == "cuda" else _clock
    for turn in range(ROUNDS):
        for contender in able[turn % len(able) :] + able[: turn % len(able)]:
            spent = times[contender.name]
            if turn < LEAST or sum(spent) < seconds * 1e3:
                spent += clock(contender.call, seconds / ROUNDS)
    for name, spent in times.items():
        found[name]["calls"] = len(spent)
        quartiles = torch.tensor(spent, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        found[name]["ms"] = dict(zip(("q1", "median", "q3"), (round(q, 4) for q in quartiles), strict=True))
    return {"op": case.op, "shape": case.shape, "contenders": list(found.values())}


def _clock(call: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call that begins within the time."""
    times: list[float] = []
    begin = end = time.perf_counter()
    while not times or end - begin < seconds:
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        times.append((end - start) * 1e3)
    return times


def _clock_cuda(call: Callable[[], object], seconds: float) -> list[float]:
    """As `_clock`, by the clock of the device, between events in the stream."""
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < seconds:
        marks = []
        torch.cuda._sleep(4_000_000)  # some 2 ms, in which Python gets ahead: the device should not wait for it
        for _ in range(min(8, 1 + len(times))):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) for start, end in marks]
    return times


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
