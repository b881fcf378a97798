"""Training: a run is a folder, and the same command goes on with it where it stopped.

    config.yaml        the resolved config
    metrics.jsonl      one line an epoch
    model.safetensors  the weights after the last whole epoch (``create_model(weights=...)``)
    checkpoint.pt      all that the next epoch needs

Everything random in an epoch follows from (seed, epoch), so a run that was interrupted ends, on a CPU with as many
threads, in the very same weights as one that was not.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .config import TrainConfig, dump_config, read_config
from .data.clouds import CloudSplit, open_dataset
from .data.samplers import BalancedSampler
from .data.transforms import TrainTransform
from .io import atomic_write, hold_folder
from .models import create_model, resolve_device, save_weights
from .progress import SECONDS_BETWEEN_LINES

FINAL_LR = 0.01  # of the first
FIRST_LOSS = 0.1  # factor at the start of the warm-up
_STREAM = 3  # of random numbers: of dropout; draws and clouds have their own
# A run may go on from another place and with other loaders: none of these has a part in the weights.
MAY_CHANGE = {"data", "out", "cloud.workers", "train.device"}


def train(config: TrainConfig) -> Path:
    """Train a network, or go on with a run that was interrupted; returns the folder of the run.

    Adam with amsgrad, a cosine from lr to 1 % of it epoch by epoch, cross-entropy scaled from 0.1 to 1 over the warm-up
    (the published "warm-up": under Adam it hardly changes the steps), class-balanced draws with replacement, the last
    incomplete batch dropped. A finished run is left as it is.

    Raises:
        FileNotFoundError: no data folder.
        ValueError: training data that cannot fill a batch; a run folder of another config or other data; an unknown
            model, or one that needs more points; a checkpoint that cannot be read.
        RuntimeError: the loss is no longer finite; no such device.
        BlockingIOError: another process trains in this folder.

    Source: the published OG-Net training, layumi/person-reid-3d, ``train_M.py`` with the flags of its recipes.
    """
    run, device = Path(config.out), resolve_device(config.train.device)
    split = _training_split(config)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.train.seed)
        try:
            model = create_model(config.model.name, split.num_pids, **config.model.kwargs).to(device)
        except TypeError as error:
            raise ValueError(f"model.kwargs: {error}") from error
        least = getattr(model, "min_points", 1)
        if config.cloud.points < least:
            raise ValueError(f"cloud.points must be at least {least} for this model, got {config.cloud.points}")
        run.mkdir(parents=True, exist_ok=True)
        with hold_folder(run, "another training"):
            _claim(run, config)
            _train(config, run, split, model, device)
    return run


def _train(config: TrainConfig, run: Path, split: CloudSplit, model: nn.Module, device: torch.device) -> None:
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay, amsgrad=True
    )
    content = split.fingerprint()
    start = _resume(run, model, optimizer, content, device)
    _log(run, keep=start)
    epochs = config.train.epochs
    if start == epochs:
        print(f"{run}: already trained for {epochs} epochs", file=sys.stderr)
        return
    if start:
        print(f"{run}: going on after epoch {start} of {epochs}", file=sys.stderr)
    sampler = BalancedSampler(split.labels, seed=config.train.seed)
    loader = DataLoader(
        split,
        batch_size=config.train.batch,
        sampler=sampler,
        drop_last=True,
        num_workers=config.cloud.workers,
        persistent_workers=config.cloud.workers > 0,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # of worker seeds, which nothing uses; it leaves the global one alone
    )
    reported = time.monotonic()
    steps = len(loader)
    with tqdm(total=epochs * steps, initial=start * steps, unit="step", disable=not sys.stderr.isatty()) as bar:
        for epoch in range(start, epochs):
            sampler.set_epoch(epoch)
            split.set_epoch(epoch)
            torch.manual_seed(_epoch_seed(config.train.seed, epoch))
            metrics = _train_epoch(model, optimizer, loader, config, epoch, device, bar)
            _log(run, metrics)
            trained_on = {"data": Path(config.data).name, "clouds": len(split), "ids": split.num_pids}
            trained_on |= {"epochs": epoch + 1, "points": config.cloud.points, "background": config.cloud.background}
            save_weights(model, run / "model.safetensors", trained_on=json.dumps(trained_on))
            _save(run, model, optimizer, content, epoch + 1)
            line = "epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.3f}".format(**metrics)
            bar.set_postfix_str(line)
            if bar.disable and (time.monotonic() - reported > SECONDS_BETWEEN_LINES or epoch + 1 == epochs):
                reported = time.monotonic()
                print(f"{line} ({epoch + 1} of {epochs})", file=sys.stderr, flush=True)


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    config: TrainConfig,
    epoch: int,
    device: torch.device,
    bar: tqdm[Any],
) -> dict[str, float]:
    begun = time.perf_counter()
    lr = learning_rate(config.train.lr, epoch, config.train.epochs)
    for group in optimizer.param_groups:
        group["lr"] = lr
    model.train()
    total_loss, correct, seen = torch.zeros((), device=device), torch.zeros((), device=device), 0
    for step, (xyz, rgb, labels, _) in enumerate(loader, start=epoch * len(loader) + 1):
        labels = labels.to(device, non_blocking=True)
        logits = model(xyz.to(device, non_blocking=True), rgb.to(device, non_blocking=True)).logits
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        (loss * loss_factor(step, config.train.warmup * len(loader))).backward()
        optimizer.step()
        total_loss += loss.detach() * len(labels)
        correct += (logits.detach().argmax(1) == labels).sum()
        seen += len(labels)
        bar.update()
    mean_loss = float(total_loss) / seen
    if not math.isfinite(mean_loss):
        raise RuntimeError(f"the loss is {mean_loss} in epoch {epoch + 1}: train.lr {config.train.lr} may be too high")
    seconds = time.perf_counter() - begun
    return {
        "epoch": epoch + 1,
        "loss": mean_loss,
        "accuracy": float(correct) / seen,
        "lr": lr,
        "seconds": round(seconds, 3),
        "clouds_per_second": round(seen / seconds, 1),
    }


def learning_rate(first: float, epoch: int, epochs: int) -> float:
    """Cosine from ``first`` at epoch 0 to 1 % of it at ``epochs``, which is never reached."""
    last = FINAL_LR * first
    return last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def loss_factor(step: int, warmup_steps: int) -> float:
    """Linear from 0.1 to 1 over the warm-up; ``step`` counts from 1."""
    return min(1.0, FIRST_LOSS + (1 - FIRST_LOSS) * step / warmup_steps) if warmup_steps else 1.0


def _training_split(config: TrainConfig) -> CloudSplit:
    split = open_dataset(config.data).train
    if (split.pids < 0).any():
        raise ValueError(f"{config.data}: training needs known people, {(split.pids < 0).sum()} clouds have pid -1")
    if split.num_pids < 2:
        raise ValueError(f"{config.data}: training needs at least 2 people in the split train, got {split.num_pids}")
    if len(split) < config.train.batch:
        raise ValueError(
            f"train.batch must not exceed the {len(split)} clouds of {config.data} (split train), "
            f"got {config.train.batch}"
        )
    part = config.cloud
    transform = TrainTransform(
        part.points, flip=part.flip, scale=part.scale, jitter=part.jitter, background=part.background
    )
    return split.with_transform(transform, seed=config.train.seed)


def _claim(run: Path, config: TrainConfig) -> None:
    """Make the folder this config's, or see that it is; before the first checkpoint there is nothing to lose."""
    path = run / "config.yaml"
    if path.exists() and (run / "checkpoint.pt").exists():
        theirs, ours = _flat(asdict(read_config(str(path)))), _flat(asdict(config))
        keys = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k) and k not in MAY_CHANGE)
        if keys:
            changes = ", ".join(f"{key} was {theirs.get(key)} and is {ours.get(key)}" for key in keys)
            raise ValueError(f"{run} holds a run of another config ({changes}): choose another folder")
    with atomic_write(path) as file:
        file.write(dump_config(config).encode())


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.default_rng((_STREAM, seed, epoch)).integers(2**62))


def _save(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, content: str, epoch: int) -> None:
    state = {"epoch": epoch, "data": content, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    buffer = io.BytesIO()  # of a full disk torch would say no more than that its writer failed
    torch.save(state, buffer)
    with atomic_write(run / "checkpoint.pt") as file:
        file.write(buffer.getbuffer())


def _resume(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, content: str, device: torch.device) -> int:
    """Load the run's checkpoint, if it has one; returns how many epochs are done."""
    path = run / "checkpoint.pt"
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if state["data"] != content:
            raise ValueError(f"{run} was trained on other clouds: choose another folder")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read; without it the run starts anew ({type(error).__name__})") from error
    return int(state["epoch"])


def _log(run: Path, metrics: dict[str, float] | None = None, keep: int | None = None) -> None:
    """Append a line to metrics.jsonl, or cut it to ``keep`` lines (an epoch that was lost may have left one)."""
    path = run / "metrics.jsonl"
    if metrics is not None:
        with open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
    elif path.exists():
        with atomic_write(path) as file:
            file.writelines(path.read_bytes().splitlines(keepends=True)[:keep])
