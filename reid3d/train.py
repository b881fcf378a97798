"""Training: a run is a folder, and the same command goes on with it where it stopped.

    config.yaml        the resolved config
    metrics.jsonl      one line an epoch; tensorboard/ holds the same figures, when asked
    model.safetensors  the weights after the last whole epoch (``create_model(weights=...)``), of a finished run that
                       averages, their average; model_last.safetensors then holds the last ones
    model_best.safetensors  with validation, the weights of the highest mAP
    checkpoint.pt      all that the next epoch needs

Everything random in an epoch follows from (seed, epoch), so a run that was interrupted ends, on a CPU with as many
threads, in the very same weights as one that was not. Under torchrun each process has a part of every batch, and all
of them together do what one with the whole batch would do, but for their dropout.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .baselines.weights import load_backbone
from .config import LossConfig, OptimConfig, TrainConfig, dump_config, read_config
from .data.datasets import open_dataset, validate_protocol
from .data.image_transforms import ImageTrainTransform
from .data.samplers import BalancedSampler, Batches, ClassSampler, PKSampler, ShuffleSampler
from .data.split import Split
from .data.transforms import EvalTransform, TrainTransform, place
from .io import atomic_write, hold_folder
from .losses import circle_loss, contrastive_loss, instance_loss, triplet_loss
from .models import Output, create_model, resolve_device, save_weights
from .models.norm import global_rows
from .progress import SECONDS_BETWEEN_LINES
from .retrieval import evaluate, extract, pair_scores

FINAL_LR = 0.01  # of the first
FIRST_FACTOR = 0.1  # at the start of the warm-up
_DROPOUT, _NOISE, _HELD_OUT = 3, 4, 5  # streams of random numbers; draws and clouds have their own
# A run may go on from another place and with other loaders: none of these has a part in the weights.
MAY_CHANGE = {"data", "out", "cloud.workers", "image.workers", "train.device", "train.tensorboard"}


METRIC_LOSSES: dict[str, Callable[..., Tensor]] = {
    "circle": circle_loss,
    "triplet": triplet_loss,
    "contrastive": contrastive_loss,
    "instance": instance_loss,
}


def train(config: TrainConfig) -> Path:
    """Train a network, or go on with a run that was interrupted; returns the folder of the run.

    The defaults are those of the published recipes: Adam with amsgrad, a cosine from lr to 1 % of it epoch by epoch,
    cross-entropy scaled from 0.1 to 1 over the warm-up (under Adam it hardly changes the steps), class-balanced draws
    with replacement, the last incomplete batch dropped. A finished run is left as it is.

    Under torchrun, which sets WORLD_SIZE, RANK and LOCAL_RANK, every process calls this; the batch is of each process,
    and the first one writes.

    Raises:
        FileNotFoundError: no data folder.
        ValueError: training data that cannot fill a batch, give positive pairs or be held out; a run folder of another
            config, other data or another number of processes; an unknown model, or one that needs more points or has
            no dropped features; a checkpoint that cannot be read.
        RuntimeError: the loss is no longer finite; no such device.
        ImportError: TensorBoard is asked for and not installed.
        BlockingIOError: another process trains in this folder.

    Source: the published OG-Net training, layumi/person-reid-3d, ``train_M.py`` with the flags of its recipes.
    """
    run = Path(config.out)
    with _team(config.train.device) as team:
        split, held_out = _splits(config)
        writer = _summary_writer() if config.train.tensorboard else None
        with torch.random.fork_rng([team.device] if team.device.type == "cuda" else []):
            torch.manual_seed(config.train.seed)
            try:
                model = create_model(config.model.name, split.num_pids, **config.model.kwargs).to(team.device)
            except TypeError as error:
                raise ValueError(f"model.kwargs: {error}") from error
            _prepare(config, model, split, team)
            feed = _Feed(config, split, team, model)
            with contextlib.ExitStack() as held:
                if team.leads:
                    run.mkdir(parents=True, exist_ok=True)
                    held.enter_context(hold_folder(run, "another training"))
                    _claim(run, config)
                _train(config, run, feed, held_out, _State(config, model, team.device), writer)
    return run


@dataclass(frozen=True)
class _Team:
    """The processes that train together, as one of them sees it."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def share(self, value: Any) -> Any:
        """What the first process has."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def average_gradients(self, model: nn.Module) -> None:
        """In one piece after the backward pass: a few million numbers, and DistributedDataParallel, which sends them
        bucket by bucket during it, would come between the messages of the norms."""
        if self.world > 1:
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            flat = self.sum(torch.cat([grad.flatten() for grad in grads])) / self.world
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))


@contextlib.contextmanager
def _team(device: str) -> Iterator[_Team]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield _Team(resolve_device(device))
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]:
        raise ValueError(
            f"WORLD_SIZE is {world}, so {' and '.join(missing)} must be set too: torchrun sets all of them"
        )
    rank, local = int(os.environ["RANK"]), os.environ["LOCAL_RANK"]
    mine = f"cuda:{local}" if device in ("auto", "cuda") and torch.cuda.is_available() else device
    team = _Team(resolve_device(mine), rank, world)
    if team.device.type == "cuda":
        torch.cuda.set_device(team.device)
    # The others wait for the first one while it validates, which may take long.
    dist.init_process_group("nccl" if team.device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield team
    finally:
        dist.destroy_process_group()


class _State:
    """All that an epoch changes, and that a checkpoint holds."""

    def __init__(self, config: TrainConfig, model: Any, device: torch.device) -> None:
        self.model, self.optimizer = model, _optimizer(config.train, model)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "float16")
        self.average: dict[str, Tensor] = {}  # of the parameters
        self.best = -1.0  # mAP
        self.epoch = 0

    def to_dict(self) -> dict[str, Any]:
        parts = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        parts["scaler"] = self.scaler.state_dict()
        return {"epoch": self.epoch, "average": self.average, "best": self.best, **parts}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        like = dict(self.model.named_parameters())
        self.average = {name: mean.to(like[name].device) for name, mean in state["average"].items()}
        self.best, self.epoch = float(state["best"]), int(state["epoch"])


class _Feed:
    """The batches of an epoch on the device, of each this process's part."""

    def __init__(self, config: TrainConfig, split: Split, team: _Team, model: Any) -> None:
        cloud, image, seed = config.cloud, config.image, config.train.seed
        if split.inputs == "image":
            varied = image.flip, image.erasing, image.occlusion, image.shift
            split = split.with_transform(
                ImageTrainTransform(model.size[0], model.size[1], model.resample, *varied), seed
            )
        else:
            varying = TrainTransform(cloud.points, cloud.flip, cloud.scale, cloud.jitter, cloud.background)
            split = split.with_transform(varying.pick, seed)
        self.split, self.team, self.batches = split, team, _batches(config, split, team)
        self._jitter, self._seed, self._noise = cloud.jitter, seed, torch.Generator(team.device)
        workers = image.workers if split.inputs == "image" else cloud.workers
        self._loader = DataLoader(
            self.split,
            batch_sampler=self.batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=team.device.type == "cuda",
            generator=torch.Generator(),  # of worker seeds, which nothing uses; it leaves the global one alone
        )

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """What the model takes, xyz (B, P, 3) and rgb (B, P, 3) or images (B, 3, H, W), and labels (B,)."""
        self.batches.set_epoch(epoch)
        self.split.set_epoch(epoch)
        torch.manual_seed(_seed(_DROPOUT, self._seed, epoch, self.team.rank))
        for step, batch in enumerate(self._loader):
            *parts, labels = (part.to(self.team.device, non_blocking=True) for part in batch[:-1])
            if self.split.inputs == "image":
                yield (parts[0].float() / 255,), labels
            else:
                xyz, rgb, move = parts
                yield place(xyz, rgb, move, self._draw(xyz.shape, epoch, step) if self._jitter else None), labels

    def _draw(self, shape: torch.Size, epoch: int, step: int) -> Tensor:
        """This process's part of noise for the whole batch."""
        self._noise.manual_seed(_seed(_NOISE, self._seed, epoch, step))
        noise = torch.randn(self.team.world, *shape, generator=self._noise, device=self.team.device)
        return noise[self.team.rank]


def _train(config: TrainConfig, run: Path, feed: _Feed, held_out: Split | None, state: _State, writer: Any) -> None:
    team, epochs = feed.team, config.train.epochs
    about = {"data": feed.split.fingerprint(), "processes": team.world}
    _resume(run, state, about, team)
    start, shown = state.epoch, team.leads
    if shown:  # only now is it known that the run is of these data
        with atomic_write(run / "config.yaml") as file:
            file.write(dump_config(config).encode())
    averaged = not state.average or team.share((run / "model_last.safetensors").exists())
    finished = start == epochs and averaged
    if shown:
        _log(run, keep=start)
        if finished:
            print(f"{run}: already trained for {epochs} epochs", file=sys.stderr)
        elif start:
            print(f"{run}: going on after epoch {start} of {epochs}", file=sys.stderr)
    if finished:
        return
    board = writer(run / "tensorboard", purge_step=start + 1) if writer and shown else None
    items = f"{feed.split.inputs}s"
    trained_on = {"data": Path(config.data).name, items: len(feed.split), "ids": feed.split.num_pids}
    fed_with: dict[str, Any] = {"points": config.cloud.points, "background": config.cloud.background}
    if feed.split.inputs == "image":
        fed_with = {"size": list(state.model.size)}
    reported, steps = time.monotonic(), len(feed)
    with tqdm(
        total=epochs * steps, initial=start * steps, unit="step", disable=not (shown and sys.stderr.isatty())
    ) as bar:
        for epoch in range(start, epochs):
            metrics = _train_epoch(state, feed, config, epoch, bar)
            state.epoch = epoch + 1
            _average(state, epoch, config.train)
            if not shown:
                continue
            note = json.dumps(trained_on | {"epochs": epoch + 1} | fed_with)
            better = False
            if held_out is not None and (state.epoch % config.validation.every == 0 or state.epoch == epochs):
                metrics |= _validate(state.model, held_out, config)
                better, state.best = metrics["mAP"] > state.best, max(state.best, metrics["mAP"])
            _log(run, metrics)
            if board:
                for name, value in metrics.items():
                    board.add_scalar(name, value, state.epoch)
            save_weights(state.model, run / "model.safetensors", trained_on=note)
            if better:
                save_weights(state.model, run / "model_best.safetensors", trained_on=note)
            _save(run, state, about)
            line = "epoch {epoch}: loss {loss:.3f}".format(**metrics)
            line += ", accuracy {accuracy:.3f}".format(**metrics) if "accuracy" in metrics else ""
            line += f", mAP {metrics['mAP']:.1%} of the people held out" if "mAP" in metrics else ""
            bar.set_postfix_str(line)
            if bar.disable and (time.monotonic() - reported > SECONDS_BETWEEN_LINES or epoch + 1 == epochs):
                reported = time.monotonic()
                print(f"{line} ({epoch + 1} of {epochs})", file=sys.stderr, flush=True)
    if board:
        board.close()
    if state.average:
        mean = _averaged(state, feed, epochs)
        if shown:
            last = trained_on | {"epochs": epochs} | fed_with
            note = json.dumps(last | {"average_from": config.train.average_from})
            save_weights(mean, run / "model.safetensors", trained_on=note)
            save_weights(state.model, run / "model_last.safetensors", trained_on=json.dumps(last))  # then all is done
    team.share(None)  # nobody leaves before the files are there


def _train_epoch(state: _State, feed: _Feed, config: TrainConfig, epoch: int, bar: tqdm[Any]) -> dict[str, float]:
    part, device = config.train, feed.team.device
    begun, steps = time.perf_counter(), len(feed)
    dtype = getattr(torch, part.precision)
    half = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    weights = {"cross_entropy": 1.0} | {name: getattr(config.loss, name).weight for name in METRIC_LOSSES}
    state.model.train()
    totals: dict[str, Tensor] = {}
    for step, (inputs, labels) in enumerate(feed.epoch(epoch), start=epoch * steps + 1):
        factor = warmup_factor(step, part.warmup * steps)
        lr = learning_rate(part.lr, epoch, part.epochs, part.schedule, part.milestones)
        lr *= factor if part.warmup_of == "lr" else 1.0
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1.0)
        with half:
            output = state.model(*inputs)
        own = hasattr(state.model, "loss")
        parts = state.model.loss(output, labels) if own else _losses(config.loss, output, labels)
        loss = torch.stack([(1.0 if own else weights[name]) * value for name, value in parts.items()]).sum()
        state.optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss * (factor if part.warmup_of == "loss" else 1.0)).backward()
        feed.team.average_gradients(state.model)
        if part.clip:
            state.scaler.unscale_(state.optimizer)
            nn.utils.clip_grad_norm_(state.model.parameters(), part.clip)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        seen = {"loss": loss, **parts}
        first = output.logits[:1] if own else [output.logits]  # of several classifiers, if there are any
        for logits in first:
            seen["accuracy"] = (logits.argmax(1) == labels).float().mean()
        for name, value in seen.items():
            totals[name] = totals.get(name, 0.0) + value.detach()
        bar.update()
    means = feed.team.sum(torch.stack(list(totals.values()))) / (steps * feed.team.world)
    metrics = {"epoch": epoch + 1} | dict(zip(totals, means.tolist(), strict=True))
    if not math.isfinite(metrics["loss"]):
        raise RuntimeError(
            f"the loss is {metrics['loss']} in epoch {epoch + 1}: train.lr {config.train.lr} may be too high"
        )
    seconds = time.perf_counter() - begun
    speed = steps * config.batch * feed.team.world / seconds
    return metrics | {"lr": lr, "seconds": round(seconds, 3), f"{feed.split.inputs}s_per_second": round(speed, 1)}


def _losses(config: LossConfig, output: Output, labels: Tensor) -> dict[str, Tensor]:
    """The losses that have a weight, by name; metric losses are of the clouds of all processes."""
    assert output.logits is not None
    smooth = config.label_smoothing
    parts = {"cross_entropy": F.cross_entropy(output.logits.float(), labels, label_smoothing=smooth)}
    wanted = [name for name in METRIC_LOSSES if getattr(config, name).weight]
    if wanted:
        feats = output.feats if config.features == "clean" else output.dropped
        if feats is None:
            raise ValueError("loss.features must be clean for this model, which has no dropped ones, got 'dropped'")
        feats, labels = global_rows(feats), global_rows(labels)
    for name in wanted:
        settings = {key: value for key, value in asdict(getattr(config, name)).items() if key != "weight"}
        parts[name] = METRIC_LOSSES[name](feats, labels, **settings)
    return parts


def learning_rate(
    first: float, epoch: int, epochs: int, schedule: str = "cosine", milestones: Sequence[int] = ()
) -> float:
    """Of the epoch, counted from 0: a cosine from ``first`` to 1 % of it at ``epochs``, which is never reached, or
    "step": ``first``, and a tenth of what it was from each of the milestones on, without any from 80 % and from 95 % of
    the epochs."""
    if schedule == "step":
        return first * 0.1 ** sum(epoch >= stone for stone in milestones or (0.8 * epochs, 0.95 * epochs))
    last = FINAL_LR * first
    return last + (first - last) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Linear from 0.1 to 1 over the warm-up; ``step`` counts from 1."""
    return min(1.0, FIRST_FACTOR + (1 - FIRST_FACTOR) * step / warmup_steps) if warmup_steps else 1.0


def _optimizer(config: OptimConfig, model: Any) -> torch.optim.Optimizer:
    lr, decay = config.lr, config.weight_decay
    parameters: Any = model.parameters()
    if config.backbone_lr != 1:
        named, prefixes = list(model.named_parameters()), tuple(model.backbone)
        parameters = [
            {"params": [p for name, p in named if name.startswith(prefixes)], "share": config.backbone_lr},
            {"params": [p for name, p in named if not name.startswith(prefixes)], "share": 1.0},
        ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=decay, momentum=0.9, nesterov=True)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=decay)
    return torch.optim.Adam(parameters, lr=lr, weight_decay=decay, amsgrad=config.optimizer == "adam")


@torch.no_grad()
def _average(state: _State, epoch: int, config: OptimConfig) -> None:
    """Take an epoch's weights into the equal-weight mean, if it is late enough."""
    first = min(math.ceil(config.average_from * config.epochs - 1e-9), config.epochs - 1)  # the last one, at least
    taken = epoch - first + 1 if config.average_from < 1 else 0
    for name, parameter in state.model.named_parameters() if taken > 0 else ():
        if taken == 1:
            state.average[name] = parameter.detach().clone()
        else:
            state.average[name].lerp_(parameter, 1 / taken)


@torch.no_grad()
def _averaged(state: _State, feed: _Feed, epoch: int) -> nn.Module:
    """The model of the average weights, its batch statistics the mean over one more epoch, of no further training."""
    model = copy.deepcopy(state.model).train()
    for name, parameter in model.named_parameters():
        parameter.copy_(state.average[name])
    norms = [norm for norm in model.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.training]
    buffers = [
        (buffer, norm.momentum, torch.zeros_like(buffer, dtype=torch.float64))
        for norm in norms
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None and norm.momentum is not None
    ]
    for inputs, labels in feed.epoch(epoch):
        for buffer, _, _ in buffers:  # from 0, one batch leaves its momentum's share of its own statistics
            buffer.zero_()
        output = model(*inputs)
        if hasattr(model, "loss"):  # in which there may be norms, too
            model.loss(output, labels)
        for buffer, momentum, total in buffers:
            total += buffer.double() / momentum
    for buffer, _, total in buffers:
        buffer.copy_(total / len(feed))
    return model


def _validate(model: nn.Module, held_out: Split, config: TrainConfig) -> dict[str, float]:
    image = held_out.inputs == "image"
    workers = config.image.workers if image else config.cloud.workers
    features = extract(model, held_out, batch=config.batch, workers=workers, progress=False)
    result = evaluate(features, features, scores=pair_scores(model, features, features))
    return {"rank1": float(result.cmc[0]), "mAP": result.mAP}


def _splits(config: TrainConfig) -> tuple[Split, Split | None]:
    """The clouds or crops to learn from, and those of the people held out."""
    split = open_dataset(config.data).train
    if (split.pids < 0).any():
        raise ValueError(
            f"{config.data}: training needs known people, {(split.pids < 0).sum()} {split.inputs}s have pid -1"
        )
    held_out = None
    if share := config.validation.share:
        count = round(share * split.num_pids)
        if not 2 <= count <= split.num_pids - 2:
            raise ValueError(
                f"validation.share must hold out at least 2 of the {split.num_pids} people of {config.data} (split "
                f"train) and leave 2, got {share}"
            )
        rng = np.random.default_rng((_HELD_OUT, config.train.seed))
        held = np.isin(split.labels, rng.choice(split.num_pids, count, replace=False))
        held_out = split.subset(np.flatnonzero(held))
        if split.inputs == "cloud":
            held_out = held_out.with_transform(EvalTransform(config.cloud.points, config.cloud.background))
        # Query and gallery are the same items, and none must find itself: an unknown camera is one of its own.
        own = -2 - np.arange(len(held_out))
        held_out.camids = np.where(held_out.camids == -1, own, held_out.camids)
        try:
            validate_protocol(held_out, held_out)
        except ValueError as error:
            raise ValueError(f"validation.share: of the people held out, {error}") from error
        split = split.subset(np.flatnonzero(~held))
    if split.num_pids < 2:
        raise ValueError(f"{config.data}: training needs at least 2 people in the split train, got {split.num_pids}")
    paired = any(getattr(config.loss, name).weight for name in ("circle", "triplet", "contrastive"))
    if paired and len(split) == split.num_pids:
        raise ValueError(
            f"{config.data}: metric losses need people with at least 2 {split.inputs}s, all {split.num_pids} have one"
        )
    return split, held_out


def _prepare(config: TrainConfig, model: Any, split: Split, team: _Team) -> None:
    """Of a new model: see that it fits data and config, and set the size of its images and its backbone."""
    name = config.model.name
    if model.inputs != split.inputs:
        hint = "reid3d convert makes clouds of images" if model.inputs == "cloud" else "give the folder of the images"
        raise ValueError(f"{name} takes {model.inputs}s, and {config.data} holds {split.inputs}s: {hint}")
    if model.inputs == "cloud":
        least = getattr(model, "min_points", 1)
        if config.cloud.points < least:
            raise ValueError(f"cloud.points must be at least {least} for this model, got {config.cloud.points}")
        if config.model.backbone or config.train.backbone_lr != 1:
            raise ValueError(f"model.backbone and train.backbone_lr are for 2D methods, got {name}")
        return
    if hasattr(model, "loss") and config.loss != LossConfig():
        raise ValueError(f"loss must be left out: {name} has its own losses, which model.kwargs can change")
    if team.world > 1:
        raise ValueError(f"{name} trains in one process, got {team.world}: losses and norms are of the whole batch")
    model.size = (config.image.height or model.size[0], config.image.width or model.size[1])
    if config.model.backbone:
        print(load_backbone(model, config.model.backbone), file=sys.stderr)


def _batches(config: TrainConfig, split: Split, team: _Team) -> Batches:
    part, seed, size, world = config.sampling, config.train.seed, config.batch, team.world
    sampler: BalancedSampler | ShuffleSampler | ClassSampler | PKSampler
    if part.kind == "pk":
        try:
            sampler = PKSampler(split.labels, split.camids, p=part.p * world, k=part.k, seed=seed)
        except ValueError as error:
            of_each = f" ({part.p} in each of {world} processes)" if world > 1 else ""
            raise ValueError(f"{config.data}: sampling.{error}{of_each}") from error
    elif part.kind == "class":
        sampler = ClassSampler(split.labels, part.n, seed=seed)
    elif part.kind == "shuffle":
        sampler = ShuffleSampler(split.labels, seed=seed)
    else:
        sampler = BalancedSampler(split.labels, seed=seed)
    batches = Batches(sampler, size, team.rank, world)
    if not len(batches):
        of_each = f" in each of {world} processes" if world > 1 else ""
        items = f"{len(split)} {split.inputs}s"
        raise ValueError(f"train.batch must not exceed the {items} of {config.data} (split train), got {size}{of_each}")
    return batches


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("train.tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter


def _claim(run: Path, config: TrainConfig) -> None:
    """See that the folder is this config's; before the first checkpoint there is nothing to lose."""
    path = run / "config.yaml"
    if not (run / "checkpoint.pt").exists():
        for name in ("model_last", "model_best"):  # of a run that was thrown away; the first would end this one early
            (run / f"{name}.safetensors").unlink(missing_ok=True)
    elif path.exists() and (changes := differences(read_config(str(path)), config)):
        raise ValueError(f"{run} holds a run of another config ({', '.join(changes)}): choose another folder")


def differences(theirs: TrainConfig, ours: TrainConfig) -> list[str]:
    """In words, those that make a run another one."""
    one, other = _flat(asdict(theirs)), _flat(asdict(ours))
    keys = sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k) and k not in MAY_CHANGE)
    return [f"{key} was {one.get(key)} and is {other.get(key)}" for key in keys]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _seed(*words: int) -> int:
    return int(np.random.default_rng(words).integers(2**62))


def _save(run: Path, state: _State, about: dict[str, Any]) -> None:
    buffer = io.BytesIO()  # of a full disk torch would say no more than that its writer failed
    torch.save(about | state.to_dict(), buffer)
    with atomic_write(run / "checkpoint.pt") as file:
        file.write(buffer.getbuffer())


def _resume(run: Path, state: _State, about: dict[str, Any], team: _Team) -> None:
    """Load the run's checkpoint, if it has one."""
    path = run / "checkpoint.pt"
    with _reading(path):
        there = team.leads and path.exists()
        mine = torch.load(path, map_location="cpu", weights_only=True) if there else None
    saved = team.share(mine)
    if saved is None:
        return
    with _reading(path):
        if saved["data"] != about["data"]:
            raise ValueError(f"{run} was trained on other clouds: choose another folder")
        if saved["processes"] != about["processes"]:
            raise ValueError(f"{run} was trained by {saved['processes']} processes, got {about['processes']}")
        state.load(saved)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read; without it the run starts anew ({type(error).__name__})") from error


def _log(run: Path, metrics: dict[str, float] | None = None, keep: int | None = None) -> None:
    """Append a line to metrics.jsonl, or cut it to ``keep`` lines (an epoch that was lost may have left one)."""
    path = run / "metrics.jsonl"
    if metrics is not None:
        with open(path, "a") as file:
            file.write(json.dumps(metrics) + "\n")
    elif path.exists():
        with atomic_write(path) as file:
            file.writelines(path.read_bytes().splitlines(keepends=True)[:keep])
