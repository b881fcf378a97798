"""Where shards are made: in this process, in several, or in Ray's actors. All give the same bytes.

A shard depends on its crops and the recipe alone, and every process computes with one thread, so that no sum depends on
how many there are.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
import torch

from reid3d.data.layouts import ImageRecord
from reid3d.io import Record, write_shard

from .convert import Converter, Recipe
from .published import TreeReader

ENGINES = ("local", "ray")
DECODE_THREADS = 2  # a process

T = TypeVar("T")


Maker = Converter | TreeReader


@dataclass(frozen=True)
class Task:
    """A shard to be made: its path, its crops, and what its metadata is to say."""

    path: Path
    images: list[ImageRecord]
    config: dict[str, Any]


def make_shards(
    tasks: list[Task], converter: Maker, batch: int, workers: int, engine: str
) -> Generator[int, None, None]:
    """Make the shards of tasks; yields how many more crops are done, now and then."""
    if engine == "ray":
        yield from _on_ray(tasks, _portable(converter), batch, workers)
        return
    forked = not torch.cuda.is_initialized()
    # The largest first, so that the last ones end together.
    tasks = sorted(tasks, key=lambda task: -len(task.images))
    yield from share_out(tasks, partial(_shard_maker, converter if forked else _portable(converter), batch), workers)


def make_shard(task: Task, converter: Maker, batch: int) -> Iterator[int]:
    """Make one shard; yields how many more crops are done. Crops are decoded a batch ahead of the fitter."""
    clouds, records = [], []
    failures: dict[str, str] = {}
    poses: list[np.ndarray | None] = []
    betas: list[np.ndarray | None] = []
    pool = ThreadPoolExecutor(DECODE_THREADS)
    try:
        chunks = [task.images[i : i + batch] for i in range(0, len(task.images), batch)]
        for chunk, pictures in zip(chunks, _read_ahead(pool, chunks, converter), strict=True):
            good = []
            for image, picture in zip(chunk, pictures, strict=True):
                if isinstance(picture, str):
                    failures[image.name] = picture
                elif problem := converter.problem(picture, image.name):
                    failures[image.name] = problem
                else:
                    good.append((image, picture))
            made = converter([p for _, p in good], [image.name for image, _ in good]) if good else []
            for (image, _), result in zip(good, made, strict=True):
                cloud, size = result.cloud, result.size
                who = (image.name, image.split, image.pid, image.camid, image.time)
                points = None if len(cloud) == size[0] * size[1] else len(cloud)
                clouds.append(cloud)
                records.append(
                    Record(*who, size, result.cam, result.quality, result.aspect, fit=result.fit, points=points)
                )
                poses.append(result.pose)
                betas.append(result.betas)
            yield len(chunk)
    finally:
        pool.shutdown(cancel_futures=True)
    known = [(p, b) for p, b in zip(poses, betas, strict=True) if p is not None and b is not None]
    bodies = {"pose": np.stack([p for p, _ in known]), "betas": np.stack([b for _, b in known])} if known else None
    whole = len(known) == len(clouds)
    write_shard(task.path, clouds, records, config=task.config, bodies=bodies if whole else None, failures=failures)


def _read_ahead(pool: ThreadPoolExecutor, chunks: list[list[ImageRecord]], converter: Maker) -> Iterator[list[Any]]:
    """What the converter reads of the images of each chunk, or why it cannot, a chunk ahead of what is asked for."""

    def read(image: ImageRecord) -> Any:
        try:
            return converter.read(image.path)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except ValueError as error:
            return str(error)

    waiting: deque[Iterator[Any]] = deque()
    for chunk in chunks:
        waiting.append(pool.map(read, chunk))
        if len(waiting) > 1:
            yield list(waiting.popleft())
    while waiting:
        yield list(waiting.popleft())


def _shard_maker(converter: Maker | Recipe, batch: int) -> Callable[[Task], Iterator[int]]:
    made = Converter(converter) if isinstance(converter, Recipe) else converter
    return partial(make_shard, converter=made, batch=batch)


def _portable(converter: Maker) -> TreeReader | Recipe:
    """What another process makes the same of."""
    return converter.recipe if isinstance(converter, Converter) else converter


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Stopped(Exception):
    """The parent wants no more."""


class _Worker:
    """What a process of the pool holds; the counter of items and the wish to stop are shared with the parent."""

    run_task: Callable[[Any], Iterator[int]]
    items: Any
    stop: Any

    @classmethod
    def start(cls, make: Callable[[], Callable[[Any], Iterator[int]]], items: Any, stop: Any) -> None:
        torch.set_num_threads(1)
        gc.freeze()  # what was imported is garbage no more
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and tells
        Thread(target=cls._end_with_parent, daemon=True).start()
        cls.run_task, cls.items, cls.stop = staticmethod(make()), items, stop

    @staticmethod
    def _end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        wait_for_any([parent.sentinel])
        os._exit(1)

    @classmethod
    def run(cls, task: Any) -> None:
        for items in cls.run_task(task):
            with cls.items.get_lock():
                cls.items.value += items
            if cls.stop.is_set():
                raise _Stopped


def share_out(
    tasks: Sequence[T], make: Callable[[], Callable[[T], Iterator[int]]], workers: int
) -> Generator[int, None, None]:
    """Run tasks, one thread each, in this process or in several; yields how many more items are done, now and then.

    make: returns what runs a task and yields its items. It is called in every process; where processes cannot be forked
    it is pickled.
    """
    if min(workers, len(tasks)) < 2:
        with _one_thread():
            run = make()
            for task in tasks:
                yield from run(task)
        return
    # A forked process has what it needs at once, as DataLoader's have their data set; CUDA does not survive a fork.
    forked = not torch.cuda.is_initialized()
    context = multiprocessing.get_context("fork" if forked else "spawn")
    items, stop, reported = context.Value("q", 0), context.Event(), 0
    if forked:
        with _one_thread():
            make = partial(_identity, make())
    with ProcessPoolExecutor(min(workers, len(tasks)), context, _Worker.start, (make, items, stop)) as pool:
        left = {pool.submit(_Worker.run, task) for task in tasks}
        try:
            while left:
                done, left = wait(left, timeout=0.2, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                so_far = items.value
                yield so_far - reported
                reported = so_far
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process was killed, perhaps for want of memory: take fewer workers or a smaller batch"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _identity(value: T) -> T:
    return value


def _on_ray(tasks: list[Task], recipe: TreeReader | Recipe, batch: int, workers: int) -> Generator[int, None, None]:
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('engine "ray" needs Ray: pip install "ray[data]"') from error

    class Actor:  # each of Ray's makes one
        def __init__(self) -> None:
            torch.set_num_threads(1)
            self.converter = Converter(recipe) if isinstance(recipe, Recipe) else recipe

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return {"crops": sum(make_shard(tasks[row["id"]], self.converter, batch))}

    if not ray.is_initialized():
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.range(len(tasks), override_num_blocks=len(tasks))
    actor: Any = Actor
    for row in rows.map(actor, concurrency=workers, num_cpus=1).iter_rows():
        yield row["crops"]
