"""A picture of what a model finds alike in a query and its best matches, by `reid3d.explain`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cloud import PointCloud
from ..data import CloudDataset, ImageDataset
from ..data.image_transforms import ImageEvalTransform
from ..data.transforms import EvalTransform
from ..explain import activation_maps, points_at, position_matches, saliency
from ..io import Record
from ..ops import knn
from ..retrieval import Features, search
from .pictures import (
    FRONT,
    RIGHT,
    SIDE,
    SIZE,
    WRONG,
    Panel,
    View,
    crop_of,
    draw_heat,
    draw_matches,
    enlarge,
    grid,
)

TURNED = (0.9, 0.15)  # yaw and pitch from which a cloud shows its depth
SMALL = (240, 120)  # height and width of a panel, where there are many
NEAR = 8  # points over which saliency is levelled: that of a single one says little
BRIGHT = 99  # per cent of the points have less than full heat


def explained(
    model: Any,
    query: Features,
    gallery: Features,
    row: int,
    dataset: CloudDataset | ImageDataset,
    *,
    clouds: CloudDataset | None = None,
    matches: int = 3,
) -> Image.Image:
    """Query `row` and its best matches in the gallery, and what of them the model finds alike.

    Each match is held against the query, the query against its first match. Of clouds their points' saliency, from the
    camera's side and from two others; of crops the activation maps of all parts; where places are compared, as by
    QAConv, a query and a match side by side with lines between the places that add most.

    Args:
        model: the one that made the features. dataset: what they were made from. clouds: of the same crops, by name, to
            show the lines of QAConv in them too. matches: >= 1.

    Raises: ValueError: a row that there is not, an item that `dataset` or `clouds` does not have, no matches.
    """
    one = query.subset([row])
    places, similarities = _ranked(model, one, gallery, matches)
    if not places:
        raise ValueError(f"gallery must hold a match for {one.names[0]}, got none")
    first = _descriptor(gallery, places[0])
    sides = [_Side(one, 0, f"query: {one.names[0]}", None, first)]
    for number, (i, similarity) in enumerate(zip(places, similarities, strict=True), 1):
        known, right = one.pids[0] != -1 and gallery.pids[i] != -1, one.pids[0] == gallery.pids[i]
        said = (" (right)" if right else " (wrong)") if known else ""
        label = f"match {number}{said}, similarity {similarity:.3f}: {gallery.names[i]}"
        frame = (RIGHT if right else WRONG) if known else None
        sides.append(_Side(gallery, i, label, frame, _descriptor(one, 0)))
    heading, labels = f"What {getattr(model, 'name', type(model).__name__)} finds alike", [side.label for side in sides]
    if hasattr(model, "correspondences"):
        rows = [_lines(model, sides[0], side, dataset, clouds) for side in sides[1:]]
        return grid(rows, f"{heading} in {labels[0]}", labels[1:])
    heading += ", from little (dark) to much (yellow)"
    if model.inputs == "cloud":
        return grid([_salient(model, side, dataset) for side in sides], heading, labels)
    return grid([_activated(model, side, dataset) for side in sides], heading, labels, size=12)


class _Side(NamedTuple):
    """An item of a pair: its features and row, what is said of it, its frame, and the descriptor of the other (D,)."""

    features: Features
    row: int
    label: str
    frame: tuple[int, int, int] | None
    target: Tensor

    @property
    def name(self) -> str:
        return self.features.names[self.row]

    def place(self, dataset: CloudDataset | ImageDataset) -> tuple[Any, int]:
        """Its split of a data set, and its row there."""
        split: Any = getattr(dataset, self.features.split or "all")
        for row, record in enumerate(split.records):
            if record.name == self.name:
                return split, row
        raise ValueError(f"dataset must hold {self.name}, which {split.name} of {split.root} does not")

    def cloud(self, dataset: CloudDataset | ImageDataset) -> tuple[PointCloud, Record]:
        split, row = self.place(dataset)
        return split.cloud(row), split.records[row]

    def pixels(self, dataset: CloudDataset | ImageDataset, model: Any) -> Tensor:
        """A crop as the model takes it, (3, H, W) uint8."""
        split, row = self.place(dataset)
        pixels: Tensor = split.with_transform(ImageEvalTransform(model.size[0], model.size[1], model.resample))[row][0]
        return pixels


def _descriptor(features: Features, row: int) -> Tensor:
    return torch.from_numpy(np.array(features.feats[row]))


def _ranked(model: Any, one: Features, gallery: Features, matches: int) -> tuple[list[int], list[float]]:
    """The best matches of a query, but for those that `evaluate` leaves out, and their similarities."""
    known = bool((gallery.pids != -1).any())
    if not hasattr(model, "scores"):
        ranks = search(one, gallery, matches, cross_camera=known)
        found = ranks.idx[0] >= 0
        return ranks.idx[0, found].tolist(), ranks.sim[0, found].tolist()
    scores = model.scores(one, gallery)[0]
    if known:
        seen_here = (gallery.pids == one.pids[0]) & (gallery.camids == one.camids[0]) & (gallery.camids != -1)
        scores = np.where(seen_here | (gallery.pids == -1), -np.inf, scores)
    order = np.argsort(-scores, kind="stable")[:matches]
    order = order[np.isfinite(scores[order])]
    return order.tolist(), scores[order].tolist()


def _salient(model: Any, side: _Side, dataset: CloudDataset | ImageDataset) -> list[Panel]:
    """A cloud as it is, and the points that it is known by."""
    whole, record = side.cloud(dataset)
    transform, rng = EvalTransform(model.points or EvalTransform().points, model.background), np.random.default_rng(0)
    xyz, rgb = transform(whole, rng)
    labels = np.repeat(np.where(whole.vertex[:, None] >= 0, 255, 0).astype(np.uint8), 3, axis=1)
    body = transform(PointCloud(whole.xyz, labels, whole.vertex), rng)[1].numpy()[:, 0] > 0  # of the points it takes
    found = saliency(model, xyz[None], rgb[None], side.target)[0]
    heat = found[knn(xyz[None], xyz[None], min(NEAR, len(xyz))).idx[0]].mean(1).numpy()
    heat = heat / max(float(np.percentile(heat, BRIGHT)), 1e-12)
    colours = ((rgb.numpy() + 0.5) * 255).round().clip(0, 255).astype(np.uint8)
    taken = PointCloud(xyz.numpy(), colours, np.where(body, 0, -1).astype(np.int32))
    crop = enlarge(crop_of(whole, record)) if record.cam[0] > 0 else View(whole).draw()
    return [
        Panel("crop", crop, side.frame),
        Panel("cloud", View(taken, *TURNED).draw()),
        Panel("what counts, front", View(taken, *FRONT).draw(heat)),
        Panel("turned", View(taken, *TURNED).draw(heat)),
        Panel("side", View(taken, *SIDE).draw(heat)),
    ]


def _activated(model: Any, side: _Side, dataset: CloudDataset | ImageDataset) -> list[Panel]:
    """A crop, what of it counts in all, and what for each part of the descriptor; what speaks against is left out."""
    pixels = side.pixels(dataset, model)
    maps = activation_maps(model, pixels[None].float() / 255, side.target)
    crop = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize(SMALL[::-1], Image.Resampling.BICUBIC)
    every = {"all parts": torch.stack(list(maps.values())).sum(0), **maps}
    heat = {name: values[0].clamp(min=0).numpy() for name, values in every.items()}
    panels = [Panel(name, draw_heat(crop, values / max(float(values.max()), 1e-12))) for name, values in heat.items()]
    return [Panel("crop", crop, side.frame), *panels]


def _lines(
    model: Any, query: _Side, match: _Side, dataset: CloudDataset | ImageDataset, clouds: CloudDataset | None
) -> list[Panel]:
    """Both crops with their lines, and both clouds."""
    shape = model.map_shape[1:]
    maps = [_descriptor(side.features, side.row).unflatten(0, model.map_shape) for side in (query, match)]
    found = position_matches(model, *maps)
    strength = (found.contribution.clamp(min=0) / found.contribution.max().clamp(min=1e-12)).numpy()
    left, right = (enlarge(side.pixels(dataset, model).permute(1, 2, 0).numpy()) for side in (query, match))
    start, end = (((place.numpy() + 0.5) / shape * SIZE)[:, ::-1] for place in (found.query, found.gallery))
    panels = [Panel("crops", draw_matches(left, right, start, end, strength), match.frame)]
    if clouds is not None:
        views, points = [], []
        for side, places in ((query, found.query), (match, found.gallery)):
            cloud, record = side.cloud(clouds)
            views.append(View(cloud, *TURNED))
            points.append(points_at(cloud, record, places, shape))
        both = (points[0] >= 0) & (points[1] >= 0)
        start, end = (
            view.project(view.cloud.xyz[index[both]].astype(np.float64))[:, :2]
            for view, index in zip(views, points, strict=True)
        )
        left, right = (view.draw() for view in views)
        panels.append(Panel("clouds", draw_matches(left, right, start, end, strength[both])))
    return panels
