"""A crop to its cloud: read, fit a body, refine it, map the pixels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reid3d.cloud import PointCloud
from reid3d.data.images import MAX_PIXELS, MIN_SIDE, Picture, read_picture, resize

from .body import matrix_to_axis_angle
from .camera import project
from .fit import BodyFit, Fitter, UprightFitter, load_fitter
from .mapping import MODES, Mode, map_crops

FARTHEST = 100.0  # metres: a fit with anything beyond, or a crop that spans more, is none
UNSEEN = 128  # the grey of a mesh's vertices that have no pixel
PICTURE = 256  # pixels: a crop is read at this size at least, if it has it, so that a fitter sees its detail


@dataclass(frozen=True)
class Recipe:
    """How a crop becomes a cloud.

    fitter: a specification, see `reid3d.preprocess.fit.FITTERS`, or a `Fitter`. body: the user's SMPL file or a folder
    with one, None for the embedded body. mode: see `reid3d.preprocess.mapping`. size: (H, W) pixels that crops are
    resampled to. min_confidence: a crop whose fit has less gets the upright body instead, and its record says fit
    "mean". refine: files or folders of 2D keypoints and of silhouettes, see `reid3d.preprocess.evidence`.

    Raises: TypeError or ValueError naming the field.
    """

    fitter: str | Fitter = "default"
    body: str | Path | None = None
    mode: Mode = "paper"
    size: tuple[int, int] = (128, 64)
    min_confidence: float = 0.1
    refine: tuple[str | Path, ...] = ()

    def __post_init__(self) -> None:
        height, width = self.size
        if not (isinstance(height, int) and isinstance(width, int)):
            raise TypeError(f"size must be two integers (H, W), got {self.size}")
        if min(self.size) < MIN_SIDE:
            raise ValueError(f"size must be (H, W) of at least {MIN_SIDE} pixels each, got {self.size}")
        if height * width > MAX_PIXELS:
            raise ValueError(f"size must be (H, W) of at most {MAX_PIXELS // 1_000_000} megapixels, got {self.size}")
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must be in 0..1, got {self.min_confidence}")


class Converted(NamedTuple):
    """A cloud, and what its `Record` and its shard say of the fit."""

    cloud: PointCloud
    size: tuple[int, int]
    cam: tuple[float, float, float]
    aspect: float
    fit: str
    quality: dict[str, float]
    pose: np.ndarray | None  # (24,3)
    betas: np.ndarray | None  # (K,) of the fitter's body


class Group(NamedTuple):
    """Crops of a batch whose bodies come from one fitter."""

    which: list[int]
    kind: str
    fit: BodyFit
    faces: Tensor  # (F,3)
    crops: list[np.ndarray]  # (H,W,3) uint8, as they were fitted
    quality: list[dict[str, float]]


class Converter:
    """Makes clouds by a recipe; holds what is costly to load, on the GPU when there is one."""

    def __init__(self, recipe: Recipe) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        body = None
        if recipe.body is not None:
            from .smpl import load_smpl

            body = load_smpl(recipe.body)
        self.recipe = recipe
        if isinstance(recipe.fitter, Fitter):
            self.kind, self.fitter = type(recipe.fitter).__name__, recipe.fitter
        else:
            self.kind = recipe.fitter.partition(":")[0]
            self.fitter = load_fitter(recipe.fitter, body).to(device)
        self.upright = UprightFitter(body).to(self.fitter.faces.device)
        self.refiner = None
        if recipe.refine:
            from .evidence import load_evidence
            from .refine import Refiner

            self.refiner = Refiner(self.fitter.body, *load_evidence(recipe.refine))

    def describe(self) -> dict[str, Any]:
        """Whatever clouds depend on, but the crops, in a form that can be compared."""
        recipe = self.recipe
        return {
            "fitter": f"{self.kind}-{self.fitter.fingerprint()}",
            "body": self.fitter.body.name,
            "upright": self.upright.fingerprint(),
            "mode": recipe.mode,
            "size": list(recipe.size),
            "min_confidence": recipe.min_confidence,
            "refine": self.refiner.fingerprint() if self.refiner else None,
        }

    def read(self, image: str | Path | Image.Image) -> Picture:
        """A crop. Raises: OSError, ValueError as `read_picture`."""
        return read_picture(image, max(PICTURE, 2 * max(self.recipe.size)))

    def problem(self, picture: Picture, name: str) -> str | None:
        """Why a crop cannot be converted: what is to refine its fit cannot be used."""
        if self.refiner:
            try:
                self.refiner.check(name, picture.pixels, picture.size)
            except (ValueError, OSError) as error:
                return " ".join(str(error).split())
        return None

    @torch.no_grad()
    def fit(self, pictures: Sequence[Picture], names: Sequence[str]) -> list[Group]:
        """Bodies for crops of any sizes: those of the fitter, refined, and upright ones for the rest."""
        crops = [picture.pixels for picture in pictures]
        if self.recipe.mode == "official":  # the published converter fits what it has resampled
            crops = [resize(crop, self.recipe.size) for crop in crops]
        fit = self.fitter(crops, names)
        near = [(values.abs() < FARTHEST).flatten(1).all(1) for values in (fit.verts, fit.cam)]  # false for NaN
        sound = near[0] & near[1] & (fit.cam[:, 0] > 2 / FARTHEST)
        confidence = torch.where(sound, fit.confidence, 0.0).nan_to_num(0.0)
        quality: list[dict[str, float]] = [{} for _ in pictures]
        if self.refiner and sound.any():
            chosen = sound.nonzero()[:, 0].tolist()
            evidence = [[column[i] for i in chosen] for column in (crops, names, [p.size for p in pictures])]
            refined, measures = self.refiner(fit.select(sound), *evidence)
            fit = fit.replace(sound, refined)
            for i, measured in zip(chosen, measures, strict=True):
                quality[i] = measured
        # What was held against evidence is no longer in doubt.
        held = torch.tensor([bool(measured) for measured in quality], device=sound.device)
        trusted = sound & (held | (confidence >= self.recipe.min_confidence))
        groups = []
        for which, kind, faces in ((trusted, self.kind, self.fitter.faces), (~trusted, "mean", self.upright.faces)):
            if chosen := which.nonzero()[:, 0].tolist():
                bodies = fit if which is trusted else self.upright(crops, names)
                told = [
                    {"confidence": float(confidence[i]), **(quality[i] if which is trusted else {})} for i in chosen
                ]
                groups.append(Group(chosen, kind, bodies.select(which), faces, [crops[i] for i in chosen], told))
        return groups

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Picture], names: Sequence[str]) -> list[Converted]:
        """A cloud for each crop, of any size.

        quality: "confidence" of the fit, that of the one not taken where the body is upright; "visible", the share of
        the body's vertices that took a pixel's colour; "inside", the share that projects into the crop, hidden or not;
        and what the refinement says.
        """
        height, width = self.recipe.size
        done: dict[int, Converted] = {}
        for which, kind, fit, faces, chosen, told in self.fit(pictures, names):
            aspects = [crop.shape[1] / crop.shape[0] for crop in chosen]
            aspect = fit.cam.new_tensor(aspects)
            images = torch.from_numpy(np.stack([resize(crop, (height, width)) for crop in chosen]))
            clouds = map_crops(images.to(fit.cam.device), fit.verts, fit.cam, faces, self.recipe.mode, aspect)
            pixels = project(fit.verts, fit.cam, height, width, aspect)[..., :2]
            inside = ((pixels >= 0) & (pixels < pixels.new_tensor([width, height]))).all(2).float().mean(1).tolist()
            poses = None if fit.rotmats is None else matrix_to_axis_angle(fit.rotmats).cpu().numpy()
            betas = None if fit.betas is None else self.fitter.body.all_betas(fit.betas).cpu().numpy()
            for k, (i, cloud) in enumerate(zip(which, clouds, strict=True)):
                vertices = cloud.vertex[cloud.vertex >= 0]
                visible = len(np.unique(vertices) if self.recipe.mode == "surface" else vertices) / fit.verts.shape[1]
                quality = {**told[k], "visible": visible, "inside": inside[k]}
                done[i] = Converted(
                    cloud,
                    (height, width),
                    tuple(fit.cam[k].tolist()),
                    aspects[k],
                    kind,
                    {name: round(value, 4) for name, value in quality.items()},
                    None if poses is None else poses[k],
                    None if betas is None else betas[k],
                )
        return [done[i] for i in range(len(pictures))]


@cache
def _converter(recipe: Recipe) -> Converter:
    return Converter(recipe)


def convert(
    image: str | Path | Image.Image,
    *,
    fitter: str | Fitter = "default",
    body: str | Path | None = None,
    mode: Mode = "paper",
    size: tuple[int, int] = (128, 64),
    min_confidence: float = 0.1,
    refine: Sequence[str | Path] = (),
) -> PointCloud:
    """The point cloud of one pedestrian crop, the points of the body first.

    H*W points for size = (H, W), but for mode "dense". The other arguments are those of `Recipe`. Warns where an
    upright body stands in for a fit without confidence.

    Raises: TypeError, ValueError for a bad argument; ValueError naming an image that cannot be used; OSError when a
        file cannot be read.
    """
    converter = _converter(Recipe(fitter, body, mode, size, min_confidence, tuple(refine)))
    picture, name = _read_one(image, converter)
    made = converter([picture], [name])[0]
    _warn_of_upright(made.fit, converter, name)
    return made.cloud


def convert_mesh(
    image: str | Path | Image.Image,
    *,
    fitter: str | Fitter = "default",
    body: str | Path | None = None,
    min_confidence: float = 0.1,
    refine: Sequence[str | Path] = (),
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The body fitted to one crop: vertices (V,3) float32, metres, camera's frame; faces (F,3); colours (V,3) uint8.

    A vertex that is seen has the colour of its pixel, one that is not is grey. Arguments, errors: as for `convert`.
    """
    converter = _converter(Recipe(fitter, body, "dense", (128, 64), min_confidence, tuple(refine)))
    picture, name = _read_one(image, converter)
    _, kind, fit, faces, crops, _ = converter.fit([picture], [name])[0]
    _warn_of_upright(kind, converter, name)
    cloud = map_crops(torch.tensor(crops[0][None], device=fit.cam.device), fit.verts, fit.cam, faces, "dense")[0]
    colours = np.full((fit.verts.shape[1], 3), UNSEEN, np.uint8)
    seen = cloud.vertex >= 0
    colours[cloud.vertex[seen]] = cloud.rgb[seen]
    return fit.verts[0].cpu().numpy(), faces.cpu().numpy(), colours


def _warn_of_upright(kind: str, converter: Converter, name: str) -> None:
    if kind == "mean" and converter.kind != "mean":
        warnings.warn(f"image: {name}: no body was fitted with confidence, an upright one stands in", stacklevel=3)


def _read_one(image: str | Path | Image.Image, converter: Converter) -> tuple[Picture, str]:
    name = "" if isinstance(image, Image.Image) else Path(image).name
    try:
        picture = converter.read(image)
        if problem := converter.problem(picture, name):
            raise ValueError(problem)
    except ValueError as error:
        raise ValueError(f"image: {image}: {error}") from error
    return picture, name
