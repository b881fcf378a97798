"""Fits the embedded body to crops."""

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .body import load_body
from .camera import check_images
from .hmr import INPUT_SIZE, Regressor

WEIGHTS = "fitter.safetensors"


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
        ValueError: the file is not such a file.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.body = load_body("full")
        self.regressor = Regressor()
        with as_file(files("reid3d.preprocess") / "assets" / WEIGHTS) as embedded:
            path = Path(weights) if weights is not None else embedded
            try:
                state = load_file(path)
                self.regressor.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
            except (SafetensorError, RuntimeError) as error:
                raise ValueError(f"weights must be a file of train_fitter, got {path}: {error}") from error
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
        tall = min(max(height, 2 * width), height * 5 // 4)
        wide = (tall + 1) // 2
        left, top = (wide - width) // 2, (tall - height) // 2  # negative: cut off
        x = images.to(self.regressor.mean.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        x = x[..., max(-left, 0) : max(-left, 0) + wide]
        left = max(left, 0)
        x = F.pad(x, (left, wide - x.shape[3] - left, top, tall - height - top), mode="replicate")
        if x.shape[2:] != INPUT_SIZE:
            x = F.interpolate(x, INPUT_SIZE, mode="bilinear", antialias=True, align_corners=False)
        out = self.regressor(x)
        cam = out.cam * torch.tensor([tall / height, 1.0, 1.0], device=x.device)
        posed = self.body(out.rotmats, out.betas)
        return BodyFit(out.rotmats, out.betas, cam, posed.verts, posed.joints)
