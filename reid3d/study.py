"""Studies: many runs under the same conditions, and one table of what they came to."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import __version__
from .config import TrainConfig, dump_config, read_config, recipes
from .data import CloudDataset, ImageDataset, open_clouds, open_dataset, validate_protocol
from .io import DATASET_FILE, atomic_write
from .models import create_model, list_models, resolve_device
from .retrieval import evaluate, extract, pair_scores
from .train import train

TIMED = 8  # items in a batch whose time is taken
COLUMNS = {  # of the table: a heading, and a value of a row
    "model": lambda row: row["recipe"],
    "input": lambda row: row["inputs"],
    "Rank-1, %": lambda row: _spread(row, "rank1"),
    "mAP, %": lambda row: _spread(row, "mAP"),
    "mINP, %": lambda row: _spread(row, "mINP"),
    "parameters, M": lambda row: f"{row['parameters'] / 1e6:.2f}",
    "GMACs": lambda row: f"{row['macs'] / 1e9:.3f}",
    "feature": lambda row: str(row["feature_size"]),
    "ms an item": lambda row: f"{row['ms']:.1f}",
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
    queries by the same evaluator.

    The folder `out` keeps the clouds (clouds/), every run (runs/RECIPE-SEED/, with result.json) and the table
    (compare.json, compare.md); the same call goes on where it stopped, and leaves what is done as it is.

    Args:
        models: recipes, packaged or YAML files, each with its model and how it is trained; or names of models, which
            are trained by the defaults.
        data: the images, a data set in any usual layout with train, query and gallery; converted for networks of
            clouds by the embedded fitter.
        seeds: runs of each, from 0.
        epochs: of every run; None leaves them to the recipes, which then may differ.
        say: told of each result as it comes.

    Returns: {"suite", "data", "protocol", "threads", "version", "rows": [{"recipe", "model", "inputs", "rank1", "mAP",
        "mINP" and their "_std", "chance_mAP", "parameters" (without classifiers), "macs" (products of layers and
        attention for one item; searches for neighbours and pair matchers not counted), "feature_size", "ms" (of the
        network on a CPU, once for an item in a batch of 8), "runs": [...]}]},
        shares in [0, 1]; what compare.json holds.

    Raises: ValueError: no models, one that is unknown or named twice, data without one of the splits, or a run folder
        of another config; as `train` and `convert_folder`.
    """
    if not models or len(set(models)) < len(models):
        raise ValueError(f"models must be different recipes, at least one, got {', '.join(models) or 'none'}")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    out = Path(out)
    configs = {name: [_config(name, seed, epochs, device, out) for seed in range(seeds)] for name in models}
    images = open_dataset(data)
    if not isinstance(images, ImageDataset):
        raise ValueError(f"data must be a folder of images, which methods of images need too, got clouds: {data}")
    for split in (images.train, images.query, images.gallery):
        if not len(split):
            raise ValueError(f"data must have the splits train, query and gallery, got no {split.name} in {data}")
    datasets: dict[str, CloudDataset | ImageDataset] = {"image": images}
    inputs = {name: str(_bare(runs[0]).inputs) for name, runs in configs.items()}
    if "cloud" in inputs.values():
        datasets["cloud"] = _clouds(data, out / "clouds")
    for dataset in datasets.values():  # before hours of training
        validate_protocol(dataset.query, dataset.gallery)
    rows = []
    for name, runs in configs.items():
        dataset = datasets[inputs[name]]
        found = [_result(replace(config, data=str(dataset.root)), dataset) for config in runs]
        for run in found:
            say(f"{name}, seed {run['seed']}: Rank-1 {run['rank1']:.1%}, mAP {run['mAP']:.1%}")
        rows.append(_row(name, inputs[name], found, runs[0]))
    table = {
        "suite": "compare",
        "data": Path(data).resolve().name,
        "protocol": rows[0]["runs"][0]["protocol"],
        "threads": torch.get_num_threads(),
        "version": __version__,
        "rows": rows,
    }
    for path, text in {"compare.json": json.dumps(table, indent=2), "compare.md": markdown(table)}.items():
        with atomic_write(out / path) as file:
            file.write(text.encode() + b"\n")
    return table


def markdown(table: dict[str, Any]) -> str:
    """The table of `compare` in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cell(row) for cell in COLUMNS.values())} |" for row in table["rows"]]
    seeds = max(len(row["runs"]) for row in table["rows"])
    how = f"mean and deviation of {seeds} seeds" if seeds > 1 else "one seed"
    chance = statistics.mean(row["chance_mAP"] for row in table["rows"])
    notes = [f"{table['data']}: {table['protocol']}; {how}; a random order has an mAP of {chance:.1%}."]
    sizes = {(row["inputs"], run["num_query"], run["num_gallery"]) for row in table["rows"] for run in row["runs"]}
    if len({size[1:] for size in sizes}) > 1:
        said = [f"{kind}s: {query} queries, gallery of {gallery}" for kind, query, gallery in sorted(sizes)]
        notes.append(f"Some crops gave no cloud: {'; '.join(said)}.")
    threads = f"{table['threads']} thread{'s' if table['threads'] > 1 else ''}"
    notes.append(f"Parameters without classifiers; ms of the network alone on a CPU, {threads}, batches of {TIMED}.")
    return "\n".join([*lines, "", *notes])


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


def _config(name: str, seed: int, epochs: int | None, device: str, out: Path) -> TrainConfig:
    """Of a recipe, or of a model by its defaults; the data come later."""
    recipe: str | None = name
    words = ["--train.seed", str(seed), "--train.device", device, "--data", "", "--out", ""]
    if not Path(name).is_file() and name not in recipes():
        if name not in list_models():
            known = f"the recipes {', '.join(recipes())}, or the models {', '.join(list_models())}"
            raise ValueError(f"models must be YAML files, {known}, got {name!r}")
        recipe, words = None, [*words, "--model.name", name]
    if epochs is not None:
        words += ["--train.epochs", str(epochs)]
    return replace(read_config(recipe, words), out=str(out / "runs" / f"{Path(name).stem}-{seed}"))


def _bare(config: TrainConfig) -> Any:
    """The model without classifiers, in eval mode, fresh, with the sizes of a run."""
    model: Any = create_model(config.model.name, **config.model.kwargs).eval()
    if model.inputs == "image":
        model.size = (config.image.height or model.size[0], config.image.width or model.size[1])
    return model


def _clouds(data: str | Path, folder: Path) -> CloudDataset:
    from .preprocess.batch import convert_folder

    if not (folder / DATASET_FILE).exists():
        convert_folder(data, folder)
    return open_clouds(folder)


def _result(config: TrainConfig, dataset: CloudDataset | ImageDataset) -> dict[str, Any]:
    """Train, or go on, and rank; or what was written when that was done."""
    run = Path(config.out)
    path = run / "result.json"
    if path.exists() and (run / "config.yaml").read_text() == dump_config(config):
        return dict(json.loads(path.read_text()))
    train(config)
    model = create_model(weights=run / "model.safetensors")
    device = resolve_device(config.train.device)
    query, gallery = (extract(model, split, device=device) for split in (dataset.query, dataset.gallery))
    result = evaluate(query, gallery, scores=pair_scores(model, query, gallery))
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        "seed": config.train.seed,
        "epochs": config.train.epochs,
        "rank1": round(float(result.cmc[0]), 4),
        "mAP": round(result.mAP, 4),
        "mINP": round(result.mINP, 4),
        "chance_mAP": round(result.chance.mAP, 4),
        "num_query": result.num_query,
        "num_gallery": result.num_gallery,
        "protocol": f"{result.protocol}, AP {result.ap}",
        "minutes": round(sum(epoch["seconds"] for epoch in epochs) / 60, 1),
    }
    with atomic_write(path) as file:
        file.write(json.dumps(found, indent=2).encode() + b"\n")
    return found


def _row(name: str, inputs: str, runs: list[dict[str, Any]], config: TrainConfig) -> dict[str, Any]:
    model, points = _bare(config), config.cloud.points
    batch: tuple[Tensor, ...] = torch.rand(TIMED, points, 3), torch.rand(TIMED, points, 3) - 0.5
    if inputs == "image":
        batch = (torch.rand(TIMED, 3, *model.size),)
    one = tuple(part[:1] for part in batch)
    row: dict[str, Any] = {"recipe": Path(name).stem, "model": config.model.name, "inputs": inputs}
    for key in ("rank1", "mAP", "mINP"):
        values = [run[key] for run in runs]
        row[key] = round(statistics.mean(values), 4)
        row[f"{key}_std"] = round(statistics.stdev(values), 4) if len(values) > 1 else 0.0
    row["chance_mAP"] = runs[0]["chance_mAP"]
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["macs"] = macs(model, *one)
    with torch.inference_mode():
        row["feature_size"] = model(*one).shape[1]
        row["ms"] = round(statistics.median(_seconds(model, batch) for _ in range(5)) / TIMED * 1000, 2)
    return {**row, "runs": runs}


def _seconds(model: nn.Module, batch: tuple[Tensor, ...]) -> float:
    start = time.perf_counter()
    model(*batch)
    return time.perf_counter() - start


def _spread(row: dict[str, Any], key: str) -> str:
    deviation = f" ± {100 * row[f'{key}_std']:.1f}" if len(row["runs"]) > 1 else ""
    return f"{100 * row[key]:.1f}{deviation}"
