"""The figures as lines of text, at most 120 characters wide."""

import re
from collections.abc import Iterator
from typing import Any


def heading(about: dict[str, Any], absent: dict[str, str]) -> Iterator[str]:
    chip = about["cpu"] if about["device"].startswith("cpu") else ", ".join(about["gpus"])
    yield f"reid3d {about['reid3d']} ({about['commit']}), torch {about['torch']}, kernels: {about['backend']}"
    yield f"{chip}, {about['device']}, {about['threads']} CPU threads, instructions: {about['isa'] or 'any'}"
    there = [f"{name} {version}" for name, version in about["peers"].items() if version]
    yield f"beside: {', '.join(there) or 'plain torch only'}"
    missing = [name for name, why in absent.items() if why == "not installed"]
    if missing:
        advice = '; pip install --no-build-isolation -e ".[peers]"' if missing != ["pytorch3d"] else ""
        yield f"not installed: {', '.join(missing)}{advice}"
    yield from (f"{name} {why}" for name, why in absent.items() if why != "not installed")


def rows(result: dict[str, Any]) -> Iterator[str]:
    """One case: milliseconds, how many times ours that is, and the share that agrees with float64."""
    yield ""
    yield f"{result['op']}, {result['shape']}"
    ours = result["contenders"][0]["ms"]["median"]
    for entry in result["contenders"]:
        if "failed" in entry:
            yield f"  {entry['name']:<34.34}failed: {entry['failed']}"[:120]
            continue
        ms = entry["ms"]
        times = "" if entry is result["contenders"][0] else f"x {_short(ms['median'] / ours)}"
        agrees = "" if entry["agrees"] is None else _percent(entry["agrees"])
        spread = f"({_short(ms['q1'])} - {_short(ms['q3'])})"
        line = f"  {entry['name']:<34.34}{_short(ms['median']):>9} ms  {spread:<21}{times:>9}  {agrees:>10}"
        yield f"{line}  {entry.get('note', '')}".rstrip()


def summary(results: list[dict[str, Any]]) -> Iterator[str]:
    """A line per case: ours, the best of plain torch and the best of the libraries."""
    yield ""
    yield f"{'median ms (times ours; LOST: faster than ours)':<52}{'reid3d':>9}{'plain torch':>22}{'best library':>22}"
    for result in results:
        ours = result["contenders"][0]["ms"]["median"]
        line = f"{result['op'] + ', ' + result['shape']:<52}{_short(ours):>9}"
        for kind in ("torch", "peer"):
            entry = best(result, kind)
            if entry is None:
                line += f"{'-':>22}"
                continue
            ratio = entry["ms"]["median"] / ours
            times = f"(x {_short(ratio)})" if ratio >= 1 else f"LOST x {ratio:.2f}"
            line += f"{_short(entry['ms']['median']):>10} {times:>11}"
            line += f" {re.split('[ .]', entry['name'])[0]}" if kind == "peer" else ""
        yield line


def best(result: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """The fastest contender of a kind."""
    entries = [entry for entry in result["contenders"] if entry["kind"] == kind and "ms" in entry]
    return min(entries, key=lambda entry: entry["ms"]["median"], default=None)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _percent(share: float) -> str:
    return "all agree" if share == 1 else f"{100 * (1 - share):.2g}% off"
