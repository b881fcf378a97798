"""Bodies fitted to crops: what every fitter gives, the embedded one, and the upright body for crops that none can fit.

A fitter is named by a specification, KIND or KIND:FILE, see FITTERS; `load_fitter` makes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from importlib.resources import as_file, files
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reid3d.ops import rasterize

from .body import JOINT_NAMES, NUM_JOINTS, Body, axis_angle_to_matrix, load_body, rotation_6d_to_matrix
from .camera import check_crops, cut_window, project, project_joints
from .hmr import INPUT_SIZE, Regressed, Regressor, Seen
from .settle import Settler

FORMAT = "reid3d-fitter-3"
WEIGHTS = "fitter.safetensors"
# Of the confidence of networks that see nothing else: metres between the joints of a crop and of its mirror image where
# it is 1/2, and how it falls there.
EVEN_ODDS, STEEPNESS = 0.14, 3.2
AGREED = 0.14  # metres between the same: they are one pose
STEPS, MORE = 2, 8  # of settling, and how many more where body and silhouette have an IoU below POOR
POOR = 0.7
HAS_BFLOAT16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # the processor; emulated, it is slow
_SIDES = {"left": "right", "right": "left"}
_PARTS = [name.partition("_") for name in JOINT_NAMES]
OTHER_SIDE = [JOINT_NAMES.index(_SIDES.get(side, side) + bar + joint) for side, bar, joint in _PARTS]
FITTERS = {
    "default": "the embedded regressor, trained on synthetic people",
    "spin:FILE": "SPIN's checkpoint model_checkpoint.pt, or any in its layout",
    "hmr2:FILE": "HMR 2.0's checkpoint (4D-Humans)",
    "params:FILE.npz": "what another estimator found, see reid3d.preprocess.params",
    "mean": "an upright body that fills the crop, whatever is in it",
}


@dataclass(frozen=True)
class BodyFit:
    """Bodies fitted to B crops, in the camera frame of the clouds (x right, y down, z away, metres)."""

    verts: Tensor  # (B,V,3)
    cam: Tensor  # (B,3) weak perspective [s, tx, ty], see camera.py
    confidence: Tensor  # (B,) how far to trust it, 0..1
    rotmats: Tensor | None = None  # (B,24,3,3); None where only the vertices are known, as for the two below
    betas: Tensor | None = None  # (B,10) of the fitter's body
    joints: Tensor | None = None  # (B,24,3)

    def select(self, crops: Tensor) -> BodyFit:
        """The fits of the crops where crops (B,) is true."""
        values: list[Any] = [None if v is None else v[crops] for v in self._values()]
        return BodyFit(*values)

    def replace(self, crops: Tensor, fit: BodyFit) -> BodyFit:
        """The fits with those of the crops where crops (B,) is true replaced by others."""
        pairs = zip(self._values(), fit._values(), strict=True)
        values: list[Any] = [None if a is None or b is None else a.index_put((crops,), b) for a, b in pairs]
        return BodyFit(*values)

    def _values(self) -> list[Tensor | None]:
        return [getattr(self, f.name) for f in fields(self)]


class Fitter(nn.Module):
    """What all fitters are: a module that is called with crops and their names.

    body: the `Body` that is fitted. faces: (F,3) of the vertices that a fit has, those of the body unless it says
    otherwise. Everything that a fit depends on is a parameter or a buffer, so that `fingerprint` can tell two apart.
    """

    body: Body

    @property
    def faces(self) -> Tensor:
        return self.body.faces

    def forward(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> BodyFit:
        """Fit B crops.

        Args:
            crops: B arrays (H,W,3) uint8 RGB of any sizes and proportions, not stretched: a person each, upright and
                filling most of the height.
            names: B names of the crops, as in a manifest. Only the fitter of `params:` looks at them.

        Raises:
            TypeError: crops are not uint8. ValueError: crops are not (H,W,3).
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A short name for everything that the fits depend on."""
        digest = hashlib.sha256(type(self).__name__.encode())
        for name, tensor in sorted([*self.named_parameters(), *self.named_buffers()], key=lambda item: item[0]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def load_fitter(spec: str = "default", body: Body | None = None) -> Fitter:
    """The fitter that a specification names.

    Args:
        spec: one of FITTERS.
        body: a licensed SMPL body (`reid3d.preprocess.smpl.load_smpl`) instead of the embedded one. Poses carry over
            between bodies, betas do not: a fitter that was trained with the other kind leaves them at 0.

    Raises:
        ValueError: spec names no fitter, or a file that does not fit. FileNotFoundError: there is no such file.
    """
    kind, colon, file = spec.partition(":")
    if spec == "default":
        return EmbeddedFitter(body=body)
    if spec == "mean":
        return UprightFitter(body)
    if colon and file and kind in ("spin", "hmr2", "params"):
        if kind == "spin":
            from .spin import SpinFitter

            return SpinFitter(file, body)
        if kind == "hmr2":
            from .hmr2 import Hmr2Fitter

            return Hmr2Fitter(file, body)
        from .params import ParamsFitter

        return ParamsFitter(file, body)
    raise ValueError(f"fitter must be one of {', '.join(FITTERS)}, got {spec!r}")


def mirror(rotmats: Tensor) -> Tensor:
    """The poses (B,24,3,3) of people as a mirror shows them, left and right exchanged."""
    flip = rotmats.new_tensor([-1, 1, 1])
    return rotmats[:, OTHER_SIDE] * flip[:, None] * flip


def mirror_body(body: Regressed) -> Regressed:
    """Bodies as a mirror shows them."""
    return Regressed(mirror(body.rotmats), body.betas, body.cam * body.cam.new_tensor([1, -1, 1]))


def mirror_seen(seen: Seen) -> Seen:
    """What is seen as a mirror shows it, left and right exchanged."""
    joints2d = seen.joints2d[:, OTHER_SIDE] * seen.joints2d.new_tensor([-1, 1])
    maps = seen.maps[:, OTHER_SIDE].unflatten(2, (-1, seen.mask.shape[2] // 2)).flip(3).flatten(2)
    return Seen(seen.mask.flip(2), joints2d, seen.spread[:, OTHER_SIDE], maps)


def astray(cam: Tensor, joints: Tensor, joints2d: Tensor) -> Tensor:
    """Mean distance (B,) of joints (B,24,3) seen by cam (B,3) from joints2d (B,24,2), in half crop heights."""
    return (project_joints(joints, cam) - joints2d).norm(dim=2).mean(1)


def fit_both_ways(
    net: Callable[[Tensor], Regressed], images: Tensor, tall: Sequence[float], body: Body, knows_betas: bool
) -> BodyFit:
    """Bodies by a network that gives `Regressed` of windows (B,3,H,W), each `tall` crop heights high.

    The network sees the mirrored windows too. How far the joints that it finds there are from the others, mirrored
    back, tells how far to trust either; the confidence is 1/2 where they are 14 cm apart on average. Betas are 0 unless
    the network knows those of the body.
    """
    out, mirrored = net(images), net(images.flip(3))  # not in one batch, which a CPU's cache does not hold
    cam = torch.cat([out.cam[:, :1] * out.cam.new_tensor(tall)[:, None], out.cam[:, 1:]], 1)
    betas = out.betas if knows_betas else out.betas.new_zeros(len(cam), body.num_betas)
    posed = body(out.rotmats, betas)
    _, other = body.joints(mirror(mirrored.rotmats), betas)
    apart = (posed.joints - posed.joints[:, :1] - other + other[:, :1]).norm(dim=2).mean(1)
    confidence = 1 / (1 + (apart / EVEN_ODDS) ** STEEPNESS)
    return BodyFit(posed.verts, cam, confidence, out.rotmats, betas, posed.joints)


def own_body(body: Body | None) -> Body:
    """A copy of a body, the embedded one for None: .to() must not move the one that others share."""
    return deepcopy(body if body is not None else load_body("full"))


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


class EmbeddedFitter(Fitter):
    """Body and camera of each crop by a small regressor trained on synthetic people (train_fitter.py).

    What it finds is moved to agree with the joints and the silhouette that it sees in the same crop (settle.py).

    The confidence is how likely the vertices are less than 150 mm off on average, by a logistic regression on how far
    the fits of a crop and of its mirror image, the joints that are seen and the silhouette agree
    (benchmarks/fitter.py holds it against the truth).

    Args:
        weights: a file written by train_fitter.py; None for the embedded ones.
        body: None for the embedded body; with another one the betas stay 0.

    Raises:
        ValueError: the file is not such a file. FileNotFoundError: there is none.
    """

    TALLEST = 1.25  # crop heights: a person smaller than 1 / 1.25 of the window was rare in training

    def __init__(self, weights: str | Path | None = None, body: Body | None = None) -> None:
        super().__init__()
        self.body, self.knows_betas = own_body(body), body is None
        self.coarse = own_body(load_body("low"))  # what the regressor knows, to hold the fit against what is seen
        if weights is None:
            with as_file(files("reid3d.preprocess") / "assets" / WEIGHTS) as embedded:
                regressor, _ = load_regressor(embedded)
        else:
            regressor, _ = load_regressor(Path(weights))
        self.regressor, self.settler = regressor.fold(), Settler(self.coarse)
        settings = torch.tensor([AGREED, STEPS, MORE, POOR])
        self.register_buffer("settings", settings, persistent=False)  # for the fingerprint

    @torch.no_grad()
    def forward(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> BodyFit:
        return self.fit(crops)[0]

    @torch.no_grad()
    def fit(self, crops: Sequence[np.ndarray]) -> tuple[BodyFit, Tensor]:
        """The fits of B crops, and what speaks for and against each (B,5).

        That is 1; the IoU of the body and the silhouette that is seen; the logarithms of how far the fits of crop and
        mirror image, the fit's joints and those that are seen, and those that may be the same joint lie apart. Weighted
        by the regressor's `trust` they sum to the logit of the confidence.
        """
        check_crops(crops)
        # The regressor saw crops of 2:1: narrower ones get wider, wider ones taller until they lose columns instead.
        ratio = INPUT_SIZE[0] / INPUT_SIZE[1]
        tall = [min(max(ratio * crop.shape[1] / crop.shape[0], 1.0), self.TALLEST) for crop in crops]
        windows = np.stack([cut_window(crop, INPUT_SIZE, t) for crop, t in zip(crops, tall, strict=True)])
        images = torch.from_numpy(windows).to(self.regressor.mean.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=HAS_BFLOAT16):  # as it was trained, in half the time
            out, seen = self.regressor(images)  # not in one batch with the mirrored, which a CPU's cache does not hold
            other, seen_too = self.regressor(images.flip(3))
        other, seen_too = mirror_body(other), mirror_seen(seen_too)
        joints2d, spread = (seen.joints2d + seen_too.joints2d) / 2, (seen.spread + seen_too.spread) / 2
        mask = seen.mask + seen_too.mask > 0
        joints, joints_too = (self.coarse.joints(o.rotmats, o.betas)[1] for o in (out, other))
        apart = (joints - joints[:, :1] - joints_too + joints_too[:, :1]).norm(dim=2).mean(1)
        # Where both agree, their mean. Else the one that is nearer to what is seen: between front and back is neither.
        nearer = astray(out.cam, joints, joints2d) <= astray(other.cam, joints_too, joints2d)
        share = torch.where(apart < AGREED, 0.5, (~nearer).float())
        rotmats, betas, cam = (
            torch.lerp(a, b, share.view(-1, *[1] * (a.ndim - 1))) for a, b in zip(out, other, strict=True)
        )
        mean = Regressed(rotation_6d_to_matrix(rotmats[..., :2]), betas, cam)
        body = self.settler(mean, joints2d, spread, mask, STEPS)
        overlap = self._overlap(body, mask)
        if (poor := (overlap < POOR).nonzero()[:, 0]).numel():
            settled = self.settler(body.select(poor), joints2d[poor], spread[poor], mask[poor], MORE)
            body = Regressed(*(part.index_copy(0, poor, new) for part, new in zip(body, settled, strict=True)))
            overlap = overlap.index_copy(0, poor, self._overlap(settled, mask[poor]))
        rotmats, betas, cam = body
        distances = apart, astray(cam, self.coarse.joints(rotmats, betas)[1], joints2d), spread.mean(1)
        signs = torch.stack([torch.ones_like(apart), overlap, *(d.clamp(min=1e-3).log() for d in distances)], 1)
        confidence = (signs @ self.regressor.trust).sigmoid()
        betas = betas if self.knows_betas else betas.new_zeros(len(betas), self.body.num_betas)
        posed = self.body(rotmats, betas)
        cam = torch.cat([cam[:, :1] * cam.new_tensor(tall)[:, None], cam[:, 1:]], 1)
        return BodyFit(posed.verts, cam, confidence, rotmats, betas, posed.joints), signs

    def _overlap(self, body: Regressed, mask: Tensor) -> Tensor:
        """IoU (B,) of the silhouettes of bodies and masks (B,H,W)."""
        verts, (height, width) = self.coarse(body.rotmats, body.betas).verts, mask.shape[1:]
        shape = rasterize(project(verts, body.cam, height, width), self.coarse.faces, height, width).face >= 0
        return (shape & mask).sum((1, 2)) / (shape | mask).sum((1, 2)).clamp(min=1)


class UprightFitter(Fitter):
    """An upright body of mean shape that faces the camera and fills the crop: what is left where no fit can be trusted.

    It looks at the crops' proportions alone. Its confidence is 0.
    """

    FILL = 0.92  # of the crop's height, as detectors cut people

    upright: Tensor

    def __init__(self, body: Body | None = None) -> None:
        super().__init__()
        self.body = own_body(body)
        pose = torch.zeros(NUM_JOINTS, 3)
        pose[0, 0] = pi  # from the body's frame, y up, to the camera's
        pose[16, 2], pose[17, 2] = -1.2, 1.2  # the arms hang down
        self.register_buffer("upright", axis_angle_to_matrix(pose))
        self.eval()

    @torch.no_grad()
    def forward(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> BodyFit:
        check_crops(crops)
        count = len(crops)
        betas = self.upright.new_zeros(1, self.body.num_betas)
        posed = self.body(self.upright[None], betas)
        low, high = posed.verts[0].amin(0), posed.verts[0].amax(0)
        width, height = (high - low)[:2]
        aspect = self.upright.new_tensor([crop.shape[1] / crop.shape[0] for crop in crops])
        s = 2 * self.FILL * torch.minimum(1 / height, aspect / width)
        shift = (-(low + high) / 2)[:2].expand(count, 2)
        return BodyFit(
            posed.verts.expand(count, -1, -1),
            torch.cat([s[:, None], shift], 1),
            torch.zeros_like(s),
            self.upright.expand(count, -1, -1, -1),
            betas.expand(count, -1),
            posed.joints.expand(count, -1, -1),
        )
