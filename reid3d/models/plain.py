"""Networks of images as plain as can be: a backbone, the mean of its last map, and the head of the networks of clouds.

Source: Zheng et al., "Parameter-Efficient Person Re-identification in the 3D Space", TNNLS 2022, table II, whose
ResNet-50 has the head of layumi/Person_reID_baseline_pytorch. OSNet stands for its light 2D networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..baselines.image_model import ImageModel, Part
from ..baselines.osnet import OSNet
from ..baselines.resnet import ResNet
from .head import Head, Output


class PlainNet(ImageModel):
    """A backbone -> mean over the map -> Linear -> BatchNorm = descriptor; dropout -> classifier.

    It learns by the losses of the config, as the networks of clouds do. Weights start as those of its parts.

    Args:
        backbone: makes a module, (B, 3, H, W) to a map (B, `backbone.channels`, h, w).
        num_classes: training ids; 0 for no classifier.
        dim: length of the descriptor.
        dropout: probability, in front of the classifier.

    Raises: ValueError: num_classes below 0.
    """

    backbone = ("base.",)
    classifiers = ("head.classifier.",)

    def __init__(self, backbone: Any, num_classes: int = 0, *, dim: int = 512, dropout: float = 0.5) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        self.base: nn.Module = backbone()
        channels: Any = self.base.channels
        self.head = Head(channels, dim, num_classes, dropout, bias=True)

    def last_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.base(images),)

    def from_maps(self, maps: Sequence[Tensor]) -> Tensor | Output:
        found: Tensor | Output = self.head(maps[0].mean((2, 3)))
        return found

    def parts(self, maps: Sequence[Tensor]) -> dict[str, Part]:
        return {"whole": Part(0, self.head(maps[0].mean((2, 3))))}

    def of_backbone(self, key: str) -> tuple[str, ...]:
        return (f"base.{key}",)


resnet50 = partial(PlainNet, partial(ResNet, 50))  # 24,558,144 parameters without the classifier, the paper's 24.56 M
osnet = partial(PlainNet, OSNet)
