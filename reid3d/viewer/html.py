"""The report: a page with queries, their ranked matches and all their clouds, and curves, that needs no network.

page.html beside this file holds the style and the script; this file makes the curves and what the script shows. It is
one file, or a folder of index.html and items-NNN.js, which are loaded when they are scrolled to. What is shown of an
item travels as JSON {"name", "pid", "cam", "crop"}: crop is base64 of a WebP picture; and of a cloud also {"view": [s /
aspect, s, tx, ty] of its record, "size", "body", "origin", "step", "depth", "data"}: data is base64 of the zlib stream
of

* x, y, z of the `body` points of the body, from top to bottom: differences d from the point before, in steps from the
  origin, modulo 2**16 and from -2**15 on, as 2 d or, below 0, -2 d - 1: the low bytes of all x, then the high ones,
  then those of y and z;
* their parts of the body (uint8, 255 unknown);
* a bit for each pixel of the crop, from the highest bit of a byte on, whether it holds a point of the background, which
  lies at `depth`.

Colours are those of the crop where a point falls.
"""

from __future__ import annotations

import base64
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..cloud import PointCloud
from ..data import CloudDataset, ImageDataset, open_dataset
from ..io import Record, atomic_write
from ..retrieval import Features, Ranks, Result, evaluate
from ..retrieval.search import similarity_blocks

MATCHES = 6
MISSED = 2  # of a query's matches that come after those shown
CHUNK = 48  # items loaded at once
STEP = 0.002  # metres
HEIGHT = 160  # pixels of a crop that stands for itself
BINS = 60  # of distances
COSINES = "The weights of this model are not in the run: ranks are by cosines of its features, not by its own matcher."
PARTS = {  # of the body, by what is in the names of its joints; the first that fits
    "head": ("head", "neck", "jaw"),
    "arms": ("elbow", "wrist", "hand", "shoulder", "collar"),
    "legs": ("knee", "hip"),
    "feet": ("ankle", "foot"),
    "trunk": ("",),
}
Source = CloudDataset | ImageDataset


def view(
    ranks: Ranks,
    out: str | Path = "ranks.html",
    *,
    dataset: Source | None = None,
    queries: int = 12,
    k: int = MATCHES,
    scores: np.ndarray | None = None,
    run: str | Path | None = None,
) -> Path:
    """Write a page of ranked matches, as clouds that the mouse turns or as crops, framed right or wrong, with the
    curves of the evaluation.

    Shows up to `queries` queries, a third each the worst, the best (by average precision) and drawn at random (always
    the same ones), with up to k matches each, and up to 2 that come later; about 8 kB a cloud of 128 x 64. Use
    `search(..., cross_camera=True)` for the order that `evaluate` scores.

    Args:
        ranks: what is shown.
        out: a file, everything in it; or a folder, without an ending, that gets index.html and what it loads as it is
            scrolled: for thousands of queries.
        dataset: where the clouds or crops are; None for the folder that the features came from.
        queries: how many.
        k: matches of each, of those that the ranks have.
        scores: (Q, G) float32, where the ranks are not by cosine.
        run: folder of the training, whose curves are shown too, with a word where its model ranks by a matcher of its
            own and there are no scores.

    Returns: the page.

    Raises: ValueError when queries or k < 1, there are no queries, a cloud that the features name is not in the data
        set, or the config of the run cannot be read; FileNotFoundError when the folder is gone; OSError naming `out`.
    """
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not len(ranks.query):
        raise ValueError("ranks must have queries, got none")
    query, gallery = _Source(ranks.query, dataset), _Source(ranks.gallery, dataset)
    result = _result(ranks, scores)
    shown = _choose(result, len(ranks.query), queries)
    items = _Items()
    later = _later(ranks, list(shown), k, scores) if result else {}
    rows = [_row(items, ranks, result, i, k, groups, query, gallery, later.get(i, [])) for i, groups in shown.items()]
    curves = _evaluated(ranks, result, scores) if result else ""
    header = _header(ranks, result, len(shown))
    if scores is None and run is not None and has_matcher(run):
        header += f"<p class='notice'>{COSINES}</p>"
    return _write(Path(out), header, rows, items.encoded(), curves + _trained(run))


def report(run: str | Path, out: str | Path, message: str) -> Path:
    """Write the page of a run without features: `message`, and the curves of its training as far as it went.

    Returns: the page. Raises: OSError naming `out`.
    """
    header = f"<p class='counts'>{escape(str(run))}</p><p class='notice'>{escape(message)}</p>"
    return _write(Path(out), header, [], [], _trained(run))


def has_matcher(run: str | Path) -> bool:
    """Whether the model of a run's config.yaml ranks by a matcher of its own (`retrieval.pair_scores`)."""
    from ..config import read_config
    from ..models import create_model

    path = Path(run) / "config.yaml"
    if not path.is_file():
        return False
    model = read_config(str(path)).model
    return hasattr(create_model(model.name, **model.kwargs), "scores")


def ranked(q: Features, g: Features, scores: np.ndarray, k: int = MATCHES) -> Ranks:
    """The k gallery items of the highest scores (Q, G) of each query, as `search(..., cross_camera=True)` by cosine."""
    idx, sim = np.full((len(q), k), -1, np.int64), np.full((len(q), k), -np.inf, np.float32)
    for i, row in enumerate(scores):
        counted = np.flatnonzero(_counted(q, g, i))
        first = counted[np.argsort(-row[counted], kind="stable")[:k]]
        idx[i, : len(first)], sim[i, : len(first)] = first, row[first]
    return Ranks(q, g, idx, sim)


class _Source:
    """Where the clouds or crops of some features are."""

    def __init__(self, features: Features, dataset: Source | None) -> None:
        self.features = features
        dataset = dataset or open_dataset(features.source)
        self.split: Any = getattr(dataset, features.split or "all")
        self._rows = {record.name: row for row, record in enumerate(self.split.records)}

    def __getitem__(self, i: int) -> tuple[PointCloud, Record]:
        row = self._row(i)
        return self.split.cloud(row), self.split.records[row]

    def body(self, i: int) -> tuple[str, dict[str, np.ndarray]]:
        """The name of the body model, and what it was given, {} where that was not kept."""
        shard, row = self.split.shard(self._row(i))
        return str(shard.config.get("body", "")), shard.body(row)

    def encoded(self, i: int) -> dict[str, Any]:
        about = {
            "name": self.features.names[i],
            "pid": int(self.features.pids[i]),
            "cam": int(self.features.camids[i]),
        }
        if self.split.inputs == "cloud":
            return about | encode_cloud(*self[i], self.body(i)[0])
        picture = Image.fromarray(self.split.pixels(self._row(i), HEIGHT))
        picture.thumbnail((HEIGHT, HEIGHT))
        return about | {"crop": _webp(picture)}

    def _row(self, i: int) -> int:
        name = self.features.names[i]
        if name not in self._rows:
            what = "cloud" if self.split.inputs == "cloud" else "crop"
            raise ValueError(f"dataset must hold the {what} of {name}, which {self.split.root} does not")
        return self._rows[name]


class _Items:
    """What the page shows, each kept once however often it is shown."""

    def __init__(self) -> None:
        self._found: list[tuple[_Source, int]] = []
        self._number: dict[tuple[str, ...], int] = {}

    def number(self, source: _Source, i: int) -> int:
        key = (str(source.split.root), source.split.name, source.features.names[i])
        if key not in self._number:
            source._row(i)
            self._number[key] = len(self._found)
            self._found.append((source, i))
        return self._number[key]

    def encoded(self) -> list[dict[str, Any]]:
        return [source.encoded(i) for source, i in self._found]


def encode_cloud(cloud: PointCloud, record: Record, body_model: str = "") -> dict[str, Any]:
    """The cloud as the page holds it (see the top of this file); the body moves by at most half a step."""
    body = cloud.vertex >= 0
    if not body.any():
        body = ~body
    height, width = record.size
    (s, tx, ty), aspect = record.cam, record.aspect or width / height
    scale = np.array([s / aspect, s])
    pixels = ((cloud.xyz[:, :2].astype(np.float64) + [tx, ty]) * scale + 1) * [width, height] / 2
    place = np.floor(pixels + 1e-4)
    inside = ((place >= 0) & (place < [width, height])).all(1)
    flat = np.where(inside, place[:, 1] * width + place[:, 0], -1).astype(np.int64)
    xyz = cloud.xyz[body].astype(np.float64)
    order = np.lexsort((xyz[:, 0], place[body, 1]))
    low, high = np.floor(xyz.min(0) * 1e4) / 1e4, xyz.max(0)
    step = max(STEP, float((high - low).max()) / 65535)
    steps = np.round((xyz[order] - low) / step).astype(np.int64)
    moves = np.diff(steps, axis=0, prepend=0).astype("<i2").astype(np.int64)
    folded = np.where(moves < 0, -2 * moves - 1, 2 * moves).astype("<u2")  # small ones of either sign: no high byte
    bytes_ = np.ascontiguousarray(folded.T).view(np.uint8).reshape(3, -1, 2).transpose(0, 2, 1)
    mask = np.zeros(height * width, bool)
    mask[flat[~body & inside]] = True
    data = bytes_.tobytes() + _parts(cloud.vertex[body][order], body_model).tobytes() + np.packbits(mask).tobytes()
    return {
        "crop": _webp(Image.fromarray(_crop(cloud.rgb, flat, height, width))),
        "view": [float(f"{value:.7g}") for value in (*scale, tx, ty)],
        "size": [height, width],
        "body": int(body.sum()),
        "origin": low.round(4).tolist(),
        "step": step,
        "depth": round(float((cloud.xyz[~body, 2] if (~body).any() else xyz[:, 2]).mean()), 6),
        "data": base64.b64encode(zlib.compress(data, 9)).decode(),
    }


def _crop(rgb: np.ndarray, flat: np.ndarray, height: int, width: int) -> np.ndarray:
    """The crop again: each point falls back into its pixel, the first of several; an empty one is as the one before."""
    owner = np.full(height * width, -1)
    inside = np.flatnonzero(flat >= 0)[::-1]
    owner[flat[inside]] = inside
    filled = np.maximum.accumulate(np.where(owner >= 0, np.arange(len(owner)), -1))
    picture = np.full((height * width, 3), 230, np.uint8)
    picture[filled >= 0] = rgb[owner[filled[filled >= 0]]]
    return picture.reshape(height, width, 3)


def _parts(vertex: np.ndarray, body_model: str) -> np.ndarray:
    """(N,) uint8, place in PARTS of each vertex of an embedded body."""
    unknown = np.full(len(vertex), 255, np.uint8)
    if not body_model.startswith("embedded-"):
        return unknown
    from ..preprocess.body import JOINT_NAMES, load_body

    weights = load_body(body_model.removeprefix("embedded-")).weights
    words = [
        next(i for i, names in enumerate(PARTS.values()) if any(name in joint for name in names))
        for joint in JOINT_NAMES
    ]
    of_vertex = np.array(words, np.uint8)[weights.argmax(1).numpy()]
    known = (vertex >= 0) & (vertex < len(of_vertex))
    unknown[known] = of_vertex[vertex[known]]
    return unknown


def _webp(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=75)
    return base64.b64encode(file.getvalue()).decode()


def _result(ranks: Ranks, scores: np.ndarray | None) -> Result | None:
    try:
        return evaluate(ranks.query, ranks.gallery, scores=scores)
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


def _blocks(ranks: Ranks, scores: np.ndarray | None) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of queries, and their similarities with all of the gallery."""
    if scores is None:
        for rows, sim in similarity_blocks(ranks.query.feats, ranks.gallery.feats):
            yield rows, sim.numpy()
        return
    step = max(1, 2**22 // max(1, scores.shape[1]))
    for start in range(0, len(scores), step):
        rows = slice(start, min(start + step, len(scores)))
        yield rows, scores[rows]


def _later(
    ranks: Ranks, shown: Sequence[int], k: int, scores: np.ndarray | None
) -> dict[int, list[tuple[int, int, float]]]:
    """{query: its first matches beyond those shown, as (gallery row, place, similarity)}."""
    q, g, found = ranks.query, ranks.gallery, {}
    wanted = set(shown)
    for rows, sim in _blocks(ranks, scores):
        for i in sorted(wanted & set(range(rows.start, rows.stop))):
            counted = _counted(q, g, i)
            order = np.flatnonzero(counted)[np.argsort(-sim[i - rows.start, counted], kind="stable")]
            places = np.flatnonzero(g.pids[order] == q.pids[i])
            first = set(ranks.idx[i, :k].tolist())
            late = [(int(order[p]), int(p) + 1) for p in places.tolist() if int(order[p]) not in first][:MISSED]
            found[i] = [(at, place, float(sim[i - rows.start, at])) for at, place in late]
    return found


def _counted(q: Features, g: Features, i: int) -> np.ndarray:
    """(G,) what the protocol ranks for query i: no junk, and nobody of its own by its own camera."""
    own = (g.pids == q.pids[i]) & (g.camids == q.camids[i]) & (q.camids[i] != -1)
    counted: np.ndarray = (g.pids != -1) & ~own
    return counted


def _header(ranks: Ranks, result: Result | None, shown: int) -> str:
    people = len(set(ranks.query.pids.tolist()))
    counts = f"{len(ranks.query):,} queries of {people:,} people · gallery of {len(ranks.gallery):,} · {shown} shown"
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


def _row(
    items: _Items,
    ranks: Ranks,
    result: Result | None,
    i: int,
    k: int,
    groups: list[str],
    query: _Source,
    gallery: _Source,
    later: list[tuple[int, int, float]],
) -> dict[str, Any]:
    q, g = ranks.query, ranks.gallery
    cards: list[dict[str, Any]] = [{"item": items.number(query, i), "kind": "query"}]
    first = [
        (at, place, float(sim))
        for place, (at, sim) in enumerate(zip(ranks.idx[i, :k].tolist(), ranks.sim[i, :k], strict=True), 1)
        if at != -1
    ]
    for at, place, sim in (*first, *later):
        if g.pids[at] == -1 and q.pids[i] != -1:
            kind = "junk"
        elif q.pids[i] == -1 or g.pids[at] == -1:
            kind = "unknown"
        else:
            kind = "right" if q.pids[i] == g.pids[at] else "wrong"
        card = {"item": items.number(gallery, at), "kind": kind, "place": place, "distance": round(1 - sim, 4)}
        if q.camids[i] != -1 and g.camids[at] == q.camids[i]:
            card["same"] = True
        if (at, place, sim) in later:
            card["missed"] = True
        cards.append(card)
    row: dict[str, Any] = {"name": q.names[i], "pid": int(q.pids[i]), "groups": groups, "cards": cards}
    if result and result.per_query.rank[i]:
        place = int(result.per_query.rank[i])
        row["note"] = f"average precision {result.per_query.ap[i]:.1%} · first match at place {place:,}"
    elif result:
        row["note"] = "no match from another camera in the gallery"
    return row


# Curves, as SVG in the colours of the page.


class _Line(NamedTuple):
    name: str
    x: Sequence[float]
    y: Sequence[float]


def _evaluated(ranks: Ranks, result: Result, scores: np.ndarray | None) -> str:
    q, g = ranks.query, ranks.gallery
    recall = np.linspace(0, 1, 51)
    precision, valid = np.zeros(len(recall)), 0
    low, high = (-1.0, 1.0) if scores is None else (float(scores.min()), float(scores.max()))
    edges = np.linspace(1 - high, 1 - low + 1e-6, BINS + 1)
    counts = np.zeros((2, BINS), np.int64)
    pairs: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for rows, sim in _blocks(ranks, scores):
        for i in range(rows.start, rows.stop):
            counted = np.flatnonzero(_counted(q, g, i))
            own, mine = sim[i - rows.start, counted], g.pids[counted] == q.pids[i]
            for same in (0, 1):
                counts[same] += np.histogram(1 - own[mine == same], edges)[0]
            if not mine.any():
                continue
            order = np.argsort(-own, kind="stable")
            places = np.flatnonzero(mine[order]) + 1
            at = np.arange(1, len(places) + 1) / places  # precision at each match
            best = np.maximum.accumulate(at[::-1])[::-1]
            precision += best[np.minimum(np.ceil(recall * len(places)).astype(int), len(places)) - (recall > 0)]
            valid += 1
            cameras = g.camids[counted[order]]
            for camid in np.unique(cameras[mine[order]]).tolist():
                there = np.flatnonzero(mine[order][cameras == camid]) + 1
                share = np.arange(1, len(there) + 1) / there
                pairs.setdefault((int(q.camids[i]), camid), []).append((float(there[0] == 1), float(share.mean())))
    middles = (edges[1:] + edges[:-1]) / 2
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = {1: "same person", 0: "different"}
    percent = [100 * value for value in result.cmc.tolist()]
    charts = [
        _chart("Matches among the first (CMC)", [_Line("", range(1, len(percent) + 1), percent)], "place", "%", 100),
        _chart(
            "Precision and recall",
            [_Line("", (100 * recall).tolist(), (100 * precision / max(valid, 1)).tolist())],
            "recall, %",
            "%",
            100,
        ),
        _chart(
            "Distances of pairs",
            [_Line(name, middles.tolist(), (100 * shares[same]).tolist()) for same, name in names.items()],
            "distance" if scores is not None else "distance, 1 - cosine",
            "% of pairs",
        ),
    ]
    return f"<h2>Evaluation</h2><div class='charts'>{''.join(charts)}</div>{_camera_table(pairs)}"


def _camera_table(pairs: Mapping[tuple[int, int], list[tuple[float, float]]]) -> str:
    """Of the queries of each camera, who is found among the gallery of each other one alone."""
    if len(pairs) < 2:
        return ""
    starts, ends = (sorted({pair[side] for pair in pairs}) for side in (0, 1))

    def cell(start: int, end: int) -> str:
        found = pairs.get((start, end))
        if not found:
            return "<td></td>"
        rank1, precision = (100 * sum(values) / len(found) for values in zip(*found, strict=True))
        shown = f"{rank1:.0f} <small>{precision:.0f} · {len(found)}</small>"
        return f"<td style='--share:{rank1:.0f}%' title='{len(found)} queries'>{shown}</td>"

    head = "".join(f"<th>{camid}</th>" for camid in ends)
    body = "".join(f"<tr><th>{start}</th>{''.join(cell(start, end) for end in ends)}</tr>" for start in starts)
    return (
        "<h3>From camera to camera</h3><p class='counts'>Rank-1 and, small, mAP, %, and how many queries: a row for "
        "each camera of the queries, a column for the camera of the gallery searched alone</p>"
        f"<div class='scroll'><table class='cameras'><tr><th></th>{head}</tr>{body}</table></div>"
    )


def _trained(run: str | Path | None) -> str:
    """The curves of metrics.jsonl, as far as there is one that can be read."""
    path = Path(run) / "metrics.jsonl" if run is not None else None
    if path is None or not path.is_file():
        return ""
    epochs = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            epochs.append({key: float(value) for key, value in json.loads(line).items()})
        except (ValueError, TypeError, AttributeError):
            break  # the last one of a run that was killed
    names = [name for name in ("loss", "accuracy", "mAP", "rank1", "lr") if any(name in epoch for epoch in epochs)]
    charts = []
    for name in names:
        known = [(epoch["epoch"], epoch[name]) for epoch in epochs if name in epoch and "epoch" in epoch]
        if known:
            charts.append(_chart(name, [_Line("", *zip(*known, strict=True))], "epoch", ""))
    return f"<h2>Training</h2><div class='charts'>{''.join(charts)}</div>" if charts else ""


def _chart(title: str, lines: Sequence[_Line], across: str, up: str, top_value: float | None = None) -> str:
    """Lines over one pair of axes, from 0 up where nothing lies below, to top_value if given."""
    (x0, x1) = _range([value for line in lines for value in line.x], False)
    (y0, y1) = _range([value for line in lines for value in line.y], True)
    y1 = top_value or y1
    left, top, width, height = 54, 10, 300, 170

    def point(x: float, y: float) -> str:
        return f"{left + width * (x - x0) / (x1 - x0):.1f},{top + height * (1 - (y - y0) / (y1 - y0)):.1f}"

    parts = []
    for value in _ticks(y0, y1):
        y = point(x0, value).split(",")[1]
        parts.append(f"<line class='grid' x1='{left}' x2='{left + width}' y1='{y}' y2='{y}'/>")
        parts.append(f"<text x='{left - 6}' y='{y}' dy='.35em' text-anchor='end'>{value:g}</text>")
    for value in _ticks(x0, x1):
        x = point(value, y0).split(",")[0]
        parts.append(f"<text x='{x}' y='{top + height + 16}' text-anchor='middle'>{value:g}</text>")
    for i, line in enumerate(lines):
        points = " ".join(point(x, y) for x, y in zip(line.x, line.y, strict=True) if np.isfinite(x) and np.isfinite(y))
        parts.append(f"<polyline class='line line{i}' points='{points}'/>")
        if line.name:
            parts.append(f"<text class='name{i}' x='{left + width - 4}' y='{top + 12 + 16 * i}' text-anchor='end'>")
            parts.append(f"{escape(line.name)}</text>")
    parts.append(f"<text x='{left + width / 2}' y='{top + height + 34}' text-anchor='middle'>{escape(across)}</text>")
    label = f"{escape(title)}{f', {escape(up)}' if up else ''}"
    return (
        f"<figure class='chart'><figcaption>{label}</figcaption>"
        f"<svg viewBox='0 0 364 220' role='img' aria-label='{label}'>{''.join(parts)}</svg></figure>"
    )


def _range(values: Sequence[float], floored: bool) -> tuple[float, float]:
    known = [float(value) for value in values if np.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    low = min(low, 0.0) if floored else low
    return (low, high) if high > low else (low, low + 1)


def _ticks(low: float, high: float) -> list[float]:
    """Four or so round numbers between."""
    step = 10 ** np.floor(np.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [float(round(step * i, 12)) for i in range(int(np.ceil(low / step)), int(np.floor(high / step + 1e-9)) + 1)]


def _write(
    out: Path, header: str, rows: Sequence[dict[str, Any]], items: Sequence[dict[str, Any]], curves: str
) -> Path:
    page = out if out.suffix.lower() in (".html", ".htm") else out / "index.html"
    chunks = [_json(items[start : start + CHUNK]) for start in range(0, len(items), CHUNK)]
    if page != out:
        out.mkdir(exist_ok=True)
        for old in out.glob("items-*.js"):
            old.unlink()
        for i, chunk in enumerate(chunks):
            with atomic_write(out / f"items-{i:03d}.js") as file:
                file.write(f"chunk({i},{chunk})\n".encode())
    held = "" if page != out else "".join(f"<script type='application/json' class='items'>{x}</script>" for x in chunks)
    groups = [group for group in ("random", "worst", "best") if any(group in row["groups"] for row in rows)]
    about = {"rows": rows, "chunk": CHUNK, "groups": groups if len(groups) > 1 else [], "parts": list(PARTS)}
    if curves:  # beside rows out of the way, until they are asked for
        shown = "" if rows else " open"
        curves = f"<details id='curves'{shown}><summary>Curves</summary>{curves}</details>"
    parts = {
        "policy": "" if page == out else " 'self' file:",
        "header": header,
        "report": _json(about),
        "curves": curves,
        "items": held,
    }
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    pieces = text.split("<!--")
    made = [pieces[0]]
    for piece in pieces[1:]:  # what is filled in is not looked at again
        name, _, rest = piece.partition("-->")
        made += [parts[name], rest]
    with atomic_write(page) as file:
        file.write("".join(made).encode("utf-8", "replace"))
    return page


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")  # no name can end the script element
