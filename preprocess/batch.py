"""A folder of crops to shards of clouds, in runs that can be stopped at any moment and begun again.

An output folder holds SPLIT-00000.safetensors with its manifest SPLIT-00000.jsonl and so on (`reid3d.io`), dataset.json
with the configuration and the number of shards, failures.jsonl, {name, reason} of the files that gave no cloud, and,
once all shards are there, quality.json and worst.png (quality.py). A shard is shard_size crops of one split, by its
position in the sorted list, and carries a hash of their names, labels and sizes in bytes, so a run knows what is left.
Each is made from its crops alone (engines.py), and all other files are made from the shards: so any number of processes
and machines can share the work, in any order, and the bytes come out the same.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from reid3d.data.layouts import ImageRecord, list_images
from reid3d.io import DATASET_FILE, FAILURES_FILE, Shard, atomic_write, hold_folder, library_version, manifest_path
from reid3d.progress import Progress

from .convert import Converter, Recipe
from .engines import ENGINES, Task, make_shards
from .published import TreeReader, is_obj_tree, list_obj_tree
from .quality import QUALITY_FILE, WORST_FILE, Summary, write_quality

FORMAT = "reid3d-clouds-1"
SHARD_NAME = r"(?:train|query|gallery|all)-\d{5,}"
REPORTS = "|".join(map(re.escape, (DATASET_FILE, FAILURES_FILE, QUALITY_FILE, WORST_FILE)))
# The temporary files of a run that was killed.
LEFT_BEHIND = re.compile(rf"\.(?:(?P<shard>{SHARD_NAME})\.(?:safetensors|jsonl)|{REPORTS})\.\d+\.tmp")

Failures = dict[str, str]  # name: reason


@dataclass(frozen=True)
class Report:
    """What a conversion did: clouds written now, clouds found done, files that gave none, speed of this run.

    quality: of all clouds in the folder, None while shards are missing that another part makes. notes: what the source
    lacks, see `reid3d.data.Listing`.
    """

    written: int
    skipped: int
    failed: int
    clouds_per_second: float
    quality: Summary | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        speed = f" ({self.clouds_per_second:.1f}/s)" if self.written else ""
        where = f": see {FAILURES_FILE}" if self.failed else ""
        text = f"{self.written} clouds written{speed}, {self.skipped} were there, {self.failed} files failed{where}"
        quality = [str(self.quality)] if self.quality else []
        return "\n".join([*(f"note: {note}" for note in self.notes), text, *quality])


def convert_folder(
    src: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    batch: int = 64,
    shard_size: int = 1024,
    part: tuple[int, int] = (0, 1),
    workers: int = 1,
    engine: str = "local",
    distractors: bool = False,
    progress: bool = True,
) -> Report:
    """Convert a data set of crops in any layout of `reid3d.data.list_images` into shards in the folder `out`.

    A tree of clouds published with OG-Net (published.py) is imported; the recipe then does not matter.

    The same call again goes on where a stopped one ended, and the files come out the same. A file that cannot be used
    is a line in failures.jsonl. A file that has another size in bytes, or another person, camera or time, than when it
    was converted or failed is converted again, with its shard; a change that keeps the size goes unnoticed.

    Args:
        src, out: folders; `src` may also be a table or one image.
        recipe: how a crop becomes a cloud; None for `Recipe()`.
        batch: crops fitted at once.
        shard_size: crops in a shard, which is the least that is done again after a stop.
        part: (i, n) makes every n-th shard from the i-th on, i from 0: n such calls, on any machines that share `out`,
            at once or in turn, make the whole.
        workers: processes, each with one thread; 1 for this process.
        engine: "local", or "ray" for the same work in Ray Data's actors.
        distractors: take Market-1501's 500k into the gallery, see `reid3d.data.list_images`.
        progress: show a bar on a terminal, lines otherwise.

    Raises: FileNotFoundError when `src` is missing; ValueError for a bad argument, when nothing in `src` could be
        converted, `out` lies in `src`, holds shards or reports that no conversion wrote (which stay as they are), or
        was begun with other images, another configuration or version; OSError when `out` cannot be written (what was
        finished stays) or another conversion is writing there; RuntimeError when a worker was killed.
    """
    src, out = Path(src), Path(out)
    for name, value in (("batch", batch), ("shard_size", shard_size), ("workers", workers)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part must be (i, n) with 0 <= i < n, got {part}")
    if src.is_dir() and out.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"out must not lie in src ({src}), got {out}")
    published = is_obj_tree(src) and not distractors
    listing = None if published else list_images(src, distractors=distractors)
    images, rejected = listing[:2] if listing else list_obj_tree(src)
    root = listing.root if listing and src.is_dir() else src
    if not images:
        why = "; ".join(f"{name}: {reason}" for name, reason in rejected[:3]) or "it is empty"
        raise ValueError(f"src holds no crops to convert: {src} ({why})")
    chunks = {
        out / f"{split}-{k:05d}.safetensors": chunk
        for split, group in groupby(images, key=lambda image: image.split)
        for k, chunk in enumerate(_chunks(list(group), shard_size))
    }
    converter = TreeReader() if published else Converter(recipe or Recipe())
    config = {
        "format": FORMAT,
        "source": root.resolve().name,
        "images": len(images),
        "names": _digest([image.name for image in images]),
        "shard_size": shard_size,
        **converter.describe(),
        "version": library_version("reid3d"),
        "shards": dict(Counter(path.name.split("-")[0] for path in chunks)),
    }
    tasks = [
        Task(path, chunk, {**config, "sources": _digest([(_bytes(image.path), *_said(image)) for image in chunk])})
        for path, chunk in chunks.items()
    ]
    mine = tasks[part[0] :: part[1]]
    _read_config(out)  # nothing is written into a folder of something else
    out.mkdir(parents=True, exist_ok=True)
    with _hold(out, part):
        _claim(out, config)
        _clean(out, {task.path.stem for task in mine}, alone=part[1] == 1)
        todo = [task for task in mine if _finished(task) is None]
        for task in todo:
            manifest_path(task.path).unlink(missing_ok=True)
        start = time.perf_counter()
        with Progress(sum(len(task.images) for task in todo), "convert", "crop", progress) as bar:
            with closing(make_shards(todo, converter, batch, workers, engine)) as steps:
                for crops in steps:
                    bar.add(crops)
        seconds = time.perf_counter() - start
        with hold_folder(out, "another part", name=".lock-reports", wait=True):  # each part writes what it finds
            shards = {task.path: _finished(task) for task in tasks}
            found = [shard for shard in shards.values() if shard is not None]
            failures = dict(rejected) | {name: reason for shard in found for name, reason in shard.failures.items()}
            _write_failures(out / FAILURES_FILE, failures)
            whole = len(found) == len(tasks) and any(map(len, found))
            told = whole and not published
            quality = write_quality(out, found, {i.name: i.path for i in images}) if told else None
    clouds = {path: len(shard or ()) for path, shard in shards.items()}
    written = sum(clouds[task.path] for task in todo)
    skipped = sum(clouds[task.path] for task in mine) - written
    if len(found) == len(tasks) and not whole:
        raise ValueError(f"src: not one file in {src} could be converted: see {out / FAILURES_FILE}")
    notes = tuple(listing.notes) if listing else ()
    return Report(written, skipped, len(failures), written / seconds, quality, notes)


def verify(out: str | Path) -> list[str]:
    """What is wrong with a folder that `convert_folder` wrote, a line each: reads every byte of every shard.

    Raises: FileNotFoundError when there is no such folder; ValueError when no conversion made it.
    """
    out = Path(out)
    if not out.is_dir():
        raise FileNotFoundError(f"out: no such folder: {out}")
    config = _read_config(out)
    if not config:
        raise ValueError(f"out is no folder of clouds, it has no {DATASET_FILE}: {out}")
    problems = []
    expected = [f"{split}-{k:05d}" for split, count in config["shards"].items() for k in range(count)]
    for name in expected:
        path = out / f"{name}.safetensors"
        try:
            shard = Shard(path)
            shard.verify()
        except FileNotFoundError as error:
            problems.append(f"{error.filename}: missing, convert again to make it")
            continue
        except (ValueError, OSError) as error:
            problems.append(f"{error}; delete {manifest_path(path).name} and convert again to mend it")
            continue
        if different := [key for key, value in config.items() if shard.config.get(key) != value]:
            problems.append(f"{path}: was made by another configuration: {', '.join(different)} differ")
    others = sorted(path for path in out.glob("[!.]*.safetensors") if path.stem not in expected)
    return problems + [f"{path}: is no part of this conversion" for path in others]


def _chunks(items: list[ImageRecord], length: int) -> list[list[ImageRecord]]:
    return [items[i : i + length] for i in range(0, len(items), length)]


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _said(image: ImageRecord) -> tuple[str, int, int, int]:
    return image.name, image.pid, image.camid, image.time


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


@contextmanager
def _hold(out: Path, part: tuple[int, int]) -> Iterator[None]:
    """Hold `out` alone, or one part of it beside the other parts of the same division."""
    i, n = part
    with ExitStack() as held:
        held.enter_context(hold_folder(out, "out: another conversion", shared=n > 1))
        if n > 1:
            held.enter_context(hold_folder(out, "out: another conversion", name=f".lock-{i}-of-{n}"))
            for path in out.glob(".lock-*-of-*"):
                if not path.name.endswith(f"-of-{n}"):
                    with hold_folder(out, "out: a conversion in other parts", name=path.name):
                        pass
        yield


def _read_config(out: Path) -> dict[str, Any]:
    """What dataset.json says of the conversion that made `out`; {} before there was one.

    Raises: ValueError when `out` holds a dataset.json, shards or reports that no conversion wrote.
    """
    foreign = [path.name for pattern in ("*.safetensors", "*.jsonl") for path in sorted(out.glob(f"[!.]{pattern}"))]
    try:
        found = json.loads((out / DATASET_FILE).read_bytes())
        if isinstance(found, dict) and found.get("format") == FORMAT:
            return found
        foreign = [DATASET_FILE]
    except (FileNotFoundError, NotADirectoryError):
        pass
    except ValueError:
        foreign = [DATASET_FILE]
    if foreign:
        raise ValueError(f"out holds files that no conversion wrote: {out / foreign[0]}")
    return {}


def _claim(out: Path, config: dict[str, Any]) -> None:
    """Write `config` into an `out` without shards; compare it with the one that those there were made by."""
    found = _read_config(out)
    if found == config:
        return
    if not any(out.glob("[!.]*.safetensors")):
        with atomic_write(out / DATASET_FILE) as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")
        return
    changes = ", ".join(
        f"{key} was {found.get(key)}, is {config.get(key)}"
        for key in {**config, **found}
        if config.get(key) != found.get(key)
    )
    raise ValueError(f"out was begun otherwise; choose another folder than {out} ({changes})")


def _clean(out: Path, mine: set[str], alone: bool) -> None:
    """Remove temporary files that a killed run left, as far as no run beside this one can be writing them."""
    for path in out.iterdir():
        left = LEFT_BEHIND.fullmatch(path.name)
        if left and (left["shard"] in mine or alone):
            path.unlink()


def _finished(task: Task) -> Shard | None:
    """The shard of a task, if it is there, whole, and of the same crops."""
    try:
        shard = Shard(task.path)
    except (FileNotFoundError, ValueError):
        return None
    return shard if shard.config == task.config else None


def _write_failures(path: Path, failures: Failures) -> None:
    lines = [json.dumps({"name": name, "reason": failures[name]}) for name in sorted(failures)]
    with atomic_write(path) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
