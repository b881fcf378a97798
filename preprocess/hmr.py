"""The embedded regressor: a small residual network that sees joints and a silhouette, and HMR's error feedback.

Source: Kanazawa et al., "End-to-end Recovery of Human Shape and Pose", 2018, section 3.2: features of the image and the
current parameters go through two hidden layers whose output is added to the parameters, three times, starting from the
mean. Departures: a small backbone at 128x64 pixels; features of 4x2 cells instead of one, and beside them those of
where each joint may be, weighted by its map (as the part attention of PARE, Kocabas et al., 2021, but the maps are of
joints, whose means are 2-D joints as in Sun et al., "Integral Human Pose Regression", 2018); each correction is told
how far the joints of the body so far are from those that are seen; clothes; and the 6-D rotations of SPIN (Kolotouros
et al., 2019).
"""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .body import CLOTHES, NUM_BETAS, NUM_JOINTS, load_body, rotation_6d_to_matrix
from .camera import project_joints

POSE = NUM_JOINTS * 6
BETAS = NUM_BETAS + len(CLOTHES)
PARAMETERS = POSE + BETAS + 3
INPUT_SIZE = (128, 64)
STEM, WIDTHS, DEPTHS = 16, (32, 64, 128, 192), (2, 2, 3, 2)  # channels, of the stages too, and their blocks
FINE, REDUCED, HIDDEN = 48, 64, 512
ITERATIONS = 3
LOUD = 5.0  # how much a distance from what is seen counts beside a parameter, to begin with


class Regressed(NamedTuple):
    """rotmats (B,24,3,3), betas (B,10), or (B,15) with clothes, cam (B,3): a body and its weak-perspective camera."""

    rotmats: Tensor
    betas: Tensor
    cam: Tensor

    def select(self, index: Tensor) -> "Regressed":
        return Regressed(*(part[index] for part in self))


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


class Seen(NamedTuple):
    """What the network sees in a crop, beside the body: where something is, not what it must be.

    mask (B,64,32): logits of the silhouette of a body with its clothes, as if nothing stood before it. joints2d
    (B,24,2): in half crop heights from the crop's centre. spread (B,24): how unsure each is, in the same lengths. maps
    (B,24,32*16): logits of where each is, row by row.
    """

    mask: Tensor
    joints2d: Tensor
    spread: Tensor
    maps: Tensor


class Regressor(nn.Module):
    """Images (B,3,128,64) in [-1,1] to body and camera, by three corrections of the mean, and to what is seen.

    trust: (5,) weights of what speaks for a fit, see fit.py.
    """

    mean: Tensor
    trust: Tensor
    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs in ((3, STEM), (STEM, WIDTHS[0])):
            blocks += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*blocks)
        channels, stages = WIDTHS[0], []
        for i, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
            first = Residual(channels, width, 1 if i == 0 else 2)
            stages.append(nn.Sequential(first, *(Residual(width, width, 1) for _ in range(depth - 1))))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.lateral = nn.ModuleList(nn.Conv2d(width, FINE, 1) for width in WIDTHS)
        self.smooth = nn.Conv2d(FINE, FINE, 3, 1, 1)
        self.maps = nn.Conv2d(FINE, NUM_JOINTS + 4, 1)  # of the joints, and of the mask at twice the resolution
        self.reduce = nn.Conv2d(channels, REDUCED, 1)
        rows, columns = INPUT_SIZE[0] // 4, INPUT_SIZE[1] // 4
        features = REDUCED * (rows // 8) * (columns // 8) + NUM_JOINTS * (FINE + 3)
        self.norm = nn.BatchNorm1d(features)
        self.hidden0 = nn.Linear(features, HIDDEN)
        self.hidden1 = nn.Linear(PARAMETERS + NUM_JOINTS * 2, HIDDEN, bias=False)
        self.hidden2 = nn.Linear(HIDDEN, HIDDEN)
        self.correction = nn.Linear(HIDDEN, PARAMETERS)
        nn.init.normal_(self.correction.weight, std=0.002)  # the first guess is the mean, nearly unchanged
        nn.init.zeros_(self.correction.bias)
        self.skeleton = deepcopy(load_body("low"))
        self.register_buffer("mean", torch.zeros(PARAMETERS))
        self.register_buffer("trust", torch.zeros(5))
        y, x = ((2 * torch.arange(side) + 1 - side) / rows for side in (rows, columns))
        grid = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], -1)
        self.register_buffer("grid", grid.reshape(-1, 2), persistent=False)  # (P,2), in half crop heights

    def fold(self) -> "Regressor":
        """Fold every BatchNorm into the convolution before it: for eval mode, to be trained no more."""
        self.eval()
        stem: Any = self.stem
        for i in (0, 3):
            stem[i], stem[i + 1] = fuse_conv_bn_eval(stem[i], stem[i + 1]), nn.Identity()
        for block in [module for module in self.modules() if isinstance(module, Residual)]:
            folded: Any = block
            folded.conv1, folded.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
            folded.conv2, folded.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
            if isinstance(block.short, nn.Sequential):
                folded.short = fuse_conv_bn_eval(*block.short)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # the faster layout
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        return self

    def maps_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of images (B,3,128,64): coarse features (B,F), fine ones (B,FINE,32,16) and maps (B,24+4,32,16)."""
        levels = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        fine = self.lateral[-1](x)
        for level, lateral in zip(levels[-2::-1], list(self.lateral)[-2::-1], strict=True):
            fine = lateral(level) + F.interpolate(fine, scale_factor=2.0)
        fine = F.relu(self.smooth(F.relu(fine)))
        return F.relu(self.reduce(x)).flatten(1), fine, self.maps(fine)

    def read(self, coarse: Tensor, fine: Tensor, maps: Tensor) -> tuple[Tensor, Seen]:
        """What is seen, and the features (B,F) of the whole crop and of where the joints may be."""
        of_joints = maps[:, :NUM_JOINTS].flatten(2)
        chance = of_joints.softmax(2)
        joints2d = chance @ self.grid
        square = chance @ (self.grid**2).sum(1)
        spread = (square - (joints2d**2).sum(2)).clamp(min=0).add(1e-6).sqrt()
        at_joints = chance @ fine.flatten(2).mT
        features = torch.cat([at_joints, joints2d, spread[..., None]], 2)
        mask = F.pixel_shuffle(maps[:, NUM_JOINTS:], 2)[:, 0]
        return torch.cat([coarse, features.flatten(1)], 1), Seen(mask, joints2d, spread, of_joints)

    def regress(self, features: Tensor, joints2d: Tensor) -> list[Regressed]:
        """Bodies after each of the corrections, from the features of crops and the joints seen in them."""
        fixed, parameters, found = self.hidden0(self.norm(features)), self.mean.expand(len(features), -1), []
        body = self._body(parameters)
        for _ in range(ITERATIONS):
            with torch.no_grad():
                joints = self.skeleton.joints(body.rotmats, body.betas)[1]
                off = joints2d - project_joints(joints, body.cam)
                told = LOUD * off.flatten(1).clamp(-1, 1)  # else a body that is nowhere runs away
            hidden = F.relu(fixed + self.hidden1(torch.cat([parameters, told], 1)))
            parameters = parameters + self.correction(F.relu(self.hidden2(hidden)))
            body = self._body(parameters)
            found.append(body)
        return found

    def _body(self, parameters: Tensor) -> Regressed:
        pose, betas, cam = parameters.split([POSE, BETAS, 3], 1)
        return Regressed(rotation_6d_to_matrix(pose.view(-1, NUM_JOINTS, 3, 2)), betas, cam)

    def forward(self, x: Tensor) -> tuple[Regressed, Seen]:
        maps = self.maps_of(x)
        with torch.autocast(x.device.type, enabled=False):  # the rest needs the digits
            features, seen = self.read(*(part.float() for part in maps))
            return self.regress(features, seen.joints2d)[-1], seen
