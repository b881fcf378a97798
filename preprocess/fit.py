"""Fits the embedded body to crops."""

from copy import deepcopy
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .body import load_body
from .camera import check_images
from .hmr import INPUT_SIZE, Regressor

FORMAT = "reid3d-fitter-1"
WEIGHTS = "fitter.safetensors"


def load_regressor(path: Path) -> tuple[Regressor, dict[str, str]]:
    """The network in a file of train_fitter.py, and the file's notes.

    Raises:
        ValueError: the file is not such a file. FileNotFoundError: there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file, got {path}")
    regressor = Regressor()
    try:
        with safe_open(path, framework="pt") as file:
            note = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
        if note.get("format") != FORMAT:
            raise ValueError(f"its format is {note.get('format')!r}, not {FORMAT!r}")
        regressor.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(f"weights must be a file of train_fitter, got {path}: {error}") from error
    return regressor, note


@dataclass(frozen=True)
class BodyFit:
    """Bodies fitted to B crops, in the camera frame of the clouds (x right, y down, z away, metres)."""

    rotmats: Tensor  # (B,24,3,3)
    betas: Tensor  # (B,10)
    cam: Tensor  # (B,3) weak perspective [s, tx, ty], see camera.py
    verts: Tensor  # (B,V,3)
    joints: Tensor  # (B,24,3)


class Fitter(nn.Module):
    """Body and camera of each crop, by one pass of a small regressor trained on synthetic people (train_fitter.py).

    Args:
        weights: a file written by train_fitter.py; None for the embedded ones.

    Raises:
        ValueError: the file is not such a file. FileNotFoundError: there is none.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.body = deepcopy(load_body("full"))  # .to() must not move the one that others share
        if weights is None:
            with as_file(files("reid3d.preprocess") / "assets" / WEIGHTS) as embedded:
                self.regressor, _ = load_regressor(embedded)
        else:
            self.regressor, _ = load_regressor(Path(weights))
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> BodyFit:
        """Fit crops.

        Args:
            images: (B,H,W,3) uint8 RGB, a person upright and filling most of the height, any size.

        Raises:
            TypeError: images are not uint8.
            ValueError: images are not (B,H,W,3).
        """
        height, width = check_images(images)
        # The regressor saw crops of 2:1, so make them that, with the border's colours: narrow ones get wider, wide ones
        # taller by a quarter at most (it saw people that small) and lose columns beyond. A camera counts from the
        # crop's centre in half heights, so the width does not matter to it and added height scales it.
        wide = (min(max(height, 2 * width), height * 5 // 4) + 1) // 2
        tall = max(2 * wide, height)
        left, top = (wide - width) // 2, (tall - height) // 2  # negative: cut off
        # An odd number of added columns or rows moves the centre by half a pixel.
        drift = torch.tensor([wide - width - 2 * left, tall - height - 2 * top]) / height
        x = images.to(self.regressor.mean.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x[..., max(-left, 0) :][..., :wide]
        left = max(left, 0)
        x = F.pad(x, (left, wide - x.shape[3] - left, top, tall - height - top), mode="replicate")
        if x.shape[2:] != INPUT_SIZE:
            x = F.interpolate(x, INPUT_SIZE, mode="bilinear", antialias=True, align_corners=False)
        out = self.regressor(x)
        scale = out.cam[:, :1] * (tall / height)
        cam = torch.cat([scale, out.cam[:, 1:] + drift.to(scale) / scale], 1)
        posed = self.body(out.rotmats, out.betas)
        return BodyFit(out.rotmats, out.betas, cam, posed.verts, posed.joints)
