"""The relation network: each strip of the image against the rest of it, and the whole by contrastive pooling.

Source: Park and Ham, "Relation Network for Person Re-identification", AAAI 2020, and the code published with it,
``Relation_final_ver_last_multi_scale_large_losses.py`` of cvlab-yonsei/RRID.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import triplet_loss
from .image_model import Form, Heads, ImageModel, Part
from .resnet import ResNet

MARGIN = 1.2
CROSS_ENTROPY_WEIGHT = 2.0  # the paper's lambda
STRIDE = 16  # of the last map

# The published names, for n strips: what makes p, r and the relation of both of one's own and of the rest's vector, and
# the classifiers of p, r and q.
LOCAL = (
    ("local_{}_conv_list", "rest_{}_conv_list", "relation_{}_conv_list"),
    ("fc_local_{}_list", "fc_rest_{}_list", "fc_local_rest_{}_list"),
)
GLOBAL = (
    ("global_{}_max_conv_list", "global_{}_rest_conv_list", "global_{}_pooling_conv_list"),
    ("fc_global_max_{}_list", "fc_global_rest_{}_list", "fc_global_{}_list"),
)


class RelationNet(ImageModel):
    """The relation network on any backbone, with any numbers of strips.

    The last map is cut into n strips of equal height, and part i is the maximum of strip i. A relation takes a vector
    and what there is besides, reduces either to `dim` numbers, p and r, and gives q = p + relation(p, r). Local q_i is
    that of part i and the mean of the other parts; global q_0 that of the maximum of the map and the contrast, which
    says what the parts hold besides that maximum (global contrastive pooling). No weights are shared. The descriptor
    joins the local q of all numbers of strips, in the order of `strips`, then the global ones.

    Heads.feats are what the triplet loss sees; Heads.logits are those of q, p and r of each relation in turn, or of q
    alone.

    Args:
        backbone: (B, 3, H, W) to a map (B, `backbone.channels`, H / 16, any width).
        strips: n, each >= 2 and unlike the others.
        num_classes: training ids; 0 for no classifiers.
        dim: length of a feature.
        form: whose way it is where paper and published code differ. Each of the following is `form` unless given:
        contrast: the paper's mean of the parts less the maximum, which is <= 0; the code's (sum of the parts - maximum)
            / (n - 1), which is >= 0.
        reduction: to p and r by the paper's 1x1 convolution alone; in the code BatchNorm and ReLU follow.
        cross_entropy: the paper's of q; the code's of q, p and r.
        triplet: the paper's of the descriptor; the code's of each q.
        relate: whether parts see the rest; otherwise q_i = p_i. contrastive: the same of the global maximum and the
            contrast. The paper's ablations.

    A convolution in front of BatchNorm has a bias, which changes nothing there and has no gradient but rounding: it is
    among the published parameters. Classifiers start as N(0, 0.001), their biases as 0, all else as torch makes it.

    Raises:
        ValueError: no strips, fewer than 2 or as many twice, num_classes below 0, another word for a form; when called,
            a height that is no multiple of 16 times each n, or in training mode fewer than 2 images.

    Source: as this file, eq. 1 and 2.
    """

    size = (384, 128)
    flip = True
    backbone = ("base.",)
    classifiers = ("fc_",)

    def __init__(
        self,
        backbone: nn.Module,
        strips: Sequence[int],
        num_classes: int = 0,
        *,
        dim: int = 256,
        form: Form = "official",
        contrast: Form | None = None,
        reduction: Form | None = None,
        cross_entropy: Form | None = None,
        triplet: Form | None = None,
        relate: bool = True,
        contrastive: bool = True,
    ) -> None:
        super().__init__()
        if not strips or min(strips) < 2 or len(set(strips)) < len(strips):
            raise ValueError(f"strips must be one or more different numbers of at least 2, got {tuple(strips)}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        asked = {"contrast": contrast, "reduction": reduction, "cross_entropy": cross_entropy, "triplet": triplet}
        ways = {name: form if way is None else way for name, way in asked.items()}
        for name, way in {"form": form, **ways}.items():
            if way not in get_args(Form):
                raise ValueError(f"{name} must be 'official' or 'paper', got {way!r}")
        self.strips = tuple(strips)
        self.contrast, self.triplet = ways["contrast"], ways["triplet"]
        self.base = backbone
        channels: Any = backbone.channels
        for n in self.strips:
            for (convs, classifiers), count, related in ((LOCAL, n, relate), (GLOBAL, 1, contrastive)):
                for i, (name, classifier) in enumerate(zip(convs, classifiers, strict=True)):
                    relates = i == 2
                    inputs, bare = (2 * dim, False) if relates else (channels, ways["reduction"] == "paper")
                    if related or i == 0:
                        self.add_module(name.format(n), nn.ModuleList(_reduce(inputs, dim, bare) for _ in range(count)))
                    if num_classes and (relates or related and ways["cross_entropy"] == "official"):
                        linears = (_classifier(dim, num_classes) for _ in range(count))
                        self.add_module(classifier.format(n), nn.ModuleList(linears))

    def last_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        multiple = STRIDE * math.lcm(*self.strips)
        if images.shape[2] % multiple or not images.shape[2]:
            raise ValueError(f"height must be a multiple of {multiple}, got {images.shape[2]}")
        if self.training and len(images) < 2:
            raise ValueError(f"images must be at least 2 in training mode, for BatchNorm, got {len(images)}")
        return (self.base(images),)

    def from_maps(self, maps: Sequence[Tensor]) -> Tensor | Heads:
        (last,) = maps
        rows, columns = last.shape[2:]
        most = F.max_pool2d(last, (rows, columns))
        local: list[tuple[Tensor, list[Tensor]]] = []
        whole: list[tuple[Tensor, list[Tensor]]] = []
        for n in self.strips:
            parts = F.max_pool2d(last, (rows // n, columns))  # (B, C, n, 1)
            total = parts.sum(2, keepdim=True)
            contrast = total / n - most if self.contrast == "paper" else (total - most) / (n - 1)
            local += self._relations(LOCAL, n, parts, (total - parts) / (n - 1))
            whole += self._relations(GLOBAL, n, most, contrast)
        feats = tuple(q for q, _ in local + whole)
        if not self.training:
            return torch.cat(feats, 1)
        logits = tuple(one for _, of_relation in local + whole for one in of_relation)
        return Heads((torch.cat(feats, 1),) if self.triplet == "paper" else feats, logits)

    def parts(self, maps: Sequence[Tensor]) -> dict[str, Part]:
        names = [f"strip {i + 1}/{n}" for n in self.strips for i in range(n)] + [f"global/{n}" for n in self.strips]
        feats = cast("Tensor", self.from_maps(maps)).chunk(len(names), 1)
        return {name: Part(0, q) for name, q in zip(names, feats, strict=True)}

    def _relations(
        self, names: tuple[tuple[str, ...], tuple[str, ...]], n: int, own: Tensor, rest: Tensor
    ) -> list[tuple[Tensor, list[Tensor]]]:
        """Of K vectors and what there is besides each, (B, C, K, 1): q (B, dim), and the logits of q, p and r."""
        convs, classifiers = names
        to_p, to_r, relate = (getattr(self, name.format(n), None) for name in convs)
        assert to_p is not None
        of_p, of_r, of_q = (getattr(self, name.format(n), None) for name in classifiers)
        found = []
        for i in range(own.shape[2]):
            q = r = p = to_p[i](own[:, :, i : i + 1])
            if to_r is not None and relate is not None:
                r = to_r[i](rest[:, :, i : i + 1])
                q = p + relate[i](torch.cat((p, r), 1))
            heads = ((of_q, q), (of_p, p), (of_r, r)) if self.training else ()
            logits = [classifier[i](x.flatten(1)) for classifier, x in heads if classifier is not None]
            found.append((q.flatten(1), logits))
        return found

    def loss(self, output: Heads, labels: Tensor) -> dict[str, Tensor]:
        """cross_entropy: twice the sum over classifiers. triplet: batch-hard, margin 1.2, the sum over Heads.feats.

        Args:
            output: of training mode. labels: (B,) int64 in [0, num_classes).

        Raises:
            TypeError: labels not int64. ValueError: another shape, a label outside the classes, a model without any.

        Source: as this file, eq. 3 to 6, with means in place of sums over samples; the margin is the code's.
        """
        triplets = [triplet_loss(feats, labels, margin=MARGIN) for feats in output.feats]
        self.check_classes(labels, output.logits[0].shape[1] if output.logits else 0)
        logits = torch.cat(output.logits)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        count = len(output.logits)
        entropy = F.cross_entropy(logits, labels.repeat(count)) * count  # a sum of means, in one call
        return {"cross_entropy": CROSS_ENTROPY_WEIGHT * entropy, "triplet": torch.stack(triplets).sum()}

    def of_backbone(self, key: str) -> tuple[str, ...]:
        return (f"base.{key}",)


def _reduce(inputs: int, outputs: int, bare: bool) -> nn.Sequential:
    """A 1x1 convolution, unless bare with BatchNorm and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 1)
    return nn.Sequential(conv) if bare else nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _classifier(dim: int, num_classes: int) -> nn.Linear:
    linear = nn.Linear(dim, num_classes)
    nn.init.normal_(linear.weight, std=0.001)
    nn.init.zeros_(linear.bias)
    return linear


def relation_s(
    num_classes: int = 0,
    *,
    form: Form = "official",
    contrast: Form | None = None,
    reduction: Form | None = None,
    cross_entropy: Form | None = None,
    triplet: Form | None = None,
    relate: bool = True,
    contrastive: bool = True,
) -> RelationNet:
    """The paper's Ours-S, on ResNet-50 with 6 strips: 1,792 numbers.

    31,781,696 parameters without classifiers, 6.1 GMAC for 384 x 128 pixels. The height must be a multiple of 96.
    See RelationNet.
    """
    return RelationNet(
        ResNet(50, last_stride=1),
        (6,),
        num_classes,
        form=form,
        contrast=contrast,
        reduction=reduction,
        cross_entropy=cross_entropy,
        triplet=triplet,
        relate=relate,
        contrastive=contrastive,
    )


def relation_f(
    num_classes: int = 0,
    *,
    form: Form = "official",
    contrast: Form | None = None,
    reduction: Form | None = None,
    cross_entropy: Form | None = None,
    triplet: Form | None = None,
    relate: bool = True,
    contrastive: bool = True,
) -> RelationNet:
    """The paper's Ours-F, on ResNet-50 with 6, 4 and 2 strips: 3,840 numbers.

    41,237,312 parameters without classifiers, 6.1 GMAC for 384 x 128 pixels. The height must be a multiple of 192.
    See RelationNet.
    """
    return RelationNet(
        ResNet(50, last_stride=1),
        (6, 4, 2),
        num_classes,
        form=form,
        contrast=contrast,
        reduction=reduction,
        cross_entropy=cross_entropy,
        triplet=triplet,
        relate=relate,
        contrastive=contrastive,
    )
