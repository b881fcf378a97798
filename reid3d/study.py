"""Studies: many runs under the same conditions, and one table of what they came to.

A folder of studies holds the clouds, every run (runs/NAME-SEED/, with a JSON for each way it was tested) and the
tables. A run is of no study: whichever needs it next finds it. The same command goes on where it stopped, and several
of them, on one machine or on many that share the folder, share the list of runs. What the studies are made of stands in
studies.py.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import bench
from .baselines.weights import load_backbone
from .cloud import PointCloud
from .config import ModelConfig, TrainConfig, dump_config, read_config, recipes
from .data import CloudDataset, ImageDataset, layouts, list_images, open_clouds, open_dataset, validate_protocol
from .data.transforms import EvalTransform
from .io import atomic_write, hold_folder
from .models import create_model, list_models, resolve_device
from .retrieval import Features, evaluate, extract, pair_scores, rerank, tlift
from .retrieval.tlift import Clock, clock_seconds
from .train import differences, train

TIMED = 8  # items in a batch whose time is taken
PAUSE = 5.0  # seconds between looks at runs that other processes are at
Bodies = Literal["fitted", "mean", "true", "person"]
Backbone = Literal["osnet", "resnet50"]
SHORT = {  # of published data sets, by what `list_images` calls them
    "Market-1501": "market",
    "DukeMTMC-reID": "duke",
    "CUHK03-NP detected": "cuhk",
    "MSMT17 V1": "msmt",
    "MSMT17 V2": "msmt",
}


class Trial(NamedTuple):
    """How a trained network is tested.

    on: which of the data sets its queries and gallery are of. points: taken from each cloud; None for as many as it was
    trained with. turn: degrees by which the queries' clouds are turned about the vertical through the body. rerank,
    lift: what is done to the scores.
    """

    on: int = 0
    points: int | None = None
    turn: float = 0.0
    rerank: bool = False
    lift: bool = False


class Row(NamedTuple):
    """A row of a table: how a network is trained, and how it is tested.

    recipe: a packaged name or a YAML file; None for the defaults; with "_{}" at its end, the one for the data set, else
    the one for all, else Market-1501's. model: in place of the recipe's. kwargs: of it, beside the recipe's where the
    model is the recipe's. words: dotted overrides. backbone: whose weights of ImageNet the published one began with;
    without them its figures are another thing's, and are not shown. bodies: in its clouds, "fitted",
    "mean" for an upright one, or, as a synthetic world tells, "true", and "person" for fitted ones with the person's
    other pixels in place of all the background. trained_on: which of the data sets. paper: published Rank-1 and mAP, %,
    by short name of the data set, or "market to duke"; shown where all of its images are there. x: its place on the
    axis of the plot.
    """

    name: str
    recipe: str | None
    model: str | None = None
    kwargs: Mapping[str, Any] = MappingProxyType({})
    words: tuple[str, ...] = ()
    backbone: Backbone | None = None
    bodies: Bodies = "fitted"
    trained_on: int = 0
    test: Trial = Trial()
    paper: Mapping[str, tuple[float | None, float]] = MappingProxyType({})
    x: float | None = None


class Study(NamedTuple):
    """name: of its files. title: of its table and plot. sized: whether the table says how large and fast networks are.
    axis: what the rows' x are, of which the last rows may have none, and stand beside the others; None where all are
    names. budget: how it is called.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    sized: bool = False
    axis: str | None = None
    budget: str | None = None


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {  # of every table: a heading, and a value of a row
    "model": lambda row: row["recipe"],
    "input": lambda row: row["size"],
    "epochs": lambda row: str(row["runs"][0]["epochs"]),
    "Rank-1, %": lambda row: _spread(row, "rank1"),
    "mAP, %": lambda row: _spread(row, "mAP"),
    "mINP, %": lambda row: _spread(row, "mINP"),
}
SIZES: dict[str, Callable[[dict[str, Any]], str]] = {
    "parameters, M": lambda row: f"{row['parameters'] / 1e6:.2f}",
    "GMACs": lambda row: f"{row['macs'] / 1e9:.3f}",
    "feature": lambda row: str(row["feature_size"]),
    "ms an item": lambda row: f"{row['ms']:.1f}",
}
PUBLISHED: dict[str, Callable[[dict[str, Any]], str]] = {
    "paper, Rank-1 / mAP, %": lambda row: " / ".join("?" if x is None else f"{x:.1f}" for x in row["paper"] or ()),
}


def compare(
    models: Sequence[str],
    data: str | Path,
    out: str | Path,
    *,
    seeds: int = 1,
    epochs: int | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train networks of clouds and methods of images on the same people, from the same seeds, and rank the same
    queries by the same evaluator: `run_study` of a list of models.

    Args:
        models: recipes, packaged or YAML files, each with its model and how it is trained; or names of models, which
            are trained by the defaults. Files of different names.
        data: the images, a data set in any usual layout with train, query and gallery; converted for networks of
            clouds by the embedded fitter.
        out, seeds, epochs, device, say: as of `run_study`.

    Returns: as `run_study`.

    Raises: ValueError: no models, or one that is unknown or named twice; as `run_study`.
    """
    if not models or len({Path(name).stem for name in models}) < len(models):
        raise ValueError(f"models must be different recipes, at least one, got {', '.join(models) or 'none'}")
    rows = []
    for name in models:
        recipe = Path(name).is_file() or name in recipes()
        if not recipe and name not in list_models():
            known = f"the recipes {', '.join(recipes())}, or the models {', '.join(list_models())}"
            raise ValueError(f"models must be YAML files, {known}, got {name!r}")
        rows.append(Row(Path(name).stem, name if recipe else None, None if recipe else name))
    study = Study("compare", "2D beside 3D", tuple(rows), sized=True)
    return run_study(study, [data], out, seeds=seeds, epochs=epochs, device=device, say=say)


def run_study(
    study: Study,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    seeds: int = 1,
    epochs: int | None = None,
    device: str = "auto",
    clock: Clock = "frames",
    backbones: Mapping[Backbone, str | Path] = MappingProxyType({}),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train and test every row of a study from every seed, and write NAME.json, NAME.csv, NAME.md and NAME.svg; where
    epochs are given, their number stands behind the name.

    What was done is left as it is. Runs that another process is at are passed over, and waited for in the end.

    Args:
        study: what to run.
        data: folders of images in any usual layout, with train, query and gallery; the first is the one that rows
            without another are of. They are converted for networks of clouds.
        out: folder of studies.
        seeds: runs of each row, from 0.
        epochs: of every run; None leaves them to the recipes, which then may differ.
        clock: of the images' times, see `clock_seconds`.
        backbones: weights of ImageNet, files that `model.backbone` takes, that the rows of methods that have them begin
            with; without, they begin from scratch.
        say: told of each result as it comes.

    Returns: {"suite", "title", "axis", "budget", "data", "protocol", "clock", "environment" (of this call; "seconds" of
        all trainings), "rows": [{"recipe", the row's name, "model", "inputs", "size" (in words), "tested" (the data
        set), "x", "paper", "rank1", "mAP", "mINP" and their "_std", "chance_mAP", "runs": [...]}]}, shares in [0, 1];
        what NAME.json holds. A study that is sized also has "parameters" (without classifiers), "macs" (products of
        layers and attention for one item; searches for neighbours and pair matchers not counted), "feature_size" and
        "ms" (of the network on a CPU, once for an item in a batch of 8) in its rows.

    Raises: ValueError: seeds below 1, too few data sets, one without one of the splits, times that are asked for and
        not known, a folder that holds clouds or a run of other data, or weights of another backbone; FileNotFoundError:
        such weights are not there, or true bodies of no synthetic world are asked for; ImportError: no matplotlib;
        RuntimeError: in the end, when all others are done, if runs fail; as `train` and `convert_folder`.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    needed = 1 + max(max(row.trained_on, row.test.on) for row in study.rows)
    if len(data) != needed:
        raise ValueError(f"data must be {needed} folder{'s' if needed > 1 else ''} of images, got {len(data)}")
    _figure()
    out = Path(out)
    worlds = [_World(root, out, i) for i, root in enumerate(data)]
    configs = [
        [_config(row, seed, epochs, device, out, worlds[row.trained_on].short, backbones) for seed in range(seeds)]
        for row in study.rows
    ]
    for world in worlds:
        if world.short and not world.whole:
            say(f"{world.root}: these are not all of the published images, and published figures are not shown")
    inputs = []  # this and what follows: what would fail otherwise after hours of training
    for first, *_ in configs:
        model = _bare(first)
        inputs.append(str(model.inputs))
        if first.model.backbone:
            load_backbone(model, first.model.backbone)
    for row, kind in zip(study.rows, inputs, strict=True):
        for i in (row.trained_on, row.test.on):
            dataset = worlds[i].dataset(kind, row.bodies)
            validate_protocol(dataset.query, dataset.gallery)
        if row.test.lift:
            _seconds_of(worlds[row.test.on].dataset(kind, row.bodies), clock)
    found: dict[tuple[int, int], dict[str, Any]] = {}
    failed: dict[str, str] = {}  # why, by run, which rows may share
    kept = _Kept()
    left = True
    while left:
        left, before = False, len(found) + len(failed)
        for i, (row, kind) in enumerate(zip(study.rows, inputs, strict=True)):
            learnt, tested = worlds[row.trained_on], worlds[row.test.on]
            for seed in range(seeds):
                if (i, seed) in found or configs[i][seed].out in failed:
                    continue
                config = replace(configs[i][seed], data=str(learnt.path(kind, row.bodies)))
                held = {
                    "train": learnt.fingerprint(kind, row.bodies, "train"),
                    "query": tested.fingerprint(kind, row.bodies, "query"),
                    "gallery": tested.fingerprint(kind, row.bodies, "gallery"),
                }
                try:
                    result = _result(config, tested.dataset(kind, row.bodies), held, row.test, clock, kept)
                except BlockingIOError:  # another process is at it: later
                    left = True
                except (RuntimeError, MemoryError) as error:  # such as a loss that is not finite: the others first
                    failed[config.out] = f"{row.name}, seed {seed}: {error}"
                    say(failed[config.out])
                else:
                    found[i, seed] = result
                    say(f"{row.name}, seed {seed}: Rank-1 {result['rank1']:.1%}, mAP {result['mAP']:.1%}")
        if left and len(found) + len(failed) == before:
            time.sleep(PAUSE)
    if failed:
        count = len({config.out for row_configs in configs for config in row_configs})
        raise RuntimeError(
            f"{len(failed)} of {count} runs failed, so that there is no table; the first, {next(iter(failed.values()))}"
        )
    rows = [
        _row(row, kind, [found[i, seed] for seed in range(seeds)], configs[i][0], worlds, study)
        for i, (row, kind) in enumerate(zip(study.rows, inputs, strict=True))
    ]
    runs = {run["run"]: run["minutes"] for row in rows for run in row["runs"]}  # each trained once
    seconds = round(60 * sum(runs.values()))
    names = [world.name for world in worlds]
    table = {
        "suite": study.name if epochs is None else f"{study.name}-{epochs}",
        "title": study.title,
        "axis": study.axis,
        "budget": study.budget,
        "data": ", ".join(names if len(set(names)) == len(names) else map(str, data)),
        "protocol": rows[0]["runs"][0]["protocol"],
        "clock": clock if any(row.test.lift for row in study.rows) else None,
        "environment": bench.environment(str(resolve_device(device)), torch.get_num_threads(), seconds, {}),
        "rows": rows,
    }
    written = {"json": json.dumps(table, indent=2) + "\n", "csv": _csv(table), "md": markdown(table) + "\n"}
    for kind, text in written.items():
        with atomic_write(out / f"{table['suite']}.{kind}") as file:
            file.write(text.encode())
    plot(table, out / f"{table['suite']}.svg")
    return table


def markdown(table: dict[str, Any]) -> str:
    """The table of a study in Markdown."""
    columns = dict(COLUMNS)
    if any(row["paper"] for row in table["rows"]):
        columns |= PUBLISHED
    if "parameters" in table["rows"][0]:
        columns |= SIZES
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in table["rows"]]
    seeds = max(len(row["runs"]) for row in table["rows"])
    how = f"mean and deviation of {seeds} seeds" if seeds > 1 else "one seed"
    chances = sorted({row["chance_mAP"] for row in table["rows"]})
    chance = " to ".join(dict.fromkeys(f"{value:.1%}" for value in (chances[0], chances[-1])))
    about = f"{table['data']}, budget {table['budget']}" if table["budget"] else table["data"]
    notes = [f"{about}: {table['protocol']}; {how}; a random order has an mAP of {chance}."]
    if table["clock"]:
        notes.append(f"Times by the clock {table['clock']}.")
    several = len({row["tested"] for row in table["rows"]}) > 1
    sizes = {
        (row["tested"] if several else f"{row['inputs']}s", run["num_query"], run["num_gallery"])
        for row in table["rows"]
        for run in row["runs"]
    }
    if len({size[1:] for size in sizes}) > 1:
        said = [f"{of}: {query} queries, gallery of {gallery}" for of, query, gallery in sorted(sizes)]
        notes.append(f"Not all rank as many: {'; '.join(said)}.")
    if "parameters" in table["rows"][0]:
        count = table["environment"]["threads"]
        threads = f"{count} thread{'s' if count > 1 else ''}"
        notes.append(
            f"Parameters without classifiers; ms of the network alone on a CPU, {threads}, batches of {TIMED}."
        )
    return "\n".join([*lines, "", *notes])


def plot(table: dict[str, Any], path: Path) -> None:
    """The table's Rank-1 and mAP, with their deviations, as SVG: bars, or lines where its rows have places on an axis,
    with points beside for those that have none.

    Raises: ImportError without matplotlib.
    """
    from matplotlib import rc_context

    rows, lines = table["rows"], table["axis"] is not None
    places = [row["x"] for row in rows if row["x"] is not None]
    joined = len(places)
    if lines:
        step = (max(places) - min(places)) / joined
        places += [max(places) + step * (i + 1) for i in range(len(rows) - joined)]
    figure = _figure(figsize=(7, 3.6 if lines else 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for i, (key, name, colour) in enumerate((("rank1", "Rank-1", "#3b6fb6"), ("mAP", "mAP", "#e08a2e"))):
        values, deviations = ([100 * row[of] for row in rows] for of in (key, f"{key}_std"))
        spread = deviations if any(deviations) else None  # one seed has none
        if lines:
            axes.errorbar(places, values, spread, label=name, color=colour, fmt="o", capsize=3)
            axes.plot(places[:joined], values[:joined], color=colour)
        else:
            at = np.arange(len(rows)) + (i - 0.5) * 0.38
            bars = axes.barh(at, values, 0.36, xerr=spread, label=name, color=colour, capsize=2)
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    if lines:
        ticks = [row["recipe"] if row["x"] is None else f"{row['x']:g}" for row in rows]
        axes.set(xlabel=table["axis"], ylabel="%")
        axes.set_xticks(places, ticks)
        for label in axes.get_xticklabels()[joined:]:  # names
            label.set(rotation=25, ha="right")
    else:
        axes.set(xlabel="%", yticks=range(len(rows)), yticklabels=[row["recipe"] for row in rows])
        axes.invert_yaxis()
        axes.margins(x=0.08)
    figure.suptitle(f"{table['title']} ({table['data']})", fontsize=11)  # over all: names of rows may be long
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=2, frameon=False)
    with rc_context({"svg.hashsalt": table["suite"]}), atomic_write(path) as file:  # the same bytes again
        figure.savefig(file, format="svg", metadata={"Date": None})


def _figure(**kwargs: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'reid3d[study]'") from error
    return Figure(**kwargs)


def macs(model: nn.Module, *inputs: Tensor) -> int:
    """Multiplications that layers and attention do in `model(*inputs)`: half of what torch's FlopCounterMode counts,
    and those within `ops.gated_pool`. Searches, maxima and norms count nothing.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.reid3d.gated_pool: _gated_pool_flops})
    with torch.no_grad(), counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2


def _gated_pool_flops(
    points: Sequence[int], centers: Sequence[int], idx: Sequence[int], reduce: Any, *rest: Any, **more: Any
) -> int:
    """Of its arguments' shapes: the gate's two products with r hidden channels and the linear layer, for each pair."""
    weight = rest[3]
    return 2 * math.prod(idx) * weight[1] * (weight[0] + (2 * reduce[0] if reduce is not None else 0))


@dataclass(frozen=True)
class Turned(EvalTransform):
    """EvalTransform of a cloud that is turned by `degrees` about the vertical through the middle of the body."""

    degrees: float = 0.0

    def __call__(self, cloud: PointCloud, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        body = cloud.xyz[cloud.vertex >= 0]
        middle = (body if len(body) else cloud.xyz).mean(0, keepdims=True) * np.array([1, 0, 1], np.float32)
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]], np.float32)
        return super().__call__(replace(cloud, xyz=(cloud.xyz - middle) @ turn + middle), rng)


class _World:
    """One of the data sets, as images and as clouds of whatever bodies. short: of SHORT, if it is a published one or
    a part of it. whole: whether it is all of it.
    """

    def __init__(self, root: str | Path, out: Path, number: int) -> None:
        self.root, self.name = Path(root), Path(root).absolute().name
        self._folder = out / ("clouds" if number == 0 else f"clouds{number + 1}")
        images = open_dataset(root)
        if not isinstance(images, ImageDataset):
            raise ValueError(f"data must be a folder of images, which methods of images need too, got clouds: {root}")
        for split in (images.train, images.query, images.gallery):
            if not len(split):
                raise ValueError(f"data must have the splits train, query and gallery, got no {split.name} in {root}")
        listing = list_images(root)
        self.short = SHORT.get(listing.layout)
        self.whole = self.short is not None and layouts.count(listing.images) == layouts.PUBLISHED[listing.layout][1]
        self._images = images
        self._clouds: dict[Bodies, CloudDataset] = {}
        self._fingerprints: dict[tuple[Any, ...], str] = {}

    def path(self, inputs: str, bodies: Bodies) -> Path:
        """What `open_dataset` makes the same of."""
        if inputs == "image":
            return self.root
        return self._folder if bodies == "fitted" else self._folder.with_name(f"{self._folder.name}-{bodies}")

    def dataset(self, inputs: str, bodies: Bodies) -> Any:
        if inputs == "image":
            return self._images
        if bodies not in self._clouds:
            folder = self.path(inputs, bodies)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with hold_folder(folder.parent, "another study", name=f".{folder.name}", wait=True):
                self._convert(folder, bodies)
            self._clouds[bodies] = open_clouds(folder)
        return self._clouds[bodies]

    def fingerprint(self, inputs: str, bodies: Bodies, split: str) -> str:
        key = inputs, inputs == "cloud" and bodies, split
        if key not in self._fingerprints:
            self._fingerprints[key] = getattr(self.dataset(inputs, bodies), split).fingerprint()[:16]
        return self._fingerprints[key]

    def _convert(self, folder: Path, bodies: Bodies) -> None:
        """What is there is left, and refused where it is of other images."""
        from .preprocess.batch import convert_folder
        from .preprocess.convert import Recipe
        from .preprocess.synth import TrueBodies, keep_person

        if bodies == "person":
            keep_person(self.root, self.dataset("cloud", "fitted").root, folder)
        else:
            fitter = {"fitted": "default", "mean": "mean"}.get(bodies) or TrueBodies(self.root)
            convert_folder(self.root, folder, Recipe(fitter=fitter))


class _Kept:
    """The model of the last run and its features, which may be tested in several ways."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        self._turn: float | None = None

    def __call__(
        self, run: Path, dataset: Any, held: dict[str, str], test: Trial, device: str
    ) -> tuple[Any, Features, Features]:
        """The model, the queries and the gallery. held: fingerprints; two tables of images may have the same root."""
        of, where = (run, held["query"], held["gallery"], test.points), resolve_device(device)
        if self._of != of:
            self._of, self._turn = (), None
            self._model: Any = create_model(weights=run / "model.safetensors")
            self._gallery = extract(self._model, dataset.gallery, points=test.points, device=where)
            self._of = of
        if self._turn != test.turn:
            if test.turn:
                turned = Turned(test.points or self._model.points, self._model.background, test.turn)
                query = extract(self._model, dataset.query.with_transform(turned), device=where)
                self._query = replace(query, made_by=self._gallery.made_by)  # otherwise made, and on purpose
            else:
                self._query = extract(self._model, dataset.query, points=test.points, device=where)
            self._turn = test.turn
        return self._model, self._query, self._gallery


def _config(
    row: Row,
    seed: int,
    epochs: int | None,
    device: str,
    out: Path,
    data: str | None = None,
    backbones: Mapping[Backbone, str | Path] = MappingProxyType({}),
) -> TrainConfig:
    """Of a row; the data, of that short name, come later."""
    words = ["--train.seed", str(seed), "--train.device", device, "--data", "", "--out", "", *row.words]
    if epochs is not None:
        words += ["--train.epochs", str(epochs)]
    config = read_config(_recipe(row.recipe, data), words)
    known = config.model.kwargs if row.model is None else {}
    begin = backbones.get(row.backbone) if row.backbone else None
    backbone = config.model.backbone if begin is None else str(begin)
    model = ModelConfig(row.model or config.model.name, {**known, **row.kwargs}, backbone)
    config = replace(config, model=model)
    return replace(config, out=str(out / "runs" / f"{model.name}-{_digest(config, row)}-{seed}"))


def _recipe(name: str | None, data: str | None) -> str | None:
    if name is None or not name.endswith("_{}"):
        return name
    all_ = name.removesuffix("_{}")
    return next(one for one in (f"{all_}_{data}", all_, f"{all_}_market") if one in recipes())


def _digest(config: TrainConfig, row: Row) -> str:
    """Of all that has a part in the weights but the seed."""
    about = replace(config, data="", out="", train=replace(config.train, seed=0, device="auto"))
    return hashlib.sha256(f"{dump_config(about)} {row.bodies} {row.trained_on}".encode()).hexdigest()[:8]


def _bare(config: TrainConfig) -> Any:
    """The model without classifiers, in eval mode, fresh, with the sizes of a run."""
    model: Any = create_model(config.model.name, **config.model.kwargs).eval()
    if model.inputs == "image":
        model.size = (config.image.height or model.size[0], config.image.width or model.size[1])
    return model


def _result(
    config: TrainConfig, dataset: Any, held: dict[str, str], test: Trial, clock: Clock, kept: _Kept
) -> dict[str, Any]:
    """Train, or go on, and test; or what was written when that was done. held: fingerprints of the splits."""
    run = Path(config.out)
    path = run / _result_name(test, clock)
    if path.exists() and not differences(read_config(str(run / "config.yaml")), config):
        found = dict(json.loads(path.read_text()))
        if found.get("held") == held:
            return found
    run.mkdir(parents=True, exist_ok=True)
    scores: np.ndarray | None
    with hold_folder(run, "another study", name=".study"):
        train(config)
        model, query, gallery = kept(run, dataset, held, test, config.train.device)
        if test.rerank or test.lift:
            gallery = gallery.subset(np.flatnonzero(gallery.pids != -1))  # junk is nobody's neighbour
            scores = _lifted(model, query, gallery, test, clock, dataset)
        else:
            scores = pair_scores(model, query, gallery)
        result = evaluate(query, gallery, scores=scores)
        epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found = {
            "seed": config.train.seed,
            "run": run.name,
            "epochs": config.train.epochs,
            "rank1": round(float(result.cmc[0]), 4),
            "mAP": round(result.mAP, 4),
            "mINP": round(result.mINP, 4),
            "chance_mAP": round(result.chance.mAP, 4),
            "num_query": result.num_query,
            "num_gallery": result.num_gallery,
            "protocol": f"{result.protocol}, AP {result.ap}",
            "minutes": round(sum(epoch["seconds"] for epoch in epochs) / 60, 1),
            "held": held,
        }
        with atomic_write(path) as file:
            file.write(json.dumps(found, indent=2).encode() + b"\n")
    return found


def _result_name(test: Trial, clock: Clock) -> str:
    said = {key: f"{value:g}" for key, value in test._asdict().items() if value != Trial._field_defaults[key]}
    if test.lift:
        said["clock"] = clock
    return "-".join(["result", *(f"{key}_{value}" for key, value in sorted(said.items()))]) + ".json"


def _lifted(model: Any, q: Features, g: Features, test: Trial, clock: Clock, dataset: Any) -> np.ndarray:
    """Scores after re-ranking, times, or both."""
    matcher = hasattr(model, "distances")
    scores: np.ndarray | None
    if test.rerank:
        pairs = (q, q), (q, g), (g, g)
        distances: Any = tuple(model.distances(*pair) for pair in pairs) if matcher else None
        scores = rerank(q, g, distances=distances)
    else:
        scores = 1 - model.distances(q, g) if matcher else None
    if test.lift:
        scores = tlift(q, g, scores, seconds=_seconds_of(dataset, clock, q, g))
    assert scores is not None
    return scores


def _seconds_of(dataset: Any, clock: Clock, *parts: Any) -> list[np.ndarray]:
    """Of queries and gallery, those of the data set if no others are given."""
    timed = parts or (dataset.query, dataset.gallery)
    return clock_seconds(clock, *timed, *([dataset.train] if clock.startswith("market") else []))[:2]


def _row(
    row: Row,
    inputs: str,
    runs: list[dict[str, Any]],
    config: TrainConfig,
    worlds: Sequence[_World],
    study: Study,
) -> dict[str, Any]:
    trained, tested = worlds[row.trained_on], worlds[row.test.on]
    published = row.paper.get(f"{tested.short}" if trained is tested else f"{trained.short} to {tested.short}")
    if not (trained.whole and tested.whole) or row.backbone and config.model.backbone is None:
        published = None
    size = f"{config.cloud.points} points"
    if inputs == "image":
        size = "{} x {} pixels".format(*_bare(config).size)
    made: dict[str, Any] = {"recipe": row.name, "model": config.model.name, "inputs": inputs, "size": size}
    made |= {"tested": tested.name, "x": row.x, "paper": list(published) if published else None}
    for key in ("rank1", "mAP", "mINP"):
        values = [run[key] for run in runs]
        made[key] = round(statistics.mean(values), 4)
        made[f"{key}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
    made["chance_mAP"] = runs[0]["chance_mAP"]
    return {**made, **(_sizes(config) if study.sized else {}), "runs": runs}


def _sizes(config: TrainConfig) -> dict[str, Any]:
    model, points = _bare(config), config.cloud.points
    batch: tuple[Tensor, ...] = torch.rand(TIMED, points, 3), torch.rand(TIMED, points, 3) - 0.5
    if model.inputs == "image":
        batch = (torch.rand(TIMED, 3, *model.size),)
    one = tuple(part[:1] for part in batch)
    found: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    found["macs"] = macs(model, *one)
    with torch.inference_mode():
        found["feature_size"] = model(*one).shape[1]
        found["ms"] = round(statistics.median(_seconds(model, batch) for _ in range(5)) / TIMED * 1000, 2)
    return found


def _csv(table: dict[str, Any]) -> str:
    """A line for each run."""
    lines = io.StringIO(newline="")
    keys = [key for key in table["rows"][0]["runs"][0] if key not in ("protocol", "held")]
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["recipe", "model", "inputs", "x", *keys])
    for row in table["rows"]:
        for run in row["runs"]:
            writer.writerow([row["recipe"], row["model"], row["inputs"], row["x"], *(run[key] for key in keys)])
    return lines.getvalue()


def _seconds(model: nn.Module, batch: tuple[Tensor, ...]) -> float:
    start = time.perf_counter()
    model(*batch)
    return time.perf_counter() - start


def _spread(row: dict[str, Any], key: str) -> str:
    deviation = f" ± {100 * row[f'{key}_std']:.1f}" if len(row["runs"]) > 1 else ""
    return f"{100 * row[key]:.1f}{deviation}"
