"""RMGL: stripes of several heights at once, from the map of the whole image and from maps of its strips alone.

Source: Wang et al., "Receptive Multi-granularity Representation for Person Re-Identification", TIP 2020. No code was
published: what the paper leaves open is a keyword where two readings make sense, and said where it is decided.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import triplet_loss
from .image_model import Heads, ImageModel, Part
from .resnet import BLOCKS, Bottleneck

MARGIN = 0.6
STRIDE = 16  # of the last map: layer4 keeps the size


def activation_balanced_pool(maps: Tensor, parts: int, pool: Literal["max", "mean"] = "max") -> Tensor:
    """Pool each map in horizontal strips that hold about as many of its channels' maxima, whatever their heights.

    The maximum of a channel counts in the row where it lies, the first of equals; channels that are nowhere above 0 do
    not count. Strip k of K ends below the last row up to which at most ceil(k / K * counted) maxima lie, but each has a
    row at least. Maps in which nothing counts are cut into equal strips (rows k * H // K). Where the strips end passes
    no gradient.

    Args:
        maps: (N, C, H, W) of floating point, finite, C, H, W >= 1.
        parts: K, in [1, H].
        pool: what is taken of a strip, for each channel.

    Returns: (N, C, K), from the top.

    Raises:
        TypeError: maps not of floating point. ValueError: another shape, parts outside [1, H], another pool.

    Source: as this file, sec. III-C. Eq. 10 bounds counts by ceil(k / C * K), which has no meaning for K < C, and is
    read as above. Eq. 11 is a mean, but the text calls for maxima, which heads trained on maxima expect too.
    """
    if not maps.is_floating_point():
        raise TypeError(f"maps must be of floating point, got {maps.dtype}")
    if maps.dim() != 4 or 0 in maps.shape[1:]:
        raise ValueError(f"maps must be (N, C, H, W) with C, H, W >= 1, got {tuple(maps.shape)}")
    height = maps.shape[2]
    if not 1 <= parts <= height:
        raise ValueError(f"parts must be in [1, {height}], as maps have rows, got {parts}")
    if pool not in ("max", "mean"):
        raise ValueError(f"pool must be 'max' or 'mean', got {pool!r}")
    rows = maps.amax(3)
    ends = _balanced_ends(rows, parts)
    strip = (torch.arange(height, device=maps.device).view(1, 1, -1) >= ends.unsqueeze(2)).sum(1)  # (N, H)
    inside = strip.unsqueeze(1) == torch.arange(parts, device=maps.device).view(1, -1, 1)  # (N, K, H)
    if pool == "max":
        return torch.stack([rows.masked_fill(~part.unsqueeze(1), -math.inf).amax(2) for part in inside.unbind(1)], 2)
    inside = inside.to(maps.dtype)
    return maps.mean(3) @ (inside / inside.sum(2, keepdim=True)).transpose(1, 2)


def _balanced_ends(rows: Tensor, parts: int) -> Tensor:
    """Of row-wise maxima (N, C, H): the rows (N, K - 1) at which the strips but the last end."""
    height = rows.shape[2]
    peak, row = rows.max(2)
    upto = torch.zeros_like(rows[:, 0], dtype=torch.int64).scatter_add_(1, row, (peak > 0).long()).cumsum(1)
    total = upto[:, -1:]
    inner = torch.arange(1, parts, device=rows.device)
    most = -(-inner * total // parts)  # rounded up
    ends = (upto.unsqueeze(1) <= most.unsqueeze(2)).sum(2)
    ends = torch.where(total > 0, ends, inner * height // parts)
    # A row at least for each strip: less their number, ends need only not fall.
    return (ends - inner).cummax(1).values.clamp(0, height - parts) + inner


class RMGL(ImageModel):
    """RMGL with branches of any granularity on a ResNet with bottleneck blocks.

    conv1 to layer1 are shared, layer2 to layer4 are of each branch. A branch of K parts sees the map of layer1 twice:
    as it is (the original path), and cut into K strips, each seen alone, by the same weights, and its maps stacked
    again (the receptive path). Either path gives a global and K local maxima of its last map, each with a linear layer
    of its own (a 1x1 convolution of one pixel), BatchNorm, and, in training, a classifier. A branch of one part is
    the paper's global branch: the global maximum of the original path, with which the others would coincide.

    Args:
        num_classes: training ids; 0 for no classifiers.
        partitions: K of each branch, >= 1.
        receptive: whether there is a receptive path.
        receptive_global: whether it has a global feature.
        abp: when strips are by `activation_balanced_pool`, and not of equal heights.
        abp_pool: what that takes of a strip; equal ones always give maxima.
        abp_receptive: whether that holds for the receptive path, or its strips are pooled as they were cut.
        blocks: of layer1 to layer4. width: of layer1; the last map has 32 times as many channels.
        dim: length of a feature.

    The descriptor joins the features of all branches, each with those of its original path first, global before local.
    Heads.feats are those of each branch, joined, and Heads.logits those of each feature. Convolutions start as in
    ResNet, all else as torch makes it; the paper starts them from ImageNet.

    Raises:
        TypeError: a partition that is no int. ValueError: none, one below 1, num_classes below 0, another word for abp
            or abp_pool; when called, a height that is no multiple of 16 and of 16 times each K.

    Source: as this file, sec. III.
    """

    size = (384, 128)
    flip = True
    backbone = ("stem.", "branches.")
    classifiers = ("heads.",)

    def __init__(
        self,
        num_classes: int = 0,
        partitions: Sequence[int] = (2, 3),
        *,
        receptive: bool = True,
        receptive_global: bool = True,
        abp: Literal["off", "test", "both"] = "test",
        abp_pool: Literal["max", "mean"] = "max",
        abp_receptive: bool = True,
        blocks: Sequence[int] = BLOCKS[50],
        width: int = 64,
        dim: int = 256,
    ) -> None:
        super().__init__()
        for parts in partitions:
            if not isinstance(parts, int):
                raise TypeError(f"partitions must be ints, got {parts!r}")
        if not partitions or min(partitions) < 1:
            raise ValueError(f"partitions must be one or more numbers of at least 1, got {tuple(partitions)}")
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        if abp not in ("off", "test", "both"):
            raise ValueError(f"abp must be 'off', 'test' or 'both', got {abp!r}")
        if abp_pool not in ("max", "mean"):
            raise ValueError(f"abp_pool must be 'max' or 'mean', got {abp_pool!r}")
        self.partitions = tuple(partitions)
        self.receptive, self.receptive_global = receptive, receptive_global
        self.abp, self.abp_pool, self.abp_receptive = abp, abp_pool, abp_receptive

        def layer(stage: int, inputs: int, stride: int) -> nn.Sequential:
            inner = width << (stage - 1)
            rest = [Bottleneck(4 * inner, inner) for _ in range(blocks[stage - 1] - 1)]
            return nn.Sequential(Bottleneck(inputs, inner, stride), *rest)

        self.stem = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, width, 7, 2, 3, bias=False),
                bn1=nn.BatchNorm2d(width),
                relu=nn.ReLU(inplace=True),
                maxpool=nn.MaxPool2d(3, 2, 1),
                layer1=layer(1, width, 1),
            )
        )
        self.branches = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    layer2=layer(2, 4 * width, 2), layer3=layer(3, 8 * width, 2), layer4=layer(4, 16 * width, 1)
                )
            )
            for _ in self.partitions
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        features = sum(map(self._features, self.partitions))
        self.reductions = nn.ModuleList(
            nn.Sequential(nn.Linear(32 * width, dim, bias=False), nn.BatchNorm1d(dim)) for _ in range(features)
        )
        self.heads = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(features if num_classes else 0))

    def _features(self, parts: int) -> int:
        """How many a branch gives."""
        if parts == 1:
            return 1
        return 1 + parts + (self.receptive_global + parts if self.receptive else 0)

    def last_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """Of each branch that of its original path, and that of its receptive path, if it has one."""
        multiple = STRIDE * math.lcm(*self.partitions)
        if images.shape[2] % multiple or not images.shape[2]:
            raise ValueError(f"height must be a multiple of {multiple}, got {images.shape[2]}")
        shared = self.stem(images)
        maps = []
        for parts, branch in zip(self.partitions, self.branches, strict=True):
            maps.append(branch(shared))
            if parts > 1 and self.receptive:
                maps.append(torch.cat(branch(torch.cat(shared.chunk(parts, 2))).chunk(parts), 2))
        return tuple(maps)

    def from_maps(self, maps: Sequence[Tensor]) -> Tensor | Heads:
        branches = [list(of_branch.values()) for of_branch in self._features_of(maps)]
        every = [part.feats for of_branch in branches for part in of_branch]
        if not self.training:
            return torch.cat(every, 1)
        logits = tuple(head(feat) for head, feat in zip(self.heads, every, strict=False))  # no heads without classes
        return Heads(tuple(torch.cat([part.feats for part in of_branch], 1) for of_branch in branches), logits)

    def parts(self, maps: Sequence[Tensor]) -> dict[str, Part]:
        return {name: part for of_branch in self._features_of(maps) for name, part in of_branch.items()}

    def _features_of(self, maps: Sequence[Tensor]) -> list[dict[str, Part]]:
        """Of each branch its features by name."""
        balanced = self.abp == "both" or (self.abp == "test" and not self.training)
        reductions, numbered = iter(self.reductions), iter(enumerate(maps))
        found = []
        for branch, parts in enumerate(self.partitions, 1):
            of = f"{parts}" if self.partitions.count(parts) == 1 else f"{parts} of branch {branch}"
            features: dict[str, Part] = {}
            for path in ("", "receptive ") if parts > 1 and self.receptive else ("",):
                i, last = next(numbered)
                pooled = {f"{path}global/{of}": last.amax((2, 3))} if not path or self.receptive_global else {}
                if parts > 1:
                    strips = self._strips(last, parts, balanced and (not path or self.abp_receptive))
                    pooled |= {f"{path}strip {k}/{of}": strip for k, strip in enumerate(strips, 1)}
                features |= {name: Part(i, next(reductions)(x)) for name, x in pooled.items()}
            found.append(features)
        return found

    def _strips(self, maps: Tensor, parts: int, balanced: bool) -> tuple[Tensor, ...]:
        """(B, C) of each strip, from the top."""
        if balanced:
            return activation_balanced_pool(maps, parts, self.abp_pool).unbind(2)
        return maps.unflatten(2, (parts, -1)).amax((3, 4)).unbind(2)

    def loss(self, output: Heads, labels: Tensor) -> dict[str, Tensor]:
        """cross_entropy: the sum over features. triplet: batch-hard, margin 0.6, the sum over branches.

        Args:
            output: of training mode. labels: (B,) int64 in [0, num_classes).

        Raises: TypeError, ValueError: as `triplet_loss`; ValueError: a label outside the classes, a model without any.

        Source: as this file, eq. 2 to 4, with means in place of sums over samples, and without eq. 3's leading minus,
        which would push people together.
        """
        triplets = [triplet_loss(feats, labels, margin=MARGIN) for feats in output.feats]
        self.check_classes(labels, output.logits[0].shape[1] if output.logits else 0)
        # Wide, for under autocast logits are of half precision.
        wide = [logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in output.logits]
        entropies = [F.cross_entropy(logits, labels) for logits in wide]
        return {"cross_entropy": torch.stack(entropies).sum(), "triplet": torch.stack(triplets).sum()}

    def of_backbone(self, key: str) -> tuple[str, ...]:
        layer = key.partition(".")[0]
        if layer in ("conv1", "bn1", "layer1"):
            return (f"stem.{key}",)
        if layer in ("layer2", "layer3", "layer4"):
            return tuple(f"branches.{i}.{key}" for i in range(len(self.partitions)))
        return ()


def rmgl(
    num_classes: int = 0,
    *,
    partitions: Sequence[int] = (2, 3),
    receptive: bool = True,
    receptive_global: bool = True,
    abp: Literal["off", "test", "both"] = "test",
    abp_pool: Literal["max", "mean"] = "max",
    abp_receptive: bool = True,
) -> RMGL:
    """RMGL on ResNet-50: 3,584 numbers, 54.1 M parameters without classifiers; 22.0 GMAC for 384 x 128 pixels.

    The paper compares partitions (2,), (3,), (2, 3), (1, 2, 3) and (2, 3, 4), without its receptive path and its
    activation balanced pooling too; its random shifting is `reid3d.data.image_transforms.random_shift`. See RMGL.
    """
    return RMGL(
        num_classes,
        partitions,
        receptive=receptive,
        receptive_global=receptive_global,
        abp=abp,
        abp_pool=abp_pool,
        abp_receptive=abp_receptive,
    )
