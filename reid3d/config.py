"""What a training run is made of: small dataclasses, read from a YAML recipe and dotted overrides."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@dataclass
class ModelConfig:
    """The network.

    Args:
        name: a name of ``reid3d.list_models()``.
        kwargs: arguments of that model that differ from the published ones, e.g. ``{init_points: 384, dropout: 0.5}``.
        backbone: of a 2D method, a file of weights of ImageNet to begin with: torchvision's, torchreid's, fast-reid's.
    """

    name: str = "ognet_small"
    kwargs: dict[str, Any] = field(default_factory=dict)
    backbone: str | None = None


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
class ImageConfig:
    """The crops a 2D method is fed with.

    Args:
        height: pixels they are resized to; null for the size the method was published with.
        width: the same.
        flip: mirror them half the time.
        erasing: share of them in which a random rectangle is erased.
        occlusion: put a white square at random on each, as QAConv does.
        shift: share of them that are cut, scaled and shifted at random, as RMGL does.
        workers: loader processes; the result does not depend on it.
    """

    height: int | None = None
    width: int | None = None
    flip: bool = True
    erasing: float = 0.0
    occlusion: bool = False
    shift: float = 0.0
    workers: int = 0


@dataclass
class SamplingConfig:
    """What the batches are made of.

    Args:
        kind: "balanced", clouds drawn with replacement, each person equally likely; "shuffle", each cloud once;
            "class", passes over all people; "pk", batches of p people with k clouds each.
        n: with "class", clouds of each person in a pass.
        p: with "pk", people in a batch.
        k: with "pk", clouds of each; the batch is p * k then, and train.batch has no part in it.
    """

    kind: Literal["balanced", "shuffle", "class", "pk"] = "balanced"
    n: int = 3
    p: int = 9
    k: int = 4


@dataclass
class CircleConfig:
    """Circle loss.

    Args:
        weight: of the loss in the sum; 0 is without it.
        margin: relaxation m of the cosine similarities.
        gamma: scale.
        over: "anchors", each cloud against the rest, as in the paper; "batch", all pairs at once, divided by the batch,
            as published with OG-Net.
    """

    weight: float = 0.0
    margin: float = 0.25
    gamma: float = 64.0
    over: Literal["anchors", "batch"] = "anchors"


@dataclass
class TripletConfig:
    """Batch-hard triplet loss.

    Args:
        weight: of the loss in the sum; 0 is without it.
        margin: between the distances of the farthest positive and the nearest negative; null for the soft margin.
    """

    weight: float = 0.0
    margin: float | None = 0.3


@dataclass
class ContrastiveConfig:
    """Contrastive loss.

    Args:
        weight: of the loss in the sum; 0 is without it.
        margin: distance from which negatives count no longer.
    """

    weight: float = 0.0
    margin: float = 1.0


@dataclass
class InstanceConfig:
    """Instance loss.

    Args:
        weight: of the loss in the sum; 0 is without it.
        scale: of the cosine similarities.
    """

    weight: float = 0.0
    scale: float = 32.0


@dataclass
class LossConfig:
    """The losses, whose weighted sum is minimised: cross-entropy with weight 1, and metric losses on the descriptor.
    The 2D methods have losses of their own instead.

    Args:
        label_smoothing: share of the target that cross-entropy spreads over all people.
        features: the descriptor that metric losses see: "clean", the one that retrieval uses; "dropped", after dropout,
            as published with OG-Net.
        circle: circle loss.
        triplet: triplet loss.
        contrastive: contrastive loss.
        instance: instance loss.
    """

    label_smoothing: float = 0.0
    features: Literal["clean", "dropped"] = "clean"
    circle: CircleConfig = field(default_factory=CircleConfig)
    triplet: TripletConfig = field(default_factory=TripletConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    instance: InstanceConfig = field(default_factory=InstanceConfig)


@dataclass
class OptimConfig:
    """The optimisation.

    Args:
        epochs: passes over about as many clouds as the training split has.
        batch: clouds a step, in each process; the last incomplete batch is dropped.
        optimizer: "adam" (amsgrad), "plain_adam" (without), "adamw", "sgd" (Nesterov momentum 0.9).
        lr: learning rate of the first epoch.
        weight_decay: L2 penalty, added to the gradient of every parameter; with adamw decoupled from it.
        schedule: of the learning rate, epoch by epoch: "cosine", to 1 % of lr; "step", a tenth of lr after 80 % of the
            epochs and a hundredth after 95 %, or a tenth of what it was after each of the milestones.
        milestones: epochs after which "step" lowers the learning rate; none for 80 % and 95 %.
        backbone_lr: of the layers of a 2D method that begin as those of a classifier, relative to lr.
        warmup: epochs over which a factor grows from 0.1 to 1, step by step.
        warmup_of: what it multiplies: "loss", as published, which Adam hardly notices; "lr", the learning rate.
        clip: largest norm of the gradient, 0 for any.
        precision: "float32"; "bfloat16" or "float16" where the model lets autocast choose them.
        average_from: share of the epochs after which the weights at the end of each are averaged; 1 is without.
        seed: of everything random; on a CPU the same seed gives the same weights.
        device: "auto" (a GPU when there is one), "cpu", "cuda", "cuda:1".
        tensorboard: write the figures of metrics.jsonl for TensorBoard too.
    """

    epochs: int = 1000
    batch: int = 36
    optimizer: Literal["adam", "plain_adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    backbone_lr: float = 1.0
    warmup: int = 10
    warmup_of: Literal["loss", "lr"] = "loss"
    clip: float = 0.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    average_from: float = 1.0
    seed: int = 0
    device: str = "auto"
    tensorboard: bool = False


@dataclass
class ValidationConfig:
    """Whether training looks how well it does on people it does not learn from.

    Args:
        share: of the people of the training split, held out by seed; 0 for none.
        every: epochs from one ranking of their clouds to the next; the last epoch has one too.
    """

    share: float = 0.0
    every: int = 10


@dataclass
class TrainConfig:
    """One training run.

    Args:
        data: folder of cloud shards (``reid3d convert``), for a 2D method of the images.
        out: folder of the run.
        model: the network.
        cloud: the clouds it is fed with.
        sampling: what the batches are made of.
        loss: what is minimised.
        train: the optimisation.
        validation: people held out.
        image: the images a 2D method is fed with, in place of the clouds.
    """

    data: str
    out: str
    model: ModelConfig = field(default_factory=ModelConfig)
    cloud: CloudConfig = field(default_factory=CloudConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    image: ImageConfig = field(default_factory=ImageConfig)

    @property
    def batch(self) -> int:
        """Clouds a step, in each process."""
        return self.sampling.p * self.sampling.k if self.sampling.kind == "pk" else self.train.batch

    def __post_init__(self) -> None:
        _check_choices(self)
        positive = {
            "cloud.points": self.cloud.points,
            "sampling.n": self.sampling.n,
            "loss.circle.gamma": self.loss.circle.gamma,
            "loss.instance.scale": self.loss.instance.scale,
            "train.epochs": self.train.epochs,
            "train.lr": self.train.lr,
            "image.height": self.image.height or 1,
            "image.width": self.image.width or 1,
            "validation.every": self.validation.every,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.train.batch < 2:
            raise ValueError(f"train.batch must be at least 2 (batch normalisation), got {self.train.batch}")
        for name, value in {"sampling.p": self.sampling.p, "sampling.k": self.sampling.k}.items():
            if value < 2:
                raise ValueError(f"{name} must be at least 2 (positive and negative pairs), got {value}")
        natural = {
            "cloud.workers": self.cloud.workers,
            "image.workers": self.image.workers,
            "train.backbone_lr": self.train.backbone_lr,
            "loss.circle.weight": self.loss.circle.weight,
            "loss.circle.margin": self.loss.circle.margin,
            "loss.triplet.weight": self.loss.triplet.weight,
            "loss.triplet.margin": self.loss.triplet.margin or 0.0,
            "loss.contrastive.weight": self.loss.contrastive.weight,
            "loss.contrastive.margin": self.loss.contrastive.margin,
            "loss.instance.weight": self.loss.instance.weight,
            "train.warmup": self.train.warmup,
            "train.seed": self.train.seed,
            "train.weight_decay": self.train.weight_decay,
            "train.clip": self.train.clip,
        }
        for name, value in natural.items():
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        shares = {"loss.label_smoothing": self.loss.label_smoothing, "validation.share": self.validation.share}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {value}")
        for name, value in {"image.erasing": self.image.erasing, "image.shift": self.image.shift}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {value}")
        stones = self.train.milestones
        if stones and (sorted(set(stones)) != stones or stones[0] < 1 or self.train.schedule != "step"):
            raise ValueError(f"train.milestones must be ascending epochs, with train.schedule step, got {stones}")
        if not 0 <= self.train.average_from <= 1:
            raise ValueError(f"train.average_from must be from 0 to 1, got {self.train.average_from}")
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


@functools.cache
def _parser() -> ArgumentParser:
    """The same one each time: to make it takes five times as long as to read a config with it."""
    return config_parser()


def read_config(recipe: str | None = None, overrides: Sequence[str] = ()) -> TrainConfig:
    """The config of a recipe with command-line overrides on top.

    Args:
        recipe: packaged name or YAML file; None starts from the defaults.
        overrides: as typed, e.g. ``["--data", "market3d", "--out", "run", "--train.lr", "1e-3"]``.

    Raises:
        ValueError: unknown recipe, unknown key, a value of the wrong kind or out of range, ``data`` or ``out`` missing.
    """
    from jsonargparse import ArgumentError

    first = ["--recipe", str(recipe_path(recipe))] if recipe is not None else []
    try:
        values = _parser().parse_args([*first, *overrides]).as_dict()
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return _built(TrainConfig, values)


def dump_config(config: TrainConfig) -> str:
    """The config as YAML that ``read_config`` reads back."""
    import yaml  # jsonargparse reads with it, and would leave out what is null

    return yaml.safe_dump(asdict(config), sort_keys=False)


def _built(kind: Any, values: dict[str, Any]) -> Any:
    """The dataclass that nested dictionaries describe; keys that are no fields of it are left out."""
    made = {}
    for name, part in get_type_hints(kind).items():
        made[name] = _built(part, values[name]) if is_dataclass(part) else values[name]
    return kind(**made)


def _check_choices(config: Any, prefix: str = "") -> None:
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if is_dataclass(kind):
            _check_choices(value, f"{prefix}{name}.")
        elif get_origin(kind) is Literal and value not in get_args(kind):
            raise ValueError(f"{prefix}{name} must be one of {', '.join(get_args(kind))}, got {value!r}")
