"""What a training run is made of: four small dataclasses, read from a YAML recipe and dotted overrides."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: a name of ``reid3d.list_models()``.
        kwargs: arguments of that model that differ from the published ones, e.g. ``{init_points: 384, dropout: 0.5}``.
    """

    name: str = "ognet_small"
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class CloudConfig:
    """The clouds the network is fed with.

    Args:
        points: points taken from each cloud.
        flip: mirror x half the time.
        scale: stretch each axis by U(0.75, 1.33).
        jitter: move each coordinate by N(0, 1 cm), clipped at 1 cm.
        background: keep the points that are not the body's.
        workers: loader processes; the result does not depend on it.
    """

    points: int = 4096
    flip: bool = True
    scale: bool = True
    jitter: bool = True
    background: bool = True
    workers: int = 0


@dataclass
class OptimConfig:
    """The optimisation: Adam (amsgrad), cosine to 1 % of lr, cross-entropy, class-balanced batches.

    Args:
        epochs: passes over as many clouds as the training split has.
        batch: clouds a step; the last incomplete batch is dropped.
        lr: learning rate of the first epoch.
        weight_decay: L2 penalty, added to the gradient of every parameter.
        warmup: epochs over which the loss is scaled from 0.1 to 1.
        seed: of everything random; on a CPU the same seed gives the same weights.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1".
    """

    epochs: int = 1000
    batch: int = 36
    lr: float = 1e-3
    weight_decay: float = 5e-4
    warmup: int = 10
    seed: int = 0
    device: str = "auto"


@dataclass
class TrainConfig:
    """One training run.

    Args:
        data: folder of cloud shards (``reid3d convert``).
        out: folder of the run.
        model: the network.
        cloud: the clouds it is fed with.
        train: the optimisation.
    """

    data: str
    out: str
    model: ModelConfig = field(default_factory=ModelConfig)
    cloud: CloudConfig = field(default_factory=CloudConfig)
    train: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        positive = {
            "cloud.points": self.cloud.points,
            "train.epochs": self.train.epochs,
            "train.lr": self.train.lr,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.train.batch < 2:
            raise ValueError(f"train.batch must be at least 2 (batch normalisation), got {self.train.batch}")
        natural = {
            "cloud.workers": self.cloud.workers,
            "train.warmup": self.train.warmup,
            "train.seed": self.train.seed,
            "train.weight_decay": self.train.weight_decay,
        }
        for name, value in natural.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        if self.train.seed >= 2**63:
            raise ValueError(f"train.seed must be less than 2**63, got {self.train.seed}")


def recipes() -> list[str]:
    """Names of the packaged recipes, sorted."""
    folder = importlib.resources.files("reid3d") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def recipe_path(recipe: str) -> Path:
    """The file of a recipe, given as a packaged name ("demo") or as a path to a YAML file.

    Raises:
        ValueError: neither such a file nor such a name.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    packaged = Path(str(importlib.resources.files("reid3d") / "recipes" / f"{recipe}.yaml"))
    if recipe in recipes():
        return packaged
    raise ValueError(f"recipe must be a YAML file or one of {', '.join(recipes())}, got {recipe!r}")


def config_parser(prog: str = "reid3d train") -> ArgumentParser:
    """A command-line parser with one ``--key`` (dotted for the parts) for each field of TrainConfig."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, exit_on_error=False, default_env=False)
    parser.add_argument("--recipe", action="config", help="YAML file with values for the fields below")
    parser.add_class_arguments(TrainConfig, sub_configs=False)
    return parser


def read_config(recipe: str | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a recipe with command-line overrides on top.

    Args:
        recipe: packaged name or YAML file; None starts from the defaults.
        overrides: as typed, e.g. ``["--data", "market3d", "--out", "run", "--train.lr", "1e-3"]``.

    Raises:
        ValueError: unknown recipe, unknown key, a value of the wrong kind or out of range, ``data`` or ``out`` missing.
    """
    from jsonargparse import ArgumentError

    parser = config_parser()
    first = ["--recipe", str(recipe_path(recipe))] if recipe is not None else []
    try:
        values = parser.parse_args([*first, *overrides]).as_dict()
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return TrainConfig(
        values["data"],
        values["out"],
        ModelConfig(**values["model"]),
        CloudConfig(**values["cloud"]),
        OptimConfig(**values["train"]),
    )


def dump_config(config: TrainConfig) -> str:
    """The config as YAML that ``read_config`` reads back."""
    parser = config_parser()
    return parser.dump(parser.parse_object(asdict(config)))
