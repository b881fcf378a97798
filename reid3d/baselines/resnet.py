"""ResNets with bottleneck blocks, without the classifier, under torchvision's key names."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # of each stage, by depth


class IBN(nn.Module):
    """Instance norm of the first half of the channels, batch norm of the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.instances = channels // 2
        self.IN = nn.InstanceNorm2d(self.instances, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.instances)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.IN(x[:, : self.instances]), self.BN(x[:, self.instances :])), dim=1)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the 3x3 with the stride, the last to 4 x width channels, and a short-cut.

    With ibn "a" the first norm is an IBN; with "b" the sum of both ways is instance-normalised.
    """

    EXPANSION = 4

    def __init__(self, inputs: int, width: int, stride: int = 1, ibn: Literal["a", "b"] | None = None) -> None:
        super().__init__()
        outputs = width * self.EXPANSION
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = IBN(width) if ibn == "a" else nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            None
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )
        self.IN = nn.InstanceNorm2d(outputs, affine=True) if ibn == "b" else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        short = x if self.downsample is None else self.downsample(x)
        y = self.bn3(self.conv3(y)) + short
        return F.relu(y if self.IN is None else self.IN(y), inplace=True)


class ResNet(nn.Module):
    """Images (B,3,H,W) to features (B,channels,H/32,W/32), or twice as high and wide with last_stride 1, rounded up.

    Key names and shapes are those of torchvision's files less `fc.*`, or with `ibn` those of IBN-Net's; weights start
    as torchvision's do. `channels` is 2048, or with fewer stages the width of the last.

    Args:
        depth: 50, 101 or 152.
        last_stride: of layer4, 1 or 2; re-identification mostly takes 1.
        ibn: "a" makes the first norm of the blocks of layer1 to layer3 half an instance norm; "b" instance-normalises
            what the stem convolves and what layer1 and layer2 return, before the ReLU. There are published weights of
            either for 50 and 101 layers; 152 is built by the same rule, for training from nothing.
        stages: how many of the four to build, from the first; the features are those of the last one built, at 1/4 of
            the image's height and width after one, 1/8 after two and 1/16 after three.

    Raises:
        ValueError: another depth, stride, ibn or number of stages.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, table 1; the stride stands in the 3x3
    convolutions instead of the first 1x1, as in torchvision ("v1.5"). Pan et al., "Two at Once: Enhancing Learning and
    Generalization Capacities via IBN-Net", 2018, and XingangPan/IBN-Net, ``ibnnet/resnet_ibn.py``.
    """

    channels = 512 * Bottleneck.EXPANSION  # of the features
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(
        self, depth: int = 50, last_stride: int = 2, ibn: Literal["a", "b"] | None = None, stages: int = 4
    ) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride must be 1 or 2, got {last_stride}")
        if ibn not in (None, "a", "b"):
            raise ValueError(f"ibn must be 'a', 'b' or None, got {ibn!r}")
        if stages not in (1, 2, 3, 4):
            raise ValueError(f"stages must be 1, 2, 3 or 4, got {stages}")
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.InstanceNorm2d(64, affine=True) if ibn == "b" else nn.BatchNorm2d(64)
        self.stages = tuple(f"layer{stage + 1}" for stage in range(stages))
        inputs = 64
        strides = (1, 2, 2, last_stride)
        for stage, name in enumerate(self.stages):
            width, blocks = 64 << stage, BLOCKS[depth][stage]
            layer = nn.Sequential()
            for block in range(blocks):
                normed = stage < 3 if ibn == "a" else stage < 2 and block == blocks - 1
                layer.append(Bottleneck(inputs, width, strides[stage] if block == 0 else 1, ibn if normed else None))
                inputs = width * Bottleneck.EXPANSION
            self.add_module(name, layer)
        self.channels = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """The last feature map of images."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)
