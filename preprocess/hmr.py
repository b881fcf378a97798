"""The embedded regressor: a small residual network with HMR's iterative error feedback.

Source: Kanazawa et al., "End-to-end Recovery of Human Shape and Pose", 2018, section 3.2: features of the image and the
current parameters go through two hidden layers whose output is added to the parameters, three times, starting from the
mean. Departures: a 1.5 M parameter backbone at 128x64 pixels, features pooled to 4x2 cells instead of one, and the 6-D
rotations of SPIN (Kolotouros et al., 2019).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .body import NUM_BETAS, NUM_JOINTS, rotation_6d_to_matrix

POSE = NUM_JOINTS * 6
PARAMETERS = POSE + NUM_BETAS + 3
INPUT_SIZE = (128, 64)


class Regressed(NamedTuple):
    """rotmats (B,24,3,3), betas (B,10), cam (B,3): a body and its weak-perspective camera."""

    rotmats: Tensor
    betas: Tensor
    cam: Tensor


class Residual(nn.Module):
    """Two 3x3 convolutions and a short-cut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(y + self.short(x), inplace=True)


class Regressor(nn.Module):
    """Images (B,3,128,64) in [-1,1] to body and camera parameters, by three corrections of the mean."""

    mean: Tensor

    def __init__(self, width: int = 16, reduced: int = 96, hidden: int = 512, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations
        blocks: list[nn.Module] = [
            nn.Conv2d(3, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
        for stage in range(4):
            outputs = width << stage
            blocks += [Residual(channels, outputs, 1 if stage == 0 else 2), Residual(outputs, outputs, 1)]
            channels = outputs
        self.backbone = nn.Sequential(*blocks)
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.pool = nn.AdaptiveAvgPool2d((4, 2))
        self.hidden1 = nn.Linear(reduced * 8 + PARAMETERS, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.correction = nn.Linear(hidden, PARAMETERS)
        nn.init.normal_(self.correction.weight, std=0.002)  # the first guess is the mean, nearly unchanged
        nn.init.zeros_(self.correction.bias)
        self.register_buffer("mean", torch.zeros(PARAMETERS))

    def fold(self) -> "Regressor":
        """Fold every BatchNorm into the convolution before it: for eval mode, to be trained no more."""
        self.eval()
        layers: Any = self.backbone
        layers[0], layers[1] = fuse_conv_bn_eval(layers[0], layers[1]), nn.Identity()
        for block in layers[3:]:
            block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
            block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
            if isinstance(block.short, nn.Sequential):
                block.short = fuse_conv_bn_eval(*block.short)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the faster layout
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        return self

    def features(self, x: Tensor) -> Tensor:
        """Features (B,8*reduced) of images (B,3,128,64)."""
        return self.pool(F.relu(self.reduce(self.backbone(x)))).flatten(1)

    def forward(self, x: Tensor) -> Regressed:
        return self.regress(self.features(x))

    def regress(self, features: Tensor) -> Regressed:
        """The three corrections, from the features of an image."""
        parameters = self.mean.expand(len(features), -1)
        for _ in range(self.iterations):
            hidden = F.relu(self.hidden1(torch.cat([features, parameters], 1)))
            parameters = parameters + self.correction(F.relu(self.hidden2(hidden)))
        pose, betas, cam = parameters.split([POSE, NUM_BETAS, 3], 1)
        return Regressed(rotation_6d_to_matrix(pose.view(-1, NUM_JOINTS, 3, 2)), betas, cam)
