"""Networks by name, and their weights: safetensors files that know what they are, or checkpoints as published."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ..baselines import plr_osnet, qaconv, relation, rmgl
from ..baselines import weights as weights_2d
from ..io import atomic_write
from . import dgcnn, official, ognet, plain, pointnet2
from .head import Output

__all__ = ["Output", "create_model", "list_models", "resolve_device", "save_weights"]

FORMAT = "reid3d-weights-1"
OFFICIAL = "published"
MODELS: dict[str, Callable[..., nn.Module]] = {
    "ognet": ognet.ognet,
    "ognet_small": ognet.ognet_small,
    "ognet_deep": ognet.ognet_deep,
    "dgcnn": dgcnn.dgcnn,
    "pointnet2_ssg": pointnet2.pointnet2_ssg,
    "pointnet2_msg": pointnet2.pointnet2_msg,
    "osnet": plain.osnet,
    "plr_osnet": plr_osnet.plr_osnet,
    "qaconv50": qaconv.qaconv50,
    "qaconv50_ibn_b": qaconv.qaconv50_ibn_b,
    "qaconv152": qaconv.qaconv152,
    "relation_f": relation.relation_f,
    "relation_s": relation.relation_s,
    "resnet50": plain.resnet50,
    "rmgl": rmgl.rmgl,
}


def list_models() -> list[str]:
    """The names that ``create_model`` knows, sorted."""
    return sorted(MODELS)


def create_model(
    name: str | None = None, num_classes: int = 0, *, weights: str | Path | None = None, **kwargs: Any
) -> nn.Module:
    """A network, in training mode; ``model.inputs`` says what it takes: "cloud", xyz and rgb, both (B, N, 3), or
    "image", (B, 3, H, W) in [0, 1]. ``model.points`` is how many points a cloud its weights were trained with (None:
    fresh, or the file does not say), ``model.background`` whether those of the background were among them,
    ``model.size`` height and width of its images; ``model.trained_on`` is all the file says.

    Args:
        name: one of ``list_models()``; may be left out when ``weights`` is given.
        num_classes: identities to classify; 0 for features alone.
        weights: a file of ``save_weights``. Its classifier is used when it has ``num_classes`` classes, else left out.
            Or a published checkpoint, which has ``num_classes`` classes unless that is 0: a ``.pth`` is one of OG-Net
            (``official``), a ``.tar`` or ``.pth.tar-N`` one of PLR-OSNet or QAConv (``baselines.weights``).
        **kwargs: of the model, e.g. ``init_points=384``; with ``weights``, in place of those it was saved with.

    Raises:
        ValueError: an unknown name or argument; a file that is no weights file, or of another network; a
            published checkpoint of another number of classes.
        FileNotFoundError: no such file.
    """
    state, meta = _read_weights(Path(weights)) if weights is not None else ({}, {})
    if weights is not None:
        if name is not None and name != meta["model"]:
            raise ValueError(f"name must be that of the weights, {meta['model']!r}, got {name!r}")
        name, kwargs = meta["model"], {**json.loads(meta["kwargs"]), **kwargs}
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(list_models())}, got {name!r}")
    known = [p for p in inspect.signature(MODELS[name]).parameters if p != "num_classes"]
    unknown = sorted(set(kwargs) - set(known))
    if unknown:
        raise ValueError(f"{name} has the arguments {', '.join(known)}, got {', '.join(unknown)}")
    if num_classes < 0:
        raise ValueError(f"num_classes must not be negative, got {num_classes}")
    if meta.get("format") == OFFICIAL and num_classes not in (0, int(meta["num_classes"])):
        raise ValueError(f"num_classes must be 0 or that of the weights, {meta['num_classes']}, got {num_classes}")
    model = MODELS[name](num_classes, **kwargs)
    model.name, model.kwargs, model.num_classes = name, kwargs, num_classes  # type: ignore[assignment]
    model.trained_on = meta.get("trained_on", "")  # type: ignore[assignment]
    model.points, model.background, size = _fed_with(meta.get("trained_on", ""))  # type: ignore[assignment]
    if size is not None:
        model.size = size  # type: ignore[assignment]
    if weights is not None:
        own = model.state_dict()
        if int(meta["num_classes"]) != num_classes:
            of_people = tuple(getattr(model, "classifiers", ("head.classifier.",)))
            state = {key: value for key, value in state.items() if not key.startswith(of_people)}
            state |= {key: value for key, value in own.items() if key.startswith(of_people)}
        wrong = sorted(key for key in own.keys() | state.keys() if _shape(own, key) != _shape(state, key))
        if wrong:
            raise ValueError(f"weights {weights} do not fit {name}({kwargs}): {len(wrong)} tensors, first {wrong[0]}")
        model.load_state_dict(state)
    return model


def save_weights(model: nn.Module, path: str | Path, *, trained_on: str) -> None:
    """Write a model of ``create_model`` as safetensors, atomically.

    ``trained_on`` says what it has seen, in words, or as the JSON of an object, whose "points" and "background" are
    read back.
    """
    metadata = {
        "format": FORMAT,
        "model": str(model.name),
        "kwargs": json.dumps(model.kwargs),
        "num_classes": str(model.num_classes),
        "trained_on": trained_on,
    }
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    with atomic_write(path) as file:
        file.write(save(state, metadata))


def resolve_device(name: str) -> torch.device:
    """The device of that name ("auto": a GPU when there is one), which is known to work then.

    Raises:
        RuntimeError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: torch without CUDA
        raise RuntimeError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _fed_with(trained_on: str) -> tuple[int | None, bool, tuple[int, int] | None]:
    """Points of a cloud, whether its background is among them, and height and width of images, as far as it says so."""
    try:
        note = dict(json.loads(trained_on))
        size = (int(note["size"][0]), int(note["size"][1])) if "size" in note else None
        return int(note["points"]) if "points" in note else None, bool(note.get("background", True)), size
    except (ValueError, TypeError, KeyError, IndexError):
        return None, True, None


def _shape(state: dict[str, Any], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def _read_weights(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, got {path}")
    of_clouds = path.suffix == ".pth"
    if of_clouds or path.suffix.startswith(".tar"):
        name, kwargs, state, num_classes = (official if of_clouds else weights_2d).read_official(path)
        note = {"ids": num_classes, "points": official.POINTS} if of_clouds else {"ids": num_classes}
        return state, {
            "format": OFFICIAL,
            "model": name,
            "kwargs": json.dumps(kwargs),
            "num_classes": str(num_classes),
            "trained_on": json.dumps(note),
        }
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise ValueError(f"weights must be a {FORMAT} file, got {path} of format {meta.get('format')!r}")
            return {key: file.get_tensor(key) for key in file.keys()}, meta  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"weights must be a safetensors file, got {path}: {error}") from error
