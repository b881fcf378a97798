"""ResNets with bottleneck blocks, without the classifier, under torchvision's key names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # of each stage, by depth


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the 3x3 with the stride, the last to 4 x width channels, and a short-cut."""

    EXPANSION = 4

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = width * self.EXPANSION
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            None
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        short = x if self.downsample is None else self.downsample(x)
        return F.relu(self.bn3(self.conv3(y)) + short, inplace=True)


class ResNet(nn.Module):
    """Images (B,3,H,W) to features (B,2048,H/32,W/32), or (B,2048,H/16,W/16) with last_stride 1, rounded up.

    Key names and shapes are those of torchvision's files less `fc.*`; weights start as torchvision's do.

    Args:
        depth: 50, 101 or 152.
        last_stride: of layer4, 1 or 2; re-identification mostly takes 1.

    Raises:
        ValueError: another depth or stride.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, table 1; the stride stands in the 3x3
    convolutions instead of the first 1x1, as in torchvision ("v1.5").
    """

    channels = 512 * Bottleneck.EXPANSION  # of the features
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, depth: int = 50, last_stride: int = 2) -> None:
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride must be 1 or 2, got {last_stride}")
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, (blocks, stride) in enumerate(zip(BLOCKS[depth], (1, 2, 2, last_stride), strict=True)):
            width = 64 << stage
            outputs = width * Bottleneck.EXPANSION
            rest = [Bottleneck(outputs, width) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(Bottleneck(inputs, width, stride), *rest))
            inputs = outputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """The last feature map of images."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x)
