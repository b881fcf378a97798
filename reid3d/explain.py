"""Why two are alike to a model: what of clouds and crops their similarity comes from.

Descriptors are compared by cosine: `saliency` says which points of a cloud it depends on, `activation_maps` which
places of a crop it is made of, part by part. QAConv compares places themselves: `position_matches` says which with
which, and `points_at` where they are in the clouds of the crops. `reid3d view --explain` draws all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cloud import PointCloud
from .io import Record
from .ops.arguments import check_int

__all__ = ["Matches", "activation_maps", "points_at", "position_matches", "saliency"]


class Matches(NamedTuple):
    """M places of a query's map and what they match in a gallery item's. query, gallery: (M, 2) int64, row and column;
    similarity: (M,), cosine in [-1, 1]; contribution: (M,), what each adds to the output of the matcher's FC layer.
    """

    query: Tensor
    gallery: Tensor
    similarity: Tensor
    contribution: Tensor


def saliency(model: nn.Module, xyz: Tensor, rgb: Tensor, target: Tensor | None = None) -> Tensor:
    """How much the similarity of B clouds with others depends on each of their points: (B, N), >= 0.

    |gradient * input|, summed over x, y, z, red, green and blue: to first order, how far the cosine moves when the
    point moves towards the mean of the cloud and its colour towards grey. Sampling and neighbourhoods count as given.
    Points that the network does not look at have 0.

    Args:
        model: of clouds; used in eval mode, given back as it came, and nothing is left in its gradients.
        xyz, rgb: (B, N, 3), as its `forward` takes them.
        target: (B, D) or (D,), descriptors of any length: those the clouds are compared with. None: instead of a
            cosine, the logarithm of the length of the cloud's own descriptor, for with itself every cosine is 1.

    Raises: ValueError: a model of images, or a target of another shape.
    """
    if getattr(model, "inputs", "cloud") != "cloud":
        raise ValueError("model must take clouds, got one that takes images: see activation_maps")
    with _judging(model), torch.inference_mode(False), torch.enable_grad():
        inputs = [values.detach().clone().requires_grad_() for values in (xyz, rgb)]
        feats = model(*inputs)
        of = _length(feats).log() if target is None else F.cosine_similarity(feats, _like(target, feats))
        grads = torch.autograd.grad(of.sum(), inputs, materialize_grads=True)
    (by_place, by_colour) = ((grad * x.detach()).abs().sum(2) for grad, x in zip(grads, inputs, strict=True))
    return by_place + by_colour


def activation_maps(model: nn.Module, images: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
    """What each place of the last maps adds to the similarity of B crops with others: {part: (B, h, w)}.

    The cosine of two descriptors is a sum over their parts: PLR-OSNet's four strips and global vector, each q of the
    relation network, each feature of RMGL. Of each part, activation times the gradient of its summand, summed over the
    channels of the map that it is pooled from, with the lengths of the descriptors held: behind a mean all places have
    their share, behind a maximum the places where it lies. Where only linear layers follow, as in PLR-OSNet and RMGL,
    a map adds up to the summand but for what biases and norms add, which is nowhere in the image. Negative values speak
    against the other. Of a method whose descriptor is a mean with that of the mirror image, the places of both count.

    Args:
        model: of images, with descriptors; used in eval mode, given back as it came, and nothing is left in its
            gradients.
        images: (B, 3, H, W) RGB in [0, 1], as its `forward` takes them.
        target: (B, D) or (D,), descriptors of any length: those the crops are compared with. None: the crops' own, of
            which the maps say what they are made of.

    Raises: ValueError: a model of clouds, one that compares places (QAConv), or a target of another shape.
    Source: HiResCAM (Draelos and Carin, 2020) of the similarity in place of a class score, as Stylianou et al.,
        "Visualizing Deep Similarity Networks", WACV 2019, take it apart.
    """
    if getattr(model, "inputs", "cloud") != "image":
        raise ValueError("model must take images, got one that takes clouds: see saliency")
    net: Any = model
    if hasattr(model, "scores"):
        raise ValueError("model must compare descriptors, got one that compares places: see position_matches")
    with _judging(model), torch.inference_mode(False):
        with torch.no_grad():
            views = [images.clone(), images.flip(3)] if net.flip else [images.clone()]
            maps = [net.last_maps(net.prepare(view)) for view in views]
            feats = [net.from_maps(of_view) for of_view in maps]
            total = torch.stack(feats).sum(0)
            weight = F.normalize(total if target is None else _like(target, total)) / _length(total)
        shares = [_shares(net, *view, weight) for view in zip(maps, feats, strict=True)]
    if len(shares) == 1:
        return shares[0]
    return {name: share + shares[1][name].flip(2) for name, share in shares[0].items()}


def _shares(net: Any, maps: tuple[Tensor, ...], feats: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Of each part: activation times the gradient of the sum of its numbers times their weights."""
    with torch.enable_grad():
        maps = tuple(last.detach().requires_grad_() for last in maps)
        found, start = {}, 0
        for name, part in net.parts(maps).items():
            here = slice(start, start + part.feats.shape[1])
            # What brings a part to its length is held, else no map that is scaled as a whole would change anything.
            factor = _length(feats[:, here]) / _length(part.feats.detach())
            summand = (part.feats * factor * weight[:, here]).sum()
            last = maps[part.map]
            (grad,) = torch.autograd.grad(summand, last, retain_graph=True)
            found[name] = (grad * last.detach()).sum(1)
            start = here.stop
    return found


def position_matches(model: nn.Module, query_map: Tensor, gallery_map: Tensor, count: int = 24) -> Matches:
    """The matches of places by which QAConv finds two crops alike, those that add most first.

    Every place of the query's map has a match (`QAConv.correspondences`); of those that share one, the most similar
    counts, and of these the `count` that add most to the output of the matcher. There may be fewer.

    Args:
        model: a QAConv.
        query_map, gallery_map: (C, h, w) of its `map_shape`, as the descriptors unflattened.
        count: >= 1.

    Raises: ValueError: another model, maps of another shape, count < 1.
    """
    if not hasattr(model, "correspondences"):
        raise ValueError(f"model must compare places, as QAConv does, got {type(model).__name__}")
    count, net = check_int("count", count, 1), model
    found = net.correspondences(query_map, gallery_map)  # type: ignore[operator]
    rows, columns = found.similarity.shape
    similarity, contribution = found.similarity.flatten(), found.contribution.flatten()
    place = found.place.flatten(0, 1)
    matched = place[:, 0] * columns + place[:, 1]
    best = similarity.new_full((rows * columns,), -2.0).scatter_reduce(0, matched, similarity, "amax")
    mine = (similarity == best[matched]).nonzero()[:, 0]
    chosen = mine[contribution[mine].argsort(descending=True, stable=True)][:count]
    query = torch.stack((chosen // columns, chosen % columns), 1)
    return Matches(query, place[chosen], similarity[chosen], contribution[chosen])


def points_at(cloud: PointCloud, record: Record, places: Tensor, shape: tuple[int, int]) -> np.ndarray:
    """The points of a crop's cloud at places of a map of the crop: (M,) int64 indices, -1 where there is none.

    The camera of the record says which pixel a point is of, and the pixel which cell of the map. Of a cell's points,
    those of the body if it has any, it is the one nearest to the cell's centre, in cells.

    Args:
        places: (M, 2), row and column. shape: (h, w), rows and columns of the map, over the whole crop.

    Raises: ValueError: a place outside the map.
    """
    cells = np.array(shape)
    wanted = places.cpu().numpy()
    if wanted.ndim != 2 or wanted.shape[1] != 2 or ((wanted < 0) | (wanted >= cells)).any():
        raise ValueError(f"places must be (M, 2), rows and columns of a map of {shape[0]} x {shape[1]}, got {wanted}")
    at = record.project(cloud.xyz)[:, ::-1] / record.size * cells  # row and column, in cells
    inside = ((at >= 0) & (at < cells)).all(1)
    found = np.full(len(wanted), -1)
    for i, place in enumerate(wanted):
        here = np.flatnonzero(inside & (np.floor(at) == place).all(1))
        body = here[cloud.vertex[here] >= 0]
        here = body if len(body) else here
        if len(here):
            found[i] = here[np.square(at[here] - place - 0.5).sum(1).argmin()]
    return found


@contextmanager
def _judging(model: nn.Module) -> Iterator[None]:
    """In eval mode, each module given back in the mode it came in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _like(target: Tensor, feats: Tensor) -> Tensor:
    """A target for each of the features (B, D)."""
    if target.shape not in (feats.shape, feats.shape[1:]):
        raise ValueError(f"target must be ({feats.shape[1]},) or {tuple(feats.shape)}, got {tuple(target.shape)}")
    return target.detach().to(feats).expand_as(feats)


def _length(feats: Tensor) -> Tensor:
    return feats.norm(dim=1, keepdim=True).clamp_min(1e-12)
