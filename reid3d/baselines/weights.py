"""Weights that others published for the 2D methods: backbones trained on ImageNet or people, and whole checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from .image_model import ImageModel
from .resnet import BLOCKS

WRAPPERS = "state_dict", "model"  # what trainers keep the weights under
PREFIXES = "module.", "base.", "model.", "backbone."  # of DataParallel, and of the nets around a backbone
COUNT = "num_batches_tracked"  # of BatchNorm, which no feature depends on, and which old files lack
# The scores beside the weights of torchreid's trainer are scalars of numpy, under its old and its new name.
SCALARS = "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype"


@dataclass(frozen=True)
class Report:
    """What became of a backbone file. loaded: the model's tensors that it filled; unused: the file's keys that it has
    no place for; fresh: the tensors of the model's backbone that got nothing.
    """

    loaded: tuple[str, ...]
    unused: tuple[str, ...]
    fresh: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for names, what in ((self.unused, "of the file unused"), (self.fresh, "of the backbone not in the file")):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                parts.append(f"{what}: {names[0]}{more}")
        return "; ".join(parts)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint, by name, on the CPU.

    Takes files of torch.save, of any age, and of safetensors (by their suffix). The dictionaries that trainers put
    around the weights are taken off, with all else that is in them, and so are the prefixes of the modules around a
    backbone (``PREFIXES``). No code of a file runs.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a broken file, one of other objects than tensors and plain values, or one without tensors by name;
            two tensors whose names differ in the prefix alone.
    """
    content = _load(Path(path))
    while wrapped := [content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)]:
        content = wrapped[0]
    tensors: dict[str, Tensor] = {}
    for key, tensor in _tensors(content).items():
        name = key
        while name.startswith(PREFIXES):
            name = name.partition(".")[2]
        if name in tensors:
            raise ValueError(f"weights must hold a tensor once, got {path}, which holds {name} under several prefixes")
        tensors[name] = tensor
    if not tensors:
        raise ValueError(f"weights must be a checkpoint, tensors by name, got {path}, which has none")
    return tensors


def load_backbone(model: ImageModel, path: str | Path) -> Report:
    """Begin as a published backbone: copy the tensors of a file to where ``model.of_backbone`` says.

    The file may be of torchvision or IBN-Net (ResNets), of torchreid (OSNet), or a checkpoint of a trainer whose net
    holds such a backbone, as those of torchreid, fast-reid or QAConv; see ``read_tensors``. Where it is of another
    backbone, nothing is copied.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint; or a tensor of the backbone is missing, of another shape, or one too many (a deeper
            net of the same family), and what the file looks like instead. The counts of BatchNorm may be missing.
    """
    own = model.state_dict()
    source: dict[str, Tensor] = {}  # by name in the model
    unused, filled = [], set()
    tensors = read_tensors(path)
    for key, tensor in tensors.items():
        names = [name for name in model.of_backbone(key) if name in own]
        for name in names:
            if own[name].shape != tensor.shape:
                shape = tuple(own[name].shape)
                raise _another_backbone(path, tensors, f"{key} must have shape {shape}, got {tuple(tensor.shape)}")
            source[name] = tensor
        if names:
            filled.add(key.partition(".")[0])
        else:
            unused.append(key)
    fresh = tuple(name for name in own if name.startswith(model.backbone) and name not in source)
    for name in fresh:
        if not name.endswith(COUNT):
            raise _another_backbone(path, tensors, f"{name} of the model is not in it")
    for key in unused:
        # layer3.6 of a deeper ResNet; but not the whole layer4, before which a model may end.
        if key.partition(".")[0] in filled and model.of_backbone(key) and not key.endswith(COUNT):
            raise _another_backbone(path, tensors, f"{key} is not in the model")
    with torch.no_grad():
        for name, tensor in source.items():
            own[name].copy_(tensor)
    return Report(tuple(source), tuple(unused), fresh)


def read_official(path: str | Path) -> tuple[str, dict[str, Any], dict[str, Tensor], int]:
    """A checkpoint of the code published with PLR-OSNet or QAConv as (name, kwargs, state, num_classes): what
    ``create_model`` takes, and the state dict of the model that it makes of them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, or of neither; a key that is unknown or missing, or another shape.

    Source: AI-NERC-NUPT/PLR-OSNet, a dictionary with ``state_dict``; ShengcaiLiao/QAConv, one with ``model`` and
    ``criterion``.
    """
    content = _load(Path(path))
    parts = {
        key: {name.removeprefix("module."): tensor for name, tensor in _tensors(content[key]).items()}
        for key in ("state_dict", "model", "criterion")
        if isinstance(content.get(key), Mapping)
    }
    if "model" in parts and "criterion" in parts:
        module, states = "qaconv", [parts["model"], parts["criterion"]]
    elif "state_dict" in parts:
        module, states = "plr_osnet", [parts["state_dict"]]
    else:
        raise ValueError(
            f"weights must be a published checkpoint of PLR-OSNet, with state_dict, or of QAConv, with model and "
            f"criterion, got {path} with {', '.join(map(str, list(content)[:3])) or 'nothing'}"
        )
    try:
        # Only now, and by name: whoever reads a backbone needs neither network.
        official: tuple[str, dict[str, Any], dict[str, Tensor], int] = import_module(
            f".{module}", __package__
        ).from_official(*states)
    except ValueError as error:
        raise ValueError(f"{error}, in {path}") from error
    return official


class _Ignored:
    """In place of a scalar of numpy or of its type, neither of which is looked up."""

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _load(path: Path) -> Mapping[Any, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, got {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with safe_globals([(_Ignored, name) for name in SCALARS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers stumble over in a broken file
        found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        line = f"{type(error).__name__} {error}".strip().splitlines()[0]
        reason = f"it holds a {found[1]}" if found else line
        raise ValueError(f"weights must be a checkpoint of tensors and plain values, got {path}: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"weights must be a checkpoint, tensors by name, got {path}, a {type(content).__name__}")
    return content


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    """What are tensors by name, and no epoch, optimizer or the like."""
    return {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}


def _another_backbone(path: str | Path, tensors: Mapping[str, Tensor], wrong: str) -> ValueError:
    return ValueError(f"weights must be of the model's backbone, got {path}, {_looks_like(tensors)}: {wrong}")


def _looks_like(tensors: Mapping[str, Tensor]) -> str:
    """What net the keys are of, in words."""
    if any(key.startswith("conv2.0.conv2") for key in tensors):  # the streams of a block
        return "an OSNet" + (" with instance norms" if any(".IN." in key for key in tensors) else "")
    blocks = tuple(len({key.split(".")[1] for key in tensors if key.startswith(f"layer{i}.")}) for i in (1, 2, 3, 4))
    if not blocks[0]:
        return f"a file of {', '.join(list(tensors)[:2])}{', ...' if len(tensors) > 2 else ''}"
    # Nets of basic blocks have no conv3, and as many blocks: ResNet-34 as ResNet-50. Files may end before layer4.
    depths = [
        depth for depth, counts in BLOCKS.items() if counts[:3] == blocks[:3] and "layer1.0.conv3.weight" in tensors
    ]
    net = f"a ResNet-{depths[0]}" if depths else f"a ResNet of {', '.join(map(str, blocks))} blocks"
    if "layer1.0.bn1.IN.weight" in tensors:
        return f"{net} with IBN-a"
    return f"{net} with IBN-b" if f"layer1.{blocks[0] - 1}.IN.weight" in tensors else net
