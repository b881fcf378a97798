"""SPIN: a ResNet-50 and three corrections of SMPL's mean, and what it shares with the other regressors of SMPL."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from reid3d.baselines.resnet import ResNet

from .body import NUM_BETAS, NUM_JOINTS, Body, rotation_6d_to_matrix
from .camera import check_crops, cut_window
from .fit import BodyFit, Fitter, fit_both_ways, own_body
from .hmr import POSE, Regressed

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of red, green and blue in 0..1
HIDDEN = 1024
ITERATIONS = 3

Net = TypeVar("Net", bound=nn.Module)


class SpinNet(ResNet):
    """Images (B,3,H,W), ImageNet-normalised, to SMPL's parameters: SPIN's network under its key names.

    SPIN's is made for 224x224; ours takes any size.

    Source: Kolotouros et al., "Learning to Reconstruct 3D Human Pose and Shape via Model-fitting in the Loop", 2019,
    and the code published with it (nkolot/SPIN): HMR's iterative error feedback, with no nonlinearity between the
    layers and rotations in six numbers. Written from the published layout; not yet run on the published checkpoint,
    which cannot be redistributed.
    """

    init_pose: Tensor
    init_shape: Tensor
    init_cam: Tensor

    def __init__(self) -> None:
        super().__init__(50)
        self.fc1 = nn.Linear(self.channels + POSE + NUM_BETAS + 3, HIDDEN)
        self.drop1 = nn.Dropout()
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)
        self.drop2 = nn.Dropout()
        self.decpose = nn.Linear(HIDDEN, POSE)
        self.decshape = nn.Linear(HIDDEN, NUM_BETAS)
        self.deccam = nn.Linear(HIDDEN, 3)
        self.register_buffer("init_pose", torch.zeros(1, POSE))
        self.register_buffer("init_shape", torch.zeros(1, NUM_BETAS))
        self.register_buffer("init_cam", torch.zeros(1, 3))

    def forward(self, x: Tensor) -> Regressed:  # type: ignore[override]
        features = self.features(x).mean((2, 3))
        pose, betas, cam = (mean.expand(len(x), -1) for mean in (self.init_pose, self.init_shape, self.init_cam))
        for _ in range(ITERATIONS):
            hidden = self.drop1(self.fc1(torch.cat([features, pose, betas, cam], 1)))
            hidden = self.drop2(self.fc2(hidden))
            pose, betas, cam = pose + self.decpose(hidden), betas + self.decshape(hidden), cam + self.deccam(hidden)
        # (24,3,2), row by row: the numbers of the two columns take turns, unlike HMR 2.0's.
        return Regressed(rotation_6d_to_matrix(pose.view(-1, NUM_JOINTS, 3, 2)), betas, cam)


class RegressorFitter(Fitter):
    """A network that was trained with SMPL, and the window that it sees of a crop.

    Its root rotation includes the half turn about x from SMPL's frame (y up) to the camera's, so that bodies come out
    in the frame of the clouds (x right, y down, z away). Its camera is the weak perspective of camera.py in the window:
    SPIN and HMR 2.0 place the body at the depth 2 f / (s pixels), where a metre spans s half windows.

    The confidence is that of `fit_both_ways`, on the embedded fitter's scale.

    Args:
        net: ImageNet-normalised images (B,3,*size) to `Regressed`.
        body: the SMPL body that the betas are for; None for the embedded body, with betas 0.
    """

    size: tuple[int, int]  # (h, w) of the window in pixels

    def __init__(self, net: nn.Module, body: Body | None) -> None:
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.body, self.knows_betas = own_body(body), body is not None

    def tall(self, height: int, width: int) -> float:
        """Crop heights that the window spans for a crop of height x width pixels."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> BodyFit:
        check_crops(crops)
        tall = [self.tall(*crop.shape[:2]) for crop in crops]
        windows = [cut_window(crop, self.size, t, "black") for crop, t in zip(crops, tall, strict=True)]
        images = torch.from_numpy(np.stack(windows)).to(self.faces.device).permute(0, 3, 1, 2) / 255
        mean, deviation = images.new_tensor(IMAGENET)[..., None, None]
        return fit_both_ways(self.net, (images - mean) / deviation, tall, self.body, self.knows_betas)


class SpinFitter(RegressorFitter):
    """Bodies by SPIN. The window is a square of 1.2 times the crop's longer side, black beyond the crop.

    Departure from the published code: its resizing also stretches the contrast of each window, an accident of SciPy.

    Args:
        file: SPIN's model_checkpoint.pt, or any checkpoint with its keys, alone or under "model", as .safetensors too.
        body: a licensed SMPL body; None for the embedded one, whose betas stay 0.

    Raises:
        ValueError: the file is none, or lacks keys, or has others. FileNotFoundError: there is none.
    """

    size = (224, 224)

    def __init__(self, file: str | Path, body: Body | None = None) -> None:
        super().__init__(load_net(SpinNet, file, "model"), body)

    def tall(self, height: int, width: int) -> float:
        return 1.2 * max(height, width) / height


class _Mapping:
    """What another library's class becomes in `read_state`: a dictionary, whatever it was."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()  # torch fills no other kind


class _Opaque:
    """The same for numpy's, whose state is no dictionary."""

    def __new__(cls, *args: Any) -> _Opaque:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def read_state(file: str | Path, key: str) -> dict[str, Tensor]:
    """The state dict in a checkpoint, which is that alone or has it under `key`, with "module." taken off its keys.

    Whatever else the file holds (optimizers, configurations of yacs or omegaconf) becomes a placeholder: no class but
    torch's own is looked up, and no code of the file runs.

    Raises:
        ValueError: the file is no such checkpoint. FileNotFoundError: there is none.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, got {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            foreign = get_unsafe_globals_in_checkpoint(path) if is_zipfile(path) else []
            with safe_globals([(_Opaque if name.startswith("numpy.") else _Mapping, name) for name in foreign]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers stumble over in a broken file
        found = re.search(r"WeightsUnpickler error:\s*(\S.*?)(?: was not an allowed|\n|$)", str(error))
        reason = found[1] if found else (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"weights must be a checkpoint of tensors, got {path}: {reason}; if you trust it, keep its tensors alone: "
            f"torch.save({{{key!r}: torch.load(file, weights_only=False)[{key!r}]}}, file)"
        ) from error
    state = content.get(key, content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights must be a state dict, alone or under {key!r}, got {path}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_net(make: Callable[[], Net], file: str | Path, key: str, others: tuple[str, ...] = ()) -> Net:
    """A network in float32 with the weights of a file, see `read_state`.

    BatchNorm's counts may be missing, as in old files. others: beginnings of keys that are left out.

    Raises:
        ValueError: the file is no checkpoint, or keys or shapes differ. FileNotFoundError: there is none.
    """
    with torch.device("meta"):  # the weights would be drawn at random first
        net = make()
    state = {k: v.float() if v.is_floating_point() else v for k, v in read_state(file, key).items()}
    state = {k: v for k, v in state.items() if not k.startswith(others)}
    own = net.state_dict()
    for k in own.keys() - state.keys():
        if k.endswith("num_batches_tracked"):
            state[k] = torch.zeros((), dtype=torch.long)
    wrong = {
        "lacks": sorted(own.keys() - state.keys()),
        "has besides": sorted(state.keys() - own.keys()),
        "has in another shape": sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape),
    }
    if any(wrong.values()):
        says = "; ".join(f"{what} {_some(keys)}" for what, keys in wrong.items() if keys)
        raise ValueError(f"weights must be those of {type(net).__name__}, got {file}, which {says}")
    net.load_state_dict(state, assign=True)
    return net


def _some(keys: list[str]) -> str:
    return ", ".join(map(repr, keys[:3])) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
