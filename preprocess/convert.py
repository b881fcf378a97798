"""Crops to clouds: one image, or a folder into shards, in runs that can be stopped at any moment and begun again.

An output folder holds SPLIT-00000.safetensors with its manifest SPLIT-00000.jsonl and so on (`reid3d.io`), dataset.json
with the configuration and the number of shards, and failures.jsonl: {name, reason} of the files that gave no cloud.
A shard is shard_size crops of one split, by position in the sorted list, and carries a hash of their names and sizes in
bytes, so a run knows what is left to do.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from reid3d.cloud import PointCloud
from reid3d.data.images import MAX_PIXELS, MIN_SIDE, ImageRecord, list_images, read_image
from reid3d.io import (
    DATASET_FILE,
    Record,
    Shard,
    atomic_write,
    hold_folder,
    library_version,
    manifest_path,
    write_shard,
)
from reid3d.progress import Progress

from .camera import project
from .fit import Fitter
from .mapping import map_images

FORMAT = "reid3d-clouds-1"
FAILURES_FILE = "failures.jsonl"
LEFT_BEHIND = re.compile(  # temporary files of a run that was killed
    r"\.((train|query|gallery|all)-\d{5,}\.(safetensors|jsonl)|dataset\.json|failures\.jsonl)\.\d+\.tmp"
)
DECODE_THREADS = 4
FARTHEST = 100.0  # metres: a fit with anything beyond, or a crop that spans more, is none
NO_FIT = "no body could be fitted"

Shards = dict[Path, list[ImageRecord]]
Failures = dict[str, str]  # name: reason


@dataclass(frozen=True)
class Report:
    """What a conversion did: clouds written now, clouds found done, files that gave none, speed of this run."""

    written: int
    skipped: int
    failed: int
    clouds_per_second: float

    def __str__(self) -> str:
        speed = f" ({self.clouds_per_second:.1f}/s)" if self.written else ""
        where = f": see {FAILURES_FILE}" if self.failed else ""
        return f"{self.written} clouds written{speed}, {self.skipped} were there, {self.failed} files failed{where}"


@cache
def default_fitter() -> Fitter:
    """The embedded fitter, loaded once, on the GPU when there is one."""
    return Fitter().to("cuda" if torch.cuda.is_available() else "cpu")


def weights_hash(fitter: Fitter) -> str:
    """A short name for everything the fits depend on: the parameters and the body's buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*fitter.named_parameters(), *fitter.named_buffers()], key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Fitted(NamedTuple):
    """A cloud with what its `Record` says of the fit."""

    cloud: PointCloud
    cam: tuple[float, float, float]
    quality: dict[str, float]


def fit_crops(crops: Sequence[np.ndarray], fitter: Fitter) -> list[Fitted | None]:
    """Fit a body to each crop (H, W, 3) of one size and map its pixels; None where no body came out.

    quality: "visible", the share of the body's vertices that took a pixel's colour; "inside", the share that projects
    into the crop, hidden or not.
    """
    faces = fitter.body.faces
    height, width = crops[0].shape[:2]
    images = torch.from_numpy(np.stack(crops)).to(faces.device)
    with torch.inference_mode():
        fit = fitter(images)
        points = project(fit.verts, fit.cam, height, width)
        near = [(values.abs() < FARTHEST).flatten(1).all(1) for values in (fit.verts, fit.cam)]  # false for NaN
        good = near[0] & near[1] & (fit.cam[:, 0] > 2 / FARTHEST)
        pixels = points[..., :2]
        inside = ((pixels >= 0) & (pixels < pixels.new_tensor([width, height]))).all(2).float().mean(1).tolist()
        clouds = iter(map_images(images[good], fit.verts[good], fit.cam[good], faces) if good.any() else [])
    fitted: list[Fitted | None] = []
    for is_good, cam, share in zip(good.tolist(), fit.cam.tolist(), inside, strict=True):
        if is_good:
            cloud = next(clouds)
            seen = np.count_nonzero(cloud.vertex >= 0) / fit.verts.shape[1]
            fitted.append(Fitted(cloud, tuple(cam), {"visible": round(seen, 4), "inside": round(share, 4)}))
        else:
            fitted.append(None)
    return fitted


def convert(
    image: str | Path | Image.Image, *, size: tuple[int, int] = (128, 64), fitter: Fitter | None = None
) -> PointCloud:
    """The point cloud of one pedestrian crop: H*W points, those of the body first.

    The crop is resized to `size` = (H, W). fitter: None for the embedded one.

    Raises: TypeError, ValueError for a bad `size`; ValueError naming an image that cannot be used; OSError when the
        file cannot be read.
    """
    size = _checked_size(size)
    try:
        pixels = read_image(image, size)
    except ValueError as error:
        raise ValueError(f"image: {image}: {error}") from error
    fitted = fit_crops([pixels], fitter or default_fitter())[0]
    if fitted is None:
        raise ValueError(f"image: {image}: {NO_FIT}")
    return fitted.cloud


def convert_folder(
    src: str | Path,
    out: str | Path,
    *,
    size: tuple[int, int] = (128, 64),
    batch: int = 64,
    shard_size: int = 1024,
    fitter: Fitter | None = None,
    progress: bool = True,
) -> Report:
    """Convert a folder of crops (see `reid3d.data.list_images`), or one image, into shards in the folder `out`.

    The same call again goes on where a stopped one ended, and the files come out the same. A file that cannot be used
    is a line in failures.jsonl. A file that has another size in bytes than when it was converted or failed is converted
    again, with its shard; a change that keeps the size goes unnoticed. size, fitter: as in `convert`.

    Raises: FileNotFoundError when `src` is missing; ValueError when nothing in it could be converted, `out` lies in
        `src`, holds shards or reports that no conversion wrote (which stay as they are), or was begun with other
        images, another configuration or version; OSError when `out` cannot be written (what was finished stays) or
        another conversion is writing there.
    """
    src, out, size = Path(src), Path(out), _checked_size(size)
    for name, value in (("batch", batch), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if src.is_dir() and out.resolve().is_relative_to(src.resolve()):
        raise ValueError(f"out must not lie in src ({src}), got {out}")
    images, rejected = list_images(src)
    if not images:
        found = "; ".join(f"{name}: {reason}" for name, reason in rejected[:3]) or "it is empty"
        raise ValueError(f"src holds no crops to convert: {src} ({found})")
    fitter = fitter or default_fitter()
    shards = {
        out / f"{split}-{k:05d}.safetensors": chunk
        for split, group in groupby(images, key=lambda image: image.split)
        for k, chunk in enumerate(_chunks(list(group), shard_size))
    }
    config = {
        "format": FORMAT,
        "source": src.resolve().name,
        "images": len(images),
        "names": _digest([image.name for image in images]),
        "size": list(size),
        "shard_size": shard_size,
        "fitter": weights_hash(fitter),
        "version": library_version("reid3d"),
        "shards": dict(Counter(path.name.split("-")[0] for path in shards)),
    }
    sources = {path: _digest([(i.name, _bytes(i.path)) for i in chunk]) for path, chunk in shards.items()}
    _read_config(out)  # nothing is written into a folder of something else
    out.mkdir(parents=True, exist_ok=True)
    with hold_folder(out, "out: another conversion"):
        _claim(out, config)
        for path in out.iterdir():
            if LEFT_BEHIND.fullmatch(path.name):
                path.unlink()
        failures = _read_failures(out / FAILURES_FILE)
        todo, skipped = _divide(shards, sources, failures)
        listed = {image.name for image in images}
        failures = {name: reason for name, reason in failures.items() if name in listed}
        failures.update(rejected)
        start, written = time.perf_counter(), 0
        with closing(_convert_shards(todo, size, batch, fitter, progress)) as finished:
            for path, clouds, records, failed in finished:
                failures.update(failed)
                _write_failures(out / FAILURES_FILE, failures)  # before the shard, which marks them as dealt with
                write_shard(path, clouds, records, config={**config, "sources": sources[path]})
                written += len(clouds)
        _write_failures(out / FAILURES_FILE, failures)
        seconds = time.perf_counter() - start
    if not written + skipped:
        raise ValueError(f"src: not one file in {src} could be converted: see {out / FAILURES_FILE}")
    return Report(written, skipped, len(failures), written / seconds)


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    if not (isinstance(height, int) and isinstance(width, int)):
        raise TypeError(f"size must be two integers (H, W), got {size}")
    if min(size) < MIN_SIDE:
        raise ValueError(f"size must be (H, W) of at least {MIN_SIDE} pixels each, got {size}")
    if height * width > MAX_PIXELS:
        raise ValueError(f"size must be (H, W) of at most {MAX_PIXELS // 1_000_000} megapixels, got {size}")
    return height, width


def _chunks(items: list[ImageRecord], length: int) -> list[list[ImageRecord]]:
    return [items[i : i + length] for i in range(0, len(items), length)]


def _digest(values: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


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
    if not any(out.glob("[!.]*.safetensors")):
        with atomic_write(out / DATASET_FILE) as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")
        return
    if different := [key for key in {**config, **found} if config.get(key) != found.get(key)]:
        changes = ", ".join(f"{key} was {found.get(key)}, is {config.get(key)}" for key in different)
        raise ValueError(f"out was begun otherwise; choose another folder than {out} ({changes})")


def _divide(shards: Shards, sources: Mapping[Path, str], failures: Failures) -> tuple[Shards, int]:
    """The shards still to be made, whose failures are forgotten, and the number of clouds in the others."""
    todo, skipped = {}, 0
    for path, images in shards.items():
        if manifest_path(path).exists() and path.exists():
            shard = Shard(path)
            if json.loads(shard.metadata.get("config", "{}")).get("sources") == sources[path]:
                skipped += len(shard)
                continue
        manifest_path(path).unlink(missing_ok=True)
        todo[path] = images
        for image in images:
            failures.pop(image.name, None)
    return todo, skipped


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


def _read_failures(path: Path) -> Failures:
    if not path.exists():
        return {}
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {line["name"]: line["reason"] for line in lines}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a failure report: {error}") from error


def _write_failures(path: Path, failures: Failures) -> None:
    with atomic_write(path) as file:
        lines = [json.dumps({"name": name, "reason": failures[name]}) for name in sorted(failures)]
        file.writelines(f"{line}\n".encode() for line in lines)


def _convert_shards(
    shards: Shards, size: tuple[int, int], batch: int, fitter: Fitter, progress: bool
) -> Generator[tuple[Path, list[PointCloud], list[Record], Failures]]:
    """For each shard its path, clouds, records and failures; crops are decoded one batch ahead of the fitter."""
    pool = ThreadPoolExecutor(DECODE_THREADS)
    try:
        with Progress(sum(map(len, shards.values())), "convert", "crop", progress) as bar:
            decoded = _read_ahead(pool, [chunk for images in shards.values() for chunk in _chunks(images, batch)], size)
            for path, images in shards.items():
                clouds, records, failed = [], [], {}
                for chunk in _chunks(images, batch):
                    crops = next(decoded)
                    fitted = iter(
                        fit_crops(good, fitter) if (good := [c for c in crops if not isinstance(c, str)]) else []
                    )
                    for image, crop in zip(chunk, crops, strict=True):
                        result = crop if isinstance(crop, str) else next(fitted) or NO_FIT
                        if isinstance(result, str):
                            failed[image.name] = result
                        else:
                            clouds.append(result.cloud)
                            who = (image.name, image.split, image.pid, image.camid, image.time)
                            records.append(Record(*who, size, result.cam, result.quality))
                    bar.add(len(chunk))
                yield path, clouds, records, failed
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(
    pool: ThreadPoolExecutor, chunks: list[list[ImageRecord]], size: tuple[int, int]
) -> Iterator[list[np.ndarray | str]]:
    def read(image: ImageRecord) -> np.ndarray | str:
        try:
            return read_image(image.path, size)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except ValueError as error:
            return str(error)

    waiting: deque[Iterator[np.ndarray | str]] = deque()
    for chunk in chunks:
        waiting.append(pool.map(read, chunk))
        if len(waiting) > 1:
            yield list(waiting.popleft())
    while waiting:
        yield list(waiting.popleft())
