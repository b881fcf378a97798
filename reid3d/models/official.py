"""The checkpoints published with OG-Net: read into our networks, and written from them.

They are files of torch.save, of the state dict of ModelE_dense with the flags of the recipes, under DataParallel. Its
convolutions 1x1 are our linear layers, with two more axes of length 1; ``agg`` is what we call ``mix``, and ``p_w``
holds the ``skip`` of all stages. k and the numbers of points are not in a file: they are those of the recipes.

Source: layumi/person-reid-3d, ``model_efficient.py``, ``pointnet2_modules.py``, ``train_M.py`` and ``test_M.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..io import atomic_write
from .ognet import Form, OGNet, Stage, ognet, ognet_deep, ognet_small

POINTS = 4096  # a cloud, in all recipes
PREFIX = "module."  # of DataParallel
NETWORKS: dict[str, Callable[[int], OGNet]] = {"ognet": ognet, "ognet_small": ognet_small, "ognet_deep": ognet_deep}
BRANCH = {  # modules of a Branch: ours, and theirs by place in a Sequential
    "linear1": "0",
    "norm1": "1",
    "gate.reduce": "2.se_reduce",
    "gate.expand": "2.se_expand",
    "linear2": "3",
    "norm2": "4",
}


def read_official(path: str | Path) -> tuple[str, dict[str, Any], dict[str, Tensor], int]:
    """A published checkpoint as (name, kwargs, state, num_classes): what ``create_model`` takes, and the state dict of
    the model that it makes of them.

    Which network it is, is told by the keys and the shapes. DataParallel's prefix may be missing. ``logit_scale``,
    which training with a metric loss adds and no feature depends on, is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of torch.save, or one of more than tensors by name; a key that is unknown or missing, or
            another shape than the published one.
    """
    path = Path(path)
    tensors = _load(path)
    if all(key.startswith(PREFIX) for key in tensors):
        tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    if "logit_scale" in tensors and tensors["logit_scale"].dim() == 0:
        del tensors["logit_scale"]
    if "p_w" in tensors and tensors["p_w"].dim() == 1:
        tensors |= {f"p_w[{i}]": skip for i, skip in enumerate(tensors.pop("p_w"))}
    bias = tensors.get("proj_output.bias")
    num_classes = len(bias) if bias is not None and bias.dim() == 1 else 1
    name, model, wrong = _nearest(tensors, num_classes)
    if wrong:
        raise ValueError(f"weights must be a published OG-Net checkpoint, got {path}: {wrong}")
    own = model.state_dict()
    state = {key: tensors[theirs].reshape(own[key].shape) for key, (theirs, _) in _published(model).items()}
    return name, {}, state, num_classes


def write_official(model: OGNet, path: str | Path) -> None:
    """Write an OG-Net as the published code writes its ``model_last.pth``, atomically.

    What that code takes from the ``opts.yaml`` beside it, k, init_points and the number of classes among it, is not in
    the file.

    Raises:
        TypeError: another network. ValueError: one without a classifier, which the published code wants, or of a form
            that was not published.
    """
    if not isinstance(model, OGNet):
        raise TypeError(f"model must be an OGNet, got {type(model).__name__}")
    if model.head.classifier is None:
        raise ValueError("model must have a classifier, got num_classes=0")
    published = Form(model.form.k, se=True, mix="learned", grouping="ball", paper=False)
    if model.form != published or model.flat or not model.stages[-1].features:
        raise ValueError(f"model must be of the published form, got {model.form}, flat={model.flat}")
    state = dict(_published(model).values())
    _, _, wrong = _nearest(state, model.head.classifier.out_features)
    if wrong:
        raise ValueError(f"model must be a published OG-Net, got one that differs: {wrong}")
    skips = [state.pop(key) for key in list(state) if key.startswith("p_w[")]
    if skips:
        state["p_w"] = torch.stack(skips)
    with atomic_write(path) as file:
        torch.save({PREFIX + key: tensor.detach().cpu() for key, tensor in state.items()}, file)


def _published(model: OGNet) -> dict[str, tuple[str, Tensor]]:
    """Of each of our keys the published one, and the tensor in its published shape; of p_w one element a stage."""
    names = {"head.linear": "embs.0", "head.norm": "bn_embs.0", "head.classifier": "proj_output"}
    convs = samplings = 0
    for i, stage in enumerate(cast("list[Stage]", list(model.stages))):
        ours = f"stages.{i}"
        names[f"{ours}.skip"] = f"p_w[{i}]"
        for j in range(len(stage.convs)):
            names[f"{ours}.convs.{j}.linear"] = f"conv.{convs}"
            names[f"{ours}.convs.{j}.norm"] = f"bn.{convs}"
            names[f"{ours}.convs.{j}.mix"] = f"agg.{convs}.p"
            convs += 1
        if stage.abstraction is not None:
            names[f"{ours}.project"] = f"conv_s2.{samplings}.0"
            for j in range(len(stage.abstraction.branches)):
                branch = f"{ours}.abstraction.branches.{j}"
                names |= {f"{branch}.{mine}": f"sa.{samplings}.mlps.{j}.{theirs}" for mine, theirs in BRANCH.items()}
            samplings += 1
    published = {}
    for key, tensor in model.state_dict().items():
        module, _, leaf = key.rpartition(".")
        name = names[key] if key in names else f"{names[module]}.{leaf}"
        if name.startswith("agg."):
            tensor = tensor.reshape(1)
        elif name.startswith(("conv.", "sa.")) and tensor.dim() == 2:
            tensor = tensor[..., None, None]
        published[key] = name, tensor
    return published


def _nearest(tensors: dict[str, Tensor], num_classes: int) -> tuple[str, OGNet, str]:
    """The network that keys and shapes fit best, by name and without weights, and in words what does not fit."""
    candidates = []
    for name, make in NETWORKS.items():
        with torch.device("meta"):
            model = make(num_classes)
        candidates.append((name, model, _differences(tensors, dict(_published(model).values()))))
    name, model, wrong = min(candidates, key=lambda candidate: len(candidate[2]))
    more = f", and {len(wrong) - 1} more are wrong" if len(wrong) > 1 else ""
    return name, model, f"for {name}, {wrong[0]}{more}" if wrong else ""


def _differences(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """What is wrong with the keys and shapes of tensors, one phrase each."""
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} is unknown" for key in tensors if key not in expected]
    for key, tensor in expected.items():
        if key in tensors and tensors[key].shape != tensor.shape:
            wrong.append(f"{key} must have shape {tuple(tensor.shape)}, got {tuple(tensors[key].shape)}")
    return wrong


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, got {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler stumbles over in a broken file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"weights must be a checkpoint of tensors, got {path}: {reason}") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in state.items()
    ):
        raise ValueError(f"weights must be a state dict, tensors by name, got {path}")
    return dict(state)
