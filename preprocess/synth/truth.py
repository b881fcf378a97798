"""The bodies of a synthetic world, in place of what a fitter finds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..body import load_body
from ..fit import BodyFit, Fitter


class TrueBodies(Fitter):
    """The bodies of a world, in their clothes, by the names of its crops.

    Args:
        world: folder that `synth` wrote.

    Raises: FileNotFoundError: no such world.
    """

    rotmats: Tensor
    betas: Tensor
    cam: Tensor

    def __init__(self, world: str | Path) -> None:
        super().__init__()
        path = Path(world) / "gt.npz"
        if not path.is_file():
            raise FileNotFoundError(f"world must be a synthetic one, with its truth, got no {path}")
        self.body = load_body("full")
        with np.load(path) as truth:
            self.rows = {name: i for i, name in enumerate(truth["names"].tolist())}
            for name in ("rotmats", "betas", "cam"):
                self.register_buffer(name, torch.from_numpy(truth[name]))

    def forward(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> BodyFit:
        which = torch.tensor([self.rows[name] for name in names])
        rotmats, betas, cam = self.rotmats[which], self.betas[which], self.cam[which]
        posed = self.body(rotmats, betas)
        return BodyFit(posed.verts, cam, torch.ones(len(cam)), rotmats, betas, posed.joints)
