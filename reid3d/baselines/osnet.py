"""OSNet x1.0, without the embedding and the classifier, under torchreid's key names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 256, 384, 512)  # channels behind the stem and each stage
REDUCTION = 16  # of channels, within a gate


class ConvNorm(nn.Module):
    """A convolution of the same padding, a norm, and, unless linear, a ReLU."""

    def __init__(self, inputs: int, outputs: int, side: int = 1, stride: int = 1, *, linear: bool = False) -> None:
        super().__init__()
        self.linear = linear
        self.conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.linear else F.relu(x, inplace=True)


class LiteConv(nn.Module):
    """A 3x3 convolution in two: one across channels, 1x1, and one within each, and only then a norm and a ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv2(self.conv1(x))), inplace=True)


class Gate(nn.Module):
    """Each channel times a number in (0, 1), which two layers make of the means of all channels, or, unless pooled,
    at each pixel of its own channels.
    """

    def __init__(self, channels: int, *, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        self.fc1 = nn.Conv2d(channels, channels // REDUCTION, 1)
        self.fc2 = nn.Conv2d(channels // REDUCTION, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        of = x.mean((2, 3), keepdim=True) if self.pooled else x
        return x * self.fc2(F.relu(self.fc1(of), inplace=True)).sigmoid()


class OSBlock(nn.Module):
    """Four streams of one to four lite convolutions, so of as many scales, each through one and the same gate, summed,
    between two 1x1 convolutions; and a short-cut.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        width = outputs // 4
        self.conv1 = ConvNorm(inputs, width)
        self.conv2a = LiteConv(width)
        self.conv2b = nn.Sequential(*(LiteConv(width) for _ in range(2)))
        self.conv2c = nn.Sequential(*(LiteConv(width) for _ in range(3)))
        self.conv2d = nn.Sequential(*(LiteConv(width) for _ in range(4)))
        self.gate = Gate(width)
        self.conv3 = ConvNorm(width, outputs, linear=True)
        self.downsample = None if inputs == outputs else ConvNorm(inputs, outputs, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        a, b, c, d = (self.gate(stream(y)) for stream in (self.conv2a, self.conv2b, self.conv2c, self.conv2d))
        short = x if self.downsample is None else self.downsample(x)
        return F.relu(self.conv3(a + b + c + d) + short, inplace=True)


class OSNet(nn.Module):
    """Images (B,3,H,W) to features (B,512,H/16,W/16), for H and W of multiples of 16.

    Key names and shapes are those of torchreid's `osnet_x1_0` files less `fc.*` and `classifier.*`; weights start as
    torchreid's do: convolutions Kaiming normal by fan-out, their biases 0.

    Source: Zhou et al., "Omni-Scale Feature Learning for Person Re-Identification", 2019, fig. 4 and table 1;
    KaiyangZhou/deep-person-reid, ``osnet.py``.
    """

    channels = WIDTHS[-1]  # of the features

    def __init__(self) -> None:
        super().__init__()
        stem, *widths = WIDTHS
        self.conv1 = ConvNorm(3, stem, 7, 2)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = _stage(stem, widths[0], halved=True)
        self.conv3 = _stage(widths[0], widths[1], halved=True)
        self.conv4 = _stage(widths[1], widths[2], halved=False)
        self.conv5 = ConvNorm(widths[2], widths[2])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(x))
        return self.conv5(self.conv4(self.conv3(self.conv2(x))))


def _stage(inputs: int, outputs: int, *, halved: bool) -> nn.Sequential:
    """Two blocks and, if halved, a transition: a 1x1 convolution, and means of 2x2 pixels."""
    blocks = OSBlock(inputs, outputs), OSBlock(outputs, outputs)
    if not halved:
        return nn.Sequential(*blocks)
    return nn.Sequential(*blocks, nn.Sequential(ConvNorm(outputs, outputs), nn.AvgPool2d(2, 2)))
