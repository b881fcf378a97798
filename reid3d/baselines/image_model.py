"""What the 2D methods have in common: what they take, and what they hand to their losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..models.head import Output

Form = Literal["official", "paper"]  # where paper and published code differ, whose way it is
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of R, G, B


class Heads(NamedTuple):
    """What a 2D method returns in training mode. feats: what its metric losses see, (B, D) each; logits: (B,
    num_classes) of each classifier, none without classes.
    """

    feats: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]


class Part(NamedTuple):
    """A part of a descriptor. map: which of the last maps it is of; feats: (B, d), but for their length."""

    map: int
    feats: Tensor


class ImageModel(nn.Module):
    """A method of crops. A subclass says in ``last_maps`` and ``from_maps`` what it makes of them, and in ``parts``
    what its descriptor is made of.

    Where it has its own losses it has ``loss``, of what it returns in training mode and labels (B,) int64 in [0,
    num_classes): the terms whose sum is minimised, weighted, by name. Otherwise it returns `models.Output`, and learns
    by the losses of the config.

    size: height and width in pixels, at first those it was published with. resample: how crops are brought to it,
    "bilinear" or "bicubic". flip: whether the descriptor is the mean of those of the image and of its mirror image.
    normalised: whether pixels are brought to ImageNet's mean and deviation first. backbone: prefixes of the names of
    the parameters that begin as those of a classifier of ImageNet, and may learn more slowly. classifiers: prefixes of
    the names in the state dict that depend on the people of the training.
    """

    inputs = "image"
    size: tuple[int, int] = (256, 128)
    resample = "bilinear"
    flip = False
    normalised = True
    backbone: tuple[str, ...] = ()
    classifiers: tuple[str, ...] = ()

    def forward(self, images: Tensor) -> Tensor | Heads | Output:
        """Describe B crops.

        Args:
            images: (B, 3, H, W) RGB in [0, 1], of floating point.

        Returns:
            In eval mode feats (B, D), compared by cosine; in training mode, where B >= 2, Heads, or Output.

        Raises:
            TypeError: not floating point. ValueError: another shape, or a size that the method cannot divide.
        """
        return self.describe(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """The crops as ``describe`` takes them. Arguments and errors as of ``forward``."""
        if not images.is_floating_point():
            raise TypeError(f"images must be of floating point, in [0, 1], got {images.dtype}")
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
        if self.normalised:
            mean, std = (torch.tensor(values).to(images).view(3, 1, 1) for values in IMAGENET)
            images = (images - mean) / std
        return images

    def describe(self, images: Tensor) -> Tensor | Heads | Output:
        """As ``forward``, of normalised crops."""
        return self.from_maps(self.last_maps(images))

    def last_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The last maps (B, C, h, w) of normalised crops, one or more, behind which no position sees another."""
        raise NotImplementedError

    def from_maps(self, maps: Sequence[Tensor]) -> Tensor | Heads | Output:
        """As ``forward``, of the last maps."""
        raise NotImplementedError

    def parts(self, maps: Sequence[Tensor]) -> dict[str, Part]:
        """The parts of the descriptor in eval mode, by name, in their order: where it brings them to some length, as
        they are before.
        """
        raise NotImplementedError

    def check_classes(self, labels: Tensor, num_classes: int) -> None:
        """Raises: ValueError: no classes to learn, or a label outside them."""
        if not num_classes:
            raise ValueError("num_classes must be at least 1 for a loss, got 0")
        outside = labels[(labels < 0) | (labels >= num_classes)]
        if len(outside):
            raise ValueError(f"labels must be in [0, {num_classes}), got {outside[0].item()}")

    def of_backbone(self, key: str) -> tuple[str, ...]:
        """The names in the state dict that begin as the tensor ``key`` of a published backbone; none if unused."""
        raise NotImplementedError
