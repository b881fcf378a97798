"""PLR-OSNet: an OSNet with attention that ends twice, once in four horizontal strips and once in a whole.

Source: Xie et al., "Learning Diverse Features with Part-Level Resolution for Person Re-Identification", 2020; the
published code, AI-NERC-NUPT/PLR-OSNet, ``plr_osnet.py``, ``attention_module.py`` and ``triplet.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import triplet_loss
from .image_model import Form, Heads, ImageModel, Part
from .osnet import WIDTHS, Gate, OSNet

STRIPS = 4
DIMS = STRIPS * OSNet.channels, OSNet.channels  # of the vectors of the local and of the global branch
CENTRE_WEIGHT = 5e-4
FROZEN_CENTRES = 751  # of Market-1501's people, on whatever the published code trains
PLACES = {  # of OSNet's modules; what comes behind the shared part is there twice
    "conv1": ("layer0.0",),
    "conv2": ("layer1",),
    "conv3": ("layer2",),
    "conv4": ("layer30", "layer31.0"),
    "conv5": ("layer40", "layer41.0"),
}


class SpatialAttention(nn.Module):
    """Each pixel plus the norm of a mean over all pixels, weighted by the softmax of query times key.

    gamma, which begins as 0, keeps the mean out at first; as a factor in front of a norm, only its sign lasts.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        # (B, 1, H * W, C), contiguous: else torch has no kernel that does without a matrix of all pairs of pixels.
        pixels = x.flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
        query, key = (F.linear(pixels, conv.weight.flatten(1), conv.bias) for conv in (self.query_conv, self.key_conv))
        mean = F.scaled_dot_product_attention(query, key, pixels, scale=1.0)
        return self.bn(self.gamma * mean.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:])) + x


class Attention(nn.Module):
    """Attention over pixels, then over channels, the latter at each pixel of its own: the squeeze and excitation that
    the paper says is slightly modified has no squeeze in the published code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pam = SpatialAttention(channels)
        self.se = Gate(channels, pooled=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.se(self.pam(x))


class PLROSNet(ImageModel):
    """A crop to a descriptor of 2560 numbers: 2048 of its strips and 512 of the whole, each part of length 1.

    Args:
        num_classes: people to classify; 0 for features alone, without classifiers and centres.
        label_smoothing: share of the target that cross-entropy spreads over all people.
        learned_centres: those of the centre loss are parameters, one a person; else they stay where they are drawn, and
            people beyond the 751st have none.
        projected: the global vector goes through a linear layer of its own size.
        whole: whether there is a global branch. each_strip: whether each strip has a classifier of its own, and their
            cross-entropies are added up, in place of one of all strips. The paper's ablations.

    Key names are the published code's, besides centres1 and centres2, which its checkpoints lack. Its attention has
    torch's initial weights, its linear layers N(0, 0.01), biases of 0. Both branches begin with the same weights.

    Source: as this file.
    """

    backbone = ("layer",)
    classifiers = ("classifier1.", "classifier2.", "centres")
    centres1: Tensor
    centres2: Tensor

    def __init__(
        self,
        num_classes: int = 0,
        *,
        label_smoothing: float = 0.1,
        learned_centres: bool = False,
        projected: bool = True,
        whole: bool = True,
        each_strip: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.whole, self.each_strip = num_classes, whole, each_strip
        self.label_smoothing = label_smoothing
        osnet = OSNet()
        self.layer0 = nn.Sequential(osnet.conv1, osnet.maxpool)
        self.layer1 = osnet.conv2
        self.attention_module1 = Attention(WIDTHS[1])
        self.layer2 = osnet.conv3
        self.attention_module2 = Attention(WIDTHS[2])
        self.layer30 = osnet.conv4
        self.layer40 = osnet.conv5
        if whole:
            self.layer31 = nn.Sequential(copy.deepcopy(osnet.conv4))
            self.layer41 = nn.Sequential(copy.deepcopy(osnet.conv5))
        self.fc2 = _linear(OSNet.channels, OSNet.channels) if projected and whole else None
        for i, dim in enumerate(DIMS[: 1 + whole], 1):
            self.add_module(f"bn{i}", nn.BatchNorm1d(dim))
        if num_classes:
            for i, dim in enumerate(DIMS[: 1 + whole], 1):
                each = i == 1 and each_strip
                parts = [_linear(dim // STRIPS, num_classes) for _ in range(STRIPS)] if each else []
                self.add_module(f"classifier{i}", nn.ModuleList(parts) if each else _linear(dim, num_classes))
            for i, dim in enumerate(DIMS[: 1 + whole], 1):
                centres = torch.randn(num_classes if learned_centres else FROZEN_CENTRES, dim)
                if learned_centres:
                    self.register_parameter(f"centres{i}", nn.Parameter(centres))
                else:
                    self.register_buffer(f"centres{i}", centres)

    def last_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        for name, size, divisor in zip(("height", "width"), images.shape[2:], (16 * STRIPS, 16), strict=True):
            if size == 0 or size % divisor:
                raise ValueError(f"{name} must be a multiple of {divisor}, got {size}")
        x = self.attention_module1(self.layer1(self.layer0(images)))
        x = self.attention_module2(self.layer2(x))
        local = self.layer40(self.layer30(x))
        return (local, self.layer41(self.layer31(x))) if self.whole else (local,)

    def from_maps(self, maps: Sequence[Tensor]) -> Tensor | Heads:
        found = self._pooled(maps)
        normed = self._normed(found)
        if not self.training:
            return torch.cat([F.normalize(feats) for feats in normed], dim=1)
        logits: list[Tensor] = []
        for i, feats in enumerate(normed if self.num_classes else [], 1):
            of = self.get_submodule(f"classifier{i}")
            parts = zip(of, feats.chunk(STRIPS, 1), strict=True) if isinstance(of, nn.ModuleList) else ((of, feats),)
            logits += [classifier(part) for classifier, part in parts]
        return Heads(tuple(found), tuple(logits))

    def _pooled(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The vectors of the branches, the local one first."""
        strips = maps[0].unflatten(2, (STRIPS, -1)).mean((3, 4))  # (B, 512, 4)
        found = [strips.transpose(1, 2).flatten(1)]
        if self.whole:
            whole = maps[1].amax((2, 3))
            found.append(whole if self.fc2 is None else self.fc2(whole))
        return found

    def _normed(self, found: Sequence[Tensor]) -> list[Tensor]:
        return [self.get_submodule(f"bn{i}")(feats) for i, feats in enumerate(found, 1)]

    def parts(self, maps: Sequence[Tensor]) -> dict[str, Part]:
        local, *rest = self._normed(self._pooled(maps))
        named = {f"strip {i}/{STRIPS}": Part(0, feats) for i, feats in enumerate(local.chunk(STRIPS, 1), 1)}
        return named | ({"global": Part(1, rest[0])} if rest else {})

    def loss(self, output: Heads, labels: Tensor) -> dict[str, Tensor]:
        """The terms whose sum is minimised, weighted, means over the branches.

        cross_entropy of the logits, and of the vectors in front of the norm triplet, batch-hard with a soft margin, and
        centre, 0.0005 times the squared distance to the centre of the person, a mean over the samples that have one.
        triplet is a mean over the anchors that have a positive, 0 without any; the published code takes an anchor for a
        positive of itself. The paper leaves the weights open: in both forms they are the published code's.

        Args:
            output: of ``forward`` in training mode. labels: (B,) int64 in [0, num_classes).

        Raises:
            TypeError: labels of another dtype. ValueError: of another shape or range, or num_classes is 0.

        Source: the paper's eq. 6; ``triplet.py`` and ``center_loss.py`` of the published code.
        """
        triplet = [triplet_loss(feats, labels, margin=None) for feats in output.feats]
        self.check_classes(labels, self.num_classes)
        cross_entropy = [
            F.cross_entropy(_wide(logits), labels, label_smoothing=self.label_smoothing) for logits in output.logits
        ]
        centre = [_centre_loss(feats, labels, getattr(self, f"centres{i}")) for i, feats in enumerate(output.feats, 1)]
        return {
            "cross_entropy": torch.stack(cross_entropy).sum() / len(output.feats),
            "triplet": torch.stack(triplet).mean(),
            "centre": CENTRE_WEIGHT * torch.stack(centre).mean(),
        }

    def of_backbone(self, key: str) -> tuple[str, ...]:
        module, _, rest = key.partition(".")
        return tuple(f"{place}.{rest}" for place in PLACES.get(module, ()))


def plr_osnet(
    num_classes: int = 0,
    *,
    form: Form = "official",
    smoothing: Form | None = None,
    centres: Form | None = None,
    projection: Form | None = None,
    whole: bool = True,
    each_strip: bool = False,
) -> PLROSNet:
    """PLR-OSNet: 3,324,926 parameters without the classifiers, or 3,062,270 in the paper's form.

    Args:
        num_classes: people to classify; 0 for features alone.
        form: where paper and published code differ, whose way it is; each of the following may differ from it.
        smoothing: of the labels of cross-entropy; official: 0.1, paper: none.
        centres: of the centre loss; official: 751 of N(0, 1) that never learn, paper: one a person, learned.
        projection: of the global vector; official: a linear layer behind the max pooling, paper: none.
        whole, each_strip: see PLROSNet.

    Raises:
        ValueError: a form of another name.
    """
    chosen = {"form": form, "smoothing": smoothing, "centres": centres, "projection": projection}
    for name, value in chosen.items():
        if value not in get_args(Form) and (value is not None or name == "form"):
            raise ValueError(f"{name} must be one of {', '.join(get_args(Form))}, got {value!r}")
    return PLROSNet(
        num_classes,
        label_smoothing=0.1 if (smoothing or form) == "official" else 0.0,
        learned_centres=(centres or form) == "paper",
        projected=(projection or form) == "official",
        whole=whole,
        each_strip=each_strip,
    )


def from_official(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor], int]:
    """A checkpoint of the published code as (name, kwargs, state, num_classes): what ``create_model`` takes, and the
    state dict of the model that it makes of them. Its centres, which are not in the checkpoint, are drawn anew.

    Args:
        state: the tensors by name, without DataParallel's prefix.

    Raises:
        ValueError: a key that is missing or unknown, or a tensor of another shape.
    """
    bias = state.get("classifier1.bias")
    num_classes = len(bias) if bias is not None and bias.dim() == 1 else 1
    own = plr_osnet(num_classes).state_dict()
    expected = {key: tuple(tensor.shape) for key, tensor in own.items() if not key.startswith("centres")}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    wrong = [f"{key} is missing" for key in expected if key not in given]
    wrong += [f"{key} is unknown" for key in given if key not in expected]
    for key, shape in given.items():
        if shape != expected.get(key, shape):
            wrong.append(f"{key} must have shape {expected[key]}, got {shape}")
    if wrong:
        raise ValueError(f"weights must be those of a published PLR-OSNet: {wrong[0]}")
    return "plr_osnet", {}, own | dict(state), num_classes


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, 0.0, 0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _centre_loss(feats: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """The mean of the squared distances to the centres, over the samples whose class has one; 0 of none."""
    counted = labels < len(centres)
    dist2 = (_wide(feats) - centres[labels.clamp(max=len(centres) - 1)]).square().sum(1)
    return torch.where(counted, dist2, 0.0).sum() / counted.sum().clamp(min=1)


def _wide(x: Tensor) -> Tensor:
    """x as float32, unless it is float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
