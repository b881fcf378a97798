"""The results page: one HTML file with queries, their ranked matches and all their clouds, that needs no network.

page.html beside this file holds the style and the script; this file fills in rows and clouds. A cloud travels as JSON
{"name", "size", "cam", "points", "body", "origin", "step", "data"}: data is base64 of the zlib stream of the planes
x, y, z (int16, little-endian: metres = origin + step * value), then r, g, b (uint8), the `body` points of the body
first and the background after them.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..cloud import PointCloud
from ..data import CloudDataset, CloudSplit, open_clouds
from ..io import Record, atomic_write
from ..retrieval import Features, Ranks, Result, evaluate

MATCHES = 6


def view(
    ranks: Ranks, out: str | Path = "ranks.html", *, dataset: CloudDataset | None = None, queries: int = 12
) -> Path:
    """Write a self-contained HTML page with ranked matches as clouds that the mouse turns, framed right or wrong.

    Shows up to `queries` queries, a third each the worst, the best (by average precision) and drawn at random (always
    the same ones), with up to 6 matches each; about 40 kB a cloud of 128 x 64. Use `search(..., cross_camera=True)`
    for the order that `evaluate` scores. The clouds are read from `dataset`, or from the folder that the features came
    from.

    Raises: ValueError when queries < 1, there are no queries, or a cloud that the features name is not in the data set;
        FileNotFoundError when the folder is gone; OSError naming `out`.
    """
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    if not len(ranks.query):
        raise ValueError("ranks must have queries, got none")
    query, gallery = _Source(ranks.query, dataset), _Source(ranks.gallery, dataset)
    result = _result(ranks)
    shown = _choose(result, len(ranks.query), queries)
    page = _Page()
    rows = [_row(page, ranks, result, i, groups, query, gallery) for i, groups in shown.items()]
    parts = {
        "header": _header(ranks, result, len(shown)),
        "tabs": _tabs(list(shown.values())),
        "rows": "\n".join(rows),
        "clouds": json.dumps(page.clouds).replace("<", "\\u003c"),  # no name can end the script element
    }
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"<!--{name}-->", part)
    with atomic_write(out) as file:
        file.write(text.encode("utf-8", "replace"))
    return Path(out)


class _Source:
    """Where the clouds of some features are."""

    def __init__(self, features: Features, dataset: CloudDataset | None) -> None:
        self.features = features
        dataset = dataset or open_clouds(features.source)
        self.split: CloudSplit = getattr(dataset, features.split or "all")
        self._rows = {record.name: row for row, record in enumerate(self.split.records)}

    def __getitem__(self, i: int) -> tuple[PointCloud, Record]:
        row = self._row(i)
        return self.split.cloud(row), self.split.records[row]

    def body(self, i: int) -> tuple[str, dict[str, np.ndarray]]:
        return self.split.body(self._row(i))

    def _row(self, i: int) -> int:
        name = self.features.names[i]
        if name not in self._rows:
            raise ValueError(f"dataset must hold the cloud of {name}, which {self.split.root} does not")
        return self._rows[name]


class _Page:
    """The clouds of the page, each kept once however often it is shown."""

    def __init__(self) -> None:
        self.clouds: list[dict[str, Any]] = []
        self._number: dict[tuple[str, ...], int] = {}

    def number(self, source: _Source, i: int) -> int:
        key = (str(source.split.root), source.split.name, source.features.names[i])
        if key not in self._number:
            self._number[key] = len(self.clouds)
            self.clouds.append(encode_cloud(*source[i]))
        return self._number[key]


def encode_cloud(cloud: PointCloud, record: Record) -> dict[str, Any]:
    """The cloud as the page holds it (see the top of this file); coordinates move by at most half a step."""
    order = np.argsort(cloud.vertex < 0, kind="stable")
    xyz, rgb = cloud.xyz[order].astype(np.float64), cloud.rgb[order]
    low, high = xyz.min(0), xyz.max(0)
    origin, step = (low + high) / 2, max(float((high - low).max()) / 2 / 32767, 1e-9)
    planes = np.round((xyz - origin) / step).astype("<i2").T.tobytes() + rgb.T.tobytes()
    return {
        "name": record.name,
        "size": list(record.size),
        "cam": list(record.cam),
        "points": len(cloud),
        "body": int((cloud.vertex >= 0).sum()),
        "origin": origin.tolist(),
        "step": step,
        "data": base64.b64encode(zlib.compress(planes, 9)).decode(),
    }


def _result(ranks: Ranks) -> Result | None:
    try:
        return evaluate(ranks.query, ranks.gallery)
    except ValueError:  # identities unknown or never met again: the page shows the order alone
        return None


def _choose(result: Result | None, available: int, queries: int) -> dict[int, list[str]]:
    """{query: the groups it is shown in}, in the order of the page; as many queries as wanted, or all there are."""
    queries = min(queries, available)
    groups: dict[str, list[int]] = {"random": [], "worst": [], "best": []}
    if result:
        scored = np.flatnonzero(result.per_query.rank > 0)
        ascending = scored[np.argsort(result.per_query.ap[scored], kind="stable")].tolist()
        groups["worst"], groups["best"] = ascending[: queries // 3], ascending[::-1][: queries // 3]
    shown = {*groups["worst"], *groups["best"]}
    for i in np.random.default_rng(0).permutation(available).tolist():
        if len(shown) == queries:
            break
        shown.add(i)
        groups["random"].append(i)
    chosen: dict[int, list[str]] = {}
    for group, members in groups.items():
        for i in sorted(members) if group == "random" else members:
            chosen.setdefault(i, []).append(group)
    return chosen


def _header(ranks: Ranks, result: Result | None, shown: int) -> str:
    people = len(set(ranks.query.pids.tolist()))
    counts = (
        f"{len(ranks.query):,} queries of {people:,} people · {len(ranks.gallery):,} gallery clouds · {shown} shown"
    )
    tiles = []
    if result:
        tiles = [
            ("Rank-1", f"{result.cmc[0]:.1%}", f"chance {result.chance.rank1:.1%}"),
            ("Rank-5", f"{result.cmc[4]:.1%}", ""),
            ("mAP", f"{result.mAP:.1%}", f"chance {result.chance.mAP:.1%} · {result.ap} definition"),
            ("mINP", f"{result.mINP:.1%}", f"{result.num_valid:,} of {result.num_query:,} queries have a match"),
        ]
    cells = "".join(
        f"<div class='tile'><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>" for name, value, note in tiles
    )
    return f"<p class='counts'>{counts}</p>" + (f"<dl class='tiles'>{cells}</dl>" if cells else "")


def _tabs(groups: Sequence[Sequence[str]]) -> str:
    names = [name for name in ("random", "worst", "best") if any(name in group for group in groups)]
    if len(names) < 2:
        return ""
    buttons = [f"<button type='button' data-tab='{name}'>{name.capitalize()}</button>" for name in ["all", *names]]
    return "".join(buttons)


def _row(
    page: _Page, ranks: Ranks, result: Result | None, i: int, groups: list[str], query: _Source, gallery: _Source
) -> str:
    q, g = ranks.query, ranks.gallery
    figures = [_figure(page, query, i, "query", "Query", "")]
    for place, (at, sim) in enumerate(zip(ranks.idx[i, :MATCHES].tolist(), ranks.sim[i, :MATCHES], strict=True), 1):
        if at == -1:
            break
        known = q.pids[i] != -1 and g.pids[at] != -1
        verdict = ("right" if q.pids[i] == g.pids[at] else "wrong") if known else "unknown"
        figures.append(_figure(page, gallery, at, verdict, f"{place}", f"{sim:.3f}"))
    note = ""
    if result and result.per_query.rank[i]:
        first = result.per_query.rank[i]
        note = f"average precision {result.per_query.ap[i]:.1%} · first match at place {first:,}"
    elif result:
        note = "no match from another camera in the gallery"
    return (
        f"<section class='row' data-groups='{' '.join(groups)}'><h2>{escape(q.names[i])}<small>{note}</small></h2>"
        f"<div class='cards'>{''.join(figures)}</div></section>"
    )


def _figure(page: _Page, source: _Source, i: int, verdict: str, title: str, sim: str) -> str:
    features = source.features
    pid, camid, name = int(features.pids[i]), int(features.camids[i]), escape(features.names[i])
    who = {-1: "id unknown", 0: "distractor"}.get(pid, f"id {pid}")
    where = f"cam {camid}" if camid != -1 else "cam unknown"
    mark = {"right": " ✓", "wrong": " ✗"}.get(verdict, "")
    what = {"query": "query", "right": "right match", "wrong": "wrong match"}.get(verdict, "match")
    label = f"{what} {title if verdict != 'query' else ''}, {who}, {where}, {name}"
    number = page.number(source, i)
    return (
        f"<figure class='card {verdict}' title='{name}'><div class='stage'>"
        f"<canvas class='cloud' data-cloud='{number}' tabindex='0' role='img' aria-label='Cloud of {label}'></canvas>"
        f"<canvas class='crop' data-cloud='{number}' role='img' aria-label='Crop of {label}'></canvas></div>"
        f"<figcaption><b>{title}<i>{mark}</i></b><span>{sim}</span><small>{who} · {where}</small></figcaption>"
        "</figure>"
    )
