"""Fits made better by what is known of the crops: 2-D keypoints and silhouettes.

Source: Bogo et al., "Keep it SMPL: Automatic Estimation of 3D Human Pose and Shape from a Single Image", 2016: terms
E_J (robust distance of the joints), E_a (knees and elbows bend one way), E_theta (prior of poses) and E_beta (of
shapes); camera and heading first, from the torso and facing both ways, then everything. Departures: many crops at once
by Adam; from a fit, which they stay near; one Gaussian of synthetic poses, of 6-D rotations; the weak camera of
camera.py; silhouettes, instead of the term against bodies that pass through themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from math import pi
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from reid3d.ops import farthest_point_sample, knn, rasterize

from .body import JOINT_NAMES, NUM_BETAS, NUM_JOINTS, Body, axis_angle_to_matrix, rotation_6d_to_matrix, some_vertices
from .camera import check_crops
from .evidence import POINTS, Keypoints, Masks
from .fit import BodyFit, mirror
from .synth.people import STAND, WALK, sample_people, sample_poses

CONFIDENT = 0.3  # keypoints with more count in the errors that are reported
FEWEST = 4  # confident keypoints; a crop with fewer has none
GRID = (128, 256)  # pixels at most, high and wide, at which silhouettes are compared
VERTICES, OUTLINE = 1000, 300  # of the body and of the mask that are compared

TORSO = ("neck", "right_shoulder", "left_shoulder", "mid_hip", "right_hip", "left_hip")
# What annotators call hip or ear, and the neck between the shoulders, are not quite where a body has them.
LOOSE = {"neck": 0.3, "mid_hip": 0.3, "right_hip": 0.5, "left_hip": 0.5, "right_ear": 0.5, "left_ear": 0.5}

# Standard deviations: lengths in half crop heights, as cameras have them; rotations by the entries of their matrices.
KEYPOINT = 0.02
SILHOUETTE = 0.003  # of the root mean square over all vertices or all of the outline
SURE_TURN, DOUBTED_TURN = 0.15, 0.5  # from a fit of confidence 1, as the embedded fitter's are off, and of 0
PRIOR_FLOOR = 0.2  # of the 6-D rotations in any direction, as people do more than walk and stand
BENT = 0.1  # the wrong way
SHAPE, CLOTHED_SHAPE = 1.0, 4.0  # of the betas; where no others are for the clothes of a silhouette, they fill it
CLOTHES_CHANGE = 1.0  # of the betas of clothes
OUTLIER = 0.3  # half crop heights where the robust loss flattens, all but none while the camera is sought
FIRST_OUTLIER = 1.0
RATES = {"root": 0.04, "pose": 0.03, "betas": 0.15, "place": 0.015}  # of Adam


class Posed(NamedTuple):
    """What is optimised of n bodies: root (n,1,3,2) and pose (n,23,3,2) as 6-D rotations, betas (n,K), place (n,3):
    logarithm of the camera's scale, and where the pelvis is, x, y in half crop heights from the crop's centre."""

    root: Tensor
    pose: Tensor
    betas: Tensor
    place: Tensor

    def select(self, index: Tensor) -> Posed:
        return Posed(*(part[index] for part in self))


@dataclass(frozen=True)
class Known:
    """Evidence of n crops. Lengths are in half crop heights from the crop's centre."""

    points: Tensor | None = None  # (n,25,2)
    weight: Tensor | None = None  # (n,25) confidence
    size: Tensor | None = None  # (n,2) of the mask, width and height in pixels of the canvas
    mask: Tensor | None = None  # (n,H,W) bool, in the upper left of the canvas
    distance: Tensor | None = None  # (n,H,W) to the mask
    outline: Tensor | None = None  # (n,P,2)
    turn: Tensor | None = None  # (n,) variance of the rotations of the fits

    def select(self, index: Tensor) -> Known:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Known(**{name: None if v is None else v[index] for name, v in values.items()})


class Refiner:
    """Fits bodies better to the keypoints and silhouettes of crops.

    Args:
        body: of the fits; the embedded one or any other in SMPL's format.
        keypoints, masks: from evidence.py, at least one.
        steps: of the four stages. By keypoints: camera and heading from the torso, beginning with the fit and with one
            that faces the other way; everything, with both; everything, with the better one. By the mask, and the
            keypoints if there are any: everything. A mask alone has camera and heading in the first stage.

    Raises:
        ValueError: neither is given, or steps are not four numbers >= 0.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        body: Body,
        keypoints: Keypoints | None = None,
        masks: Masks | None = None,
        steps: tuple[int, int, int, int] = (10, 10, 30, 100),
    ) -> None:
        if keypoints is None and masks is None:
            raise ValueError("keypoints or masks must be given, got neither")
        if len(steps) != 4 or min(steps) < 0:
            raise ValueError(f"steps must be four numbers >= 0, got {steps}")
        self.body, self.keypoints, self.masks, self.steps = body, keypoints, masks, steps
        self.landmarks = Landmarks(body)
        count = min(VERTICES, len(body.v_template))
        self.coarse = some_vertices(body, farthest_point_sample(body.v_template[None], count)[0])
        self.mean, self.whiten = (part.to(body.v_template) for part in pose_prior())

    def fingerprint(self) -> str:
        """A short name for all that refined fits depend on.

        Of evidence in folders only the names and sizes of the files: a change that keeps both goes unnoticed.
        """
        sources = [source.fingerprint if source else None for source in (self.keypoints, self.masks)]
        digest = hashlib.sha256(repr((sources, self.steps)).encode())
        for _, tensor in sorted(self.body.named_buffers()):
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, name: str, crop: np.ndarray, size: tuple[int, int] | None = None) -> None:
        """ValueError or OSError if the evidence of a crop cannot be used; arguments as for a call."""
        self._read(name, crop, size)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(
        self,
        fit: BodyFit,
        crops: Sequence[np.ndarray],
        names: Sequence[str],
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[BodyFit, list[dict[str, float]]]:
        """Refine the fits of B crops. What a crop becomes does not depend on the others, but for rounding.

        Args:
            fit: of the crops. One that has no rotmats, betas and joints, or not this body's vertices, stays as it is.
            crops: B arrays (H,W,3) uint8. names: of the crops, as in a manifest.
            sizes: (H, W) of the crops' image files, in whose pixels keypoints are; None where crops have them all.

        Returns:
            The fits, the very same ones for crops without evidence and where refining did not help by its own measure;
            and for each crop, of what it has evidence, before and after: "error2d_before", "error2d_after", the mean
            distance of the confident keypoints from the body's, in per cent of the crop's height; "iou_before",
            "iou_after", of the body's silhouette and the mask.

        Raises:
            TypeError, ValueError: crops are not (H,W,3) uint8, or not as many as names and fits; evidence that cannot
            be used, with the crop's name. OSError: it cannot be read.
        """
        check_crops(crops)
        if not len(fit.verts) == len(crops) == len(names) == len(sizes if sizes is not None else crops):
            raise ValueError(f"crops, names and sizes must be as many as fits, {len(fit.verts)}, got {len(crops)}")
        report: list[dict[str, float]] = [{} for _ in crops]
        if fit.rotmats is None or fit.betas is None or fit.verts.shape[1] != len(self.body.v_template):
            return fit, report
        fit = replace(fit, betas=self.body.all_betas(fit.betas))
        found = [
            self._read(name, crop, sizes[i] if sizes is not None else None)
            for i, (name, crop) in enumerate(zip(names, crops, strict=True))
        ]
        kinds = [(points is not None, mask is not None) for points, mask in found]
        for kind in ((True, False), (False, True), (True, True)):
            group = [i for i in range(len(crops)) if kinds[i] == kind]
            if not group:
                continue
            chosen = torch.tensor([k == kind for k in kinds], device=fit.cam.device)
            known = self._known([found[i] for i in group], [crops[i].shape for i in group])
            old = fit.select(chosen)
            known = replace(known, turn=DOUBTED_TURN**2 + (SURE_TURN**2 - DOUBTED_TURN**2) * old.confidence)
            new = self._refine(old, known)
            fit = fit.replace(chosen, new)
            for when, bodies in (("before", old), ("after", new)):
                for i, row in zip(group, self._measure(bodies, known), strict=True):
                    report[i] |= {f"{name}_{when}": round(value, 4) for name, value in row.items()}
        return fit, report

    def _read(
        self, name: str, crop: np.ndarray, size: tuple[int, int] | None
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        points = self.keypoints(name, size or crop.shape[:2]) if self.keypoints else None
        if points is not None and (points[:, 2] > CONFIDENT).sum() < FEWEST:
            points = None
        mask = self.masks(name) if self.masks else None
        if mask is not None:
            mask = _resample(mask, *crop.shape[:2])
        return points, mask if mask is not None and mask.any() else None

    def _known(
        self, found: Sequence[tuple[np.ndarray | None, np.ndarray | None]], shapes: Sequence[tuple[int, ...]]
    ) -> Known:
        """The evidence of crops of such shapes, which all have keypoints or none, and masks or none."""
        known = Known()
        rows = [points for points, _ in found if points is not None]
        if rows:
            aspects = np.array([[shape[1] / shape[0], 1] for shape in shapes])
            points = (2 * np.stack(rows)[..., :2] - 1) * aspects[:, None]
            known = replace(known, points=self._tensor(points), weight=self._tensor(np.stack(rows)[..., 2]))
        masks = [mask for _, mask in found if mask is not None]
        if masks:
            sizes = np.array([mask.shape[::-1] for mask in masks])
            canvas = np.zeros((len(masks), sizes[:, 1].max(), sizes[:, 0].max()), bool)
            for mask, place in zip(masks, canvas, strict=True):
                place[: mask.shape[0], : mask.shape[1]] = mask
            inside, size = torch.from_numpy(canvas).to(self.mean.device), self._tensor(sizes)
            distance = distance_transform(inside) * 2 / size[:, 1, None, None]
            outline = self._tensor(np.stack([_outline(mask) for mask in masks]))
            known = replace(known, size=size, mask=inside, distance=distance, outline=outline)
        return known

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.mean)

    def _refine(self, fit: BodyFit, known: Known) -> BodyFit:
        assert fit.rotmats is not None and fit.betas is not None
        first = start = now = self._posed(fit.rotmats, fit.betas, fit.cam)
        if known.points is not None:
            points = Known(known.points, known.weight, turn=known.turn)
            n = len(fit.cam)
            both = torch.arange(n, device=fit.cam.device).repeat(2)
            start = Posed(*map(torch.cat, zip(first, self._facing_away(fit, points), strict=True)))
            now = self._minimise(start, start, points.select(both), self.steps[0], heading=True)
            now = self._minimise(now, start, points.select(both), self.steps[1])
            energy = self.energy(now, start, points.select(both)).view(2, n)
            better = both[:n] + n * (energy[1] < energy[0])
            now, start = now.select(better), start.select(better)
            now = self._minimise(now, start, points, self.steps[2])
        if known.mask is not None:
            if known.points is None:
                now = self._minimise(now, start, known, self.steps[0], heading=True)
            now = self._minimise(now, start, known, self.steps[3])
        better = self.energy(now, start, known) < self.energy(first, first, known)  # false for NaN
        rotmats, cam = self._rotmats_and_cam(now)
        posed = self.body(rotmats, now.betas)
        new = BodyFit(posed.verts, cam, fit.confidence, rotmats, now.betas, posed.joints)
        return fit.replace(better, new.select(better))

    def _facing_away(self, fit: BodyFit, known: Known) -> Posed:
        """The fits turned about the vertical by half a turn: as they are, or mirrored, which keeps the silhouette."""
        assert fit.rotmats is not None and fit.betas is not None
        half = axis_angle_to_matrix(fit.cam.new_tensor([0, pi, 0]))
        turned = [
            self._posed(torch.cat([half @ rotmats[:, :1], rotmats[:, 1:]], 1), fit.betas, fit.cam)
            for rotmats in (fit.rotmats, mirror(fit.rotmats))
        ]
        n, energy = len(fit.cam), torch.stack([self.energy(posed, posed, known) for posed in turned])
        both = Posed(*map(torch.cat, zip(*turned, strict=True)))
        return both.select(torch.arange(n, device=energy.device) + n * (energy[1] < energy[0]))

    def _posed(self, rotmats: Tensor, betas: Tensor, cam: Tensor) -> Posed:
        six = rotmats[..., :2]
        pelvis = self.body.joints(rotmats, betas)[1][:, 0, :2]
        place = torch.cat([cam[:, :1].log(), cam[:, :1] * (cam[:, 1:] + pelvis)], 1)
        return Posed(six[:, :1], six[:, 1:], betas, place)

    def _rotmats_and_cam(self, posed: Posed) -> tuple[Tensor, Tensor]:
        rotmats = rotation_6d_to_matrix(torch.cat([posed.root, posed.pose], 1))
        pelvis = self.body.joints(rotmats, posed.betas)[1][:, 0, :2]
        scale = posed.place[:, :1].exp()
        return rotmats, torch.cat([scale, posed.place[:, 1:] / scale - pelvis], 1)

    def _minimise(self, posed: Posed, start: Posed, known: Known, steps: int, heading: bool = False) -> Posed:
        variables = Posed(*(part.clone() for part in posed))
        groups = [
            {"params": [part.requires_grad_()], "lr": RATES[name]}
            for name, part in variables._asdict().items()
            if not heading or name in ("root", "place")
        ]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, max(steps, 1))
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                self.energy(variables, start, known, heading).sum().backward()
            optimizer.step()
            schedule.step()
        return Posed(*(part.detach() for part in variables))

    def energy(self, posed: Posed, start: Posed, known: Known, heading: bool = False) -> Tensor:
        """The objective (n,): minus the logarithm of the bodies' probability, but for a constant.

        start: the fits that they stay near. heading: only what tells of camera and heading, from farther away.
        """
        assert known.turn is not None
        rotmats = rotation_6d_to_matrix(torch.cat([posed.root, posed.pose], 1))
        rotation, joints = self.coarse.joints(rotmats, posed.betas)
        scale, pelvis, shift = posed.place[:, None, :1].exp(), joints[:, :1, :2], posed.place[:, None, 1:]
        outlier = FIRST_OUTLIER if heading else OUTLIER
        turned = ((rotmats - rotation_6d_to_matrix(torch.cat([start.root, start.pose], 1))) ** 2).sum((2, 3))
        total = turned[:, 0] / (2 * known.turn)
        if known.points is not None and known.weight is not None:
            seen = scale * (self.landmarks(rotation, joints, posed.betas)[..., :2] - pelvis) + shift
            trust = known.weight * (self.landmarks.torso if heading else self.landmarks.weight)
            square = ((seen - known.points) ** 2).sum(2)
            total = total + (robust(square, outlier) * trust).sum(1) / (2 * KEYPOINT**2)
        if known.mask is not None:
            verts = scale * (self.coarse(rotmats, posed.betas).verts[..., :2] - pelvis) + shift
            total = total + self._silhouette(verts, known, outlier) / (2 * SILHOUETTE**2)
        if heading:
            return total
        usual = (rotmats[:, 1:, :, :2].flatten(1) - self.mean) @ self.whiten
        person, change = posed.betas[:, :NUM_BETAS], (posed.betas - start.betas) ** 2
        shape = SHAPE if known.mask is None or posed.betas.shape[1] > NUM_BETAS else CLOTHED_SHAPE
        betas = (person**2 + change[:, :NUM_BETAS]).sum(1) / (2 * shape**2)
        betas = betas + change[:, NUM_BETAS:].sum(1) / (2 * CLOTHES_CHANGE**2)
        return (
            total
            + turned[:, 1:].sum(1) / (2 * known.turn)
            + (usual**2).sum(1) / 2
            + betas
            + (overbent(rotmats) ** 2).sum(1) / (2 * BENT**2)
        )

    def _silhouette(self, verts: Tensor, known: Known, outlier: float) -> Tensor:
        """Mean squares (n,) of how far vertices (n,V,2) are outside the mask, and its outline from any vertex."""
        assert known.distance is not None and known.size is not None and known.outline is not None
        height, width = known.distance.shape[1:]
        # Beyond the crop nothing is known: a vertex there is judged by the nearest pixel.
        pixels = _to_pixels(verts, known.size)
        pixels = torch.minimum(pixels.clamp(min=0.5), known.size[:, None] - 0.5)
        grid = (pixels * 2 / pixels.new_tensor([width, height]) - 1)[:, None]
        outside = F.grid_sample(known.distance[:, None], grid, "bilinear", "border", align_corners=False)[:, 0, 0]
        uncovered = knn(known.outline, verts, 1).dist2[..., 0]
        return robust(outside**2, outlier).mean(1) + robust(uncovered, outlier).mean(1)

    def _measure(self, fit: BodyFit, known: Known) -> list[dict[str, float]]:
        assert fit.rotmats is not None and fit.betas is not None
        rows: list[dict[str, float]] = [{} for _ in fit.cam]
        if known.points is not None and known.weight is not None:
            points = self.landmarks(*self.body.joints(fit.rotmats, fit.betas), fit.betas)
            apart = (fit.cam[:, None, :1] * (points[..., :2] + fit.cam[:, None, 1:]) - known.points).norm(dim=2)
            counts = known.weight > CONFIDENT
            for measured, error in zip(rows, ((apart * counts).sum(1) / counts.sum(1)).tolist(), strict=True):
                measured["error2d"] = 50 * error  # from half crop heights to per cent of them
        if known.mask is not None and known.size is not None:
            height, width = known.mask.shape[1:]
            pixels = _to_pixels(fit.cam[:, None, :1] * (fit.verts[..., :2] + fit.cam[:, None, 1:]), known.size)
            face = rasterize(torch.cat([pixels, fit.verts[..., 2:]], 2), self.body.faces, height, width).face
            row, column = (torch.arange(side, device=face.device) for side in (height, width))
            body = (face >= 0) & (row[:, None] < known.size[:, 1, None, None]) & (column < known.size[:, 0, None, None])
            iou = (body & known.mask).sum((1, 2)) / (body | known.mask).sum((1, 2))
            for measured, value in zip(rows, iou.tolist(), strict=True):
                measured["iou"] = value
        return rows


class Landmarks:
    """Where the points of evidence.py are on a body: at joints, or fixed to a bone at a place of the rest body.

    weight, torso: (25,) how much to rely on each, at all and for the heading.
    """

    def __init__(self, body: Body) -> None:
        verts, joints, count = body.v_template, body.j_template, len(POINTS)
        mix = torch.zeros(count, NUM_JOINTS)
        anchor, vertex = torch.zeros(count, dtype=torch.long), torch.full((count,), -1)
        for i, name in enumerate(POINTS):
            if name in JOINT_NAMES and name != "neck":
                mix[i, JOINT_NAMES.index(name)] = 1
        for name, pair in (("neck", "shoulder"), ("mid_hip", "hip")):
            mix[POINTS.index(name), [JOINT_NAMES.index(f"{side}_{pair}") for side in ("left", "right")]] = 0.5
        for name, (joint, place) in _find_places(body).items():
            i = POINTS.index(name)
            anchor[i], vertex[i] = JOINT_NAMES.index(joint), place
            mix[i, anchor[i]] = 1
        fixed = (vertex >= 0).to(verts.device)
        self.mix, self.anchor = mix.to(verts), anchor.to(verts.device)
        vertex = vertex.to(verts.device)
        self.offset = (verts[vertex] - joints[self.anchor]) * fixed[:, None]
        self.shape = (body.shapedirs[vertex] - body.j_shapedirs[self.anchor]) * fixed[:, None, None]
        self.weight = verts.new_tensor([LOOSE.get(name, 1.0) for name in POINTS])
        self.torso = verts.new_tensor([1.0 if name in TORSO else 0.0 for name in POINTS])

    def __call__(self, rotation: Tensor, joints: Tensor, betas: Tensor) -> Tensor:
        """Points (n,25,3) of bodies with world rotations (n,24,3,3) and joints (n,24,3)."""
        offset = self.offset + torch.einsum("pck,nk->npc", self.shape[..., : betas.shape[1]], betas)
        return self.mix @ joints + (rotation[:, self.anchor] @ offset[..., None])[..., 0]


def _find_places(body: Body) -> dict[str, tuple[str, int]]:
    """The points that are no joints: the joint that carries each, and its vertex, by the geometry of the rest body."""
    carrier = body.weights.argmax(1)
    x, y, z = body.v_template.unbind(1)

    def least(cost: Tensor, joint: str, where: Tensor | None = None) -> int:
        among = carrier == JOINT_NAMES.index(joint)
        return int(torch.where(among if where is None else among & where, cost, torch.inf).argmin())

    nose = least(-z, "head")
    places = {"nose": ("head", nose)}
    for side, sign in (("left", 1), ("right", -1)):
        foot, ear = f"{side}_foot", least(-sign * x, "head")
        half = (x[ear] - x[nose]).abs()
        # Eyes lie two fifths of the way out to an ear, and about as far above the tip of the nose.
        from_eye = (sign * (x - x[nose]) - 0.42 * half) ** 2 + (y - y[nose] - 0.45 * half) ** 2
        inner = sign * x < sign * body.j_template[JOINT_NAMES.index(foot), 0]
        places |= {
            f"{side}_ear": ("head", ear),
            f"{side}_eye": ("head", least(from_eye, "head", z > (z[nose] + z[ear]) / 2)),
            f"{side}_big_toe": (foot, least(-z, foot, inner)),
            f"{side}_small_toe": (foot, least(-sign * x, foot)),
            f"{side}_heel": (f"{side}_ankle", least(z, f"{side}_ankle")),
        }
    return places


def robust(square: Tensor, sigma: float) -> Tensor:
    """Geman and McClure's e^2 sigma^2 / (e^2 + sigma^2) of squared errors: e^2 for small ones, at most sigma^2."""
    return sigma**2 * square / (square + sigma**2)


def overbent(rotmats: Tensor) -> Tensor:
    """Sines (n,4) of the angles by which knees and elbows (n,24,3,3) are bent the wrong way, 0 if they are not."""
    knees = [-rotmats[:, JOINT_NAMES.index(f"{side}_knee"), 2, 1] for side in ("left", "right")]
    elbows = [rotmats[:, JOINT_NAMES.index("left_elbow"), 0, 2], -rotmats[:, JOINT_NAMES.index("right_elbow"), 0, 2]]
    return torch.stack(knees + elbows, 1).clamp(min=0)


def distance_transform(mask: Tensor) -> Tensor:
    """Distance (n,H,W), in pixels and exact, of every pixel to the nearest of a mask (n,H,W) bool; inf without any.

    Source: Felzenszwalb and Huttenlocher, "Distance Transforms of Sampled Functions", 2012: along one axis, then along
    the other the lower envelope of parabolas, here by trying them all.
    """
    height, width = mask.shape[1:]
    row = torch.arange(height, dtype=torch.float32, device=mask.device)[:, None]
    above = torch.where(mask, row, -torch.inf).cummax(1).values
    below = torch.where(mask, row, torch.inf).flip(1).cummin(1).values.flip(1)
    square = torch.minimum(row - above, below - row) ** 2
    column = torch.arange(width, dtype=torch.float32, device=mask.device)
    best = torch.full_like(square, torch.inf)
    for x in range(width):
        best = torch.minimum(best, square[:, :, x : x + 1] + (column - x) ** 2)
    return best.sqrt()


@cache
def pose_prior() -> tuple[Tensor, Tensor]:
    """Mean (138,) and whitening matrix (138,138) of the 6-D rotations of synthetic people's joints but the root."""
    rng, n = np.random.default_rng(0), 4096
    people, action = sample_people(n, rng), rng.choice([WALK, STAND], n, p=[0.7, 0.3])
    poses = torch.from_numpy(sample_poses(people, rng.uniform(0, 2 * pi, n), action, rng))
    six = poses[:, 1:, :, :2].flatten(1)
    covariance = torch.cov(six.T) + PRIOR_FLOOR**2 * torch.eye(six.shape[1], dtype=torch.float64)
    return six.mean(0), torch.linalg.cholesky(torch.linalg.inv(covariance))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Points (OUTLINE,2) along the edge of a mask, in half crop heights from the crop's centre."""
    padded = np.pad(mask, 1, "edge")  # where the crop cuts the person there is no edge
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge = mask & ~inner
    pixels = np.argwhere(edge if edge.any() else mask)[:, ::-1]
    pixels = pixels[((np.arange(OUTLINE) + 0.5) * len(pixels) / OUTLINE).astype(int)]
    return (2 * pixels + 1 - np.array(mask.shape[::-1])) / mask.shape[0]


def _to_pixels(points: Tensor, size: Tensor) -> Tensor:
    """Points (n,P,2) in half crop heights from the crop's centre, in pixels of crops of size (n,2)."""
    return (points * size[:, None, 1:] + size[:, None]) / 2


def _resample(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """A mask at the size, in pixels of the grid, of a crop of height x width."""
    scale = min(GRID[0] / height, GRID[1] / width)
    size = max(round(scale * width), 1), max(round(scale * height), 1)
    if mask.shape == size[::-1]:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) > 127
