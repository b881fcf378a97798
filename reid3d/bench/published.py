"""OG-Net as its published code computes it, in plain torch: every distance, every edge, Conv2d 1x1 and BatchNorm2d.

The twin of ``models/ognet.py`` that it is tested against and measured beside. It takes the parameters of our network,
and what to sample, group and search with.

Source: layumi/person-reid-3d, ``model_efficient.py``; for ``preset="paper"`` the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..models.ognet import BALLS, SLOPE, OGNet, sample_outside_hole


class Search(NamedTuple):
    """sample(xyz (B,N,3), m) -> (B,m); ball(centers, xyz, radius, k) and nearest(query (B,M,D), points (B,N,D), k) ->
    (B,M,k): indices into the N points.
    """

    sample: Callable[[Tensor, int], Tensor]
    ball: Callable[[Tensor, Tensor, float, int], Tensor]
    nearest: Callable[[Tensor, Tensor, int], Tensor]


def nearest_by_products(query: Tensor, points: Tensor, k: int) -> Tensor:
    """The published search: all distances, from |x|^2 - 2 x y + |y|^2, and the k smallest."""
    inner = -2 * torch.matmul(query, points.transpose(1, 2))
    distance = -query.square().sum(2, keepdim=True) - inner - points.square().sum(2).unsqueeze(1)
    return distance.topk(k, dim=2).indices


def nearest_exactly(query: Tensor, points: Tensor, k: int) -> Tensor:
    """Ours, where a difference must not come from the rounding of distances."""
    return ops.knn(query, points, k).idx


AS_PUBLISHED = Search(sample_outside_hole, ops.ball_query, nearest_by_products)
AS_OURS = AS_PUBLISHED._replace(nearest=nearest_exactly)

Running = dict[Any, tuple[Tensor, Tensor]]  # the new statistics of each BatchNorm


def forward(model: OGNet, xyz: Tensor, rgb: Tensor, search: Search = AS_PUBLISHED) -> tuple[Tensor, Running]:
    """The descriptor (B, 512), and the statistics that each BatchNorm has afterwards; the model stays as it is."""
    form, stages = model.form, list(model.stages)  # whose parts are known by no type
    running: Running = {}
    if model.flat:
        xyz = torch.stack((xyz[..., 0], xyz[..., 1], torch.zeros_like(xyz[..., 2])), 2)
    h = rgb
    stage: Any
    for stage in stages:
        h_in = h
        for layer in stage.convs:
            if form.k == 1:
                h = _norm(_conv(h.transpose(1, 2).unsqueeze(3), layer.linear), layer.norm, running).squeeze(3)
                h = _activate(h, form.paper).transpose(1, 2)
                continue
            space = torch.cat((xyz, h.detach()), 2) if stage.features else xyz
            h = _edge_conv(layer, h, search.nearest(space, space, form.k), running)
        if stage.abstraction is not None:
            picked = search.sample(xyz, stage.points).unsqueeze(2)
            centers, h_in = _take(xyz, picked), _take(h_in, picked)
            points, seen = (centers, _take(h, picked)) if form.paper else (xyz, h)
            parts = []
            for layer, (radius, k) in zip(stage.abstraction.branches, BALLS, strict=True):
                nearest = form.grouping == "nearest"
                idx = search.nearest(centers, points, k) if nearest else search.ball(centers, points, radius, k)
                parts.append(_branch(layer, centers, points, seen, idx, running))
            h = parts[0] + parts[1] + parts[2]
            xyz = centers
            if stage.project is not None:
                h_in = stage.project(h_in)
                h_in = h_in if form.paper else F.leaky_relu(h_in, SLOPE)
        if stage.skip is not None:
            share = stage.skip.sigmoid()
            h = share * h_in + (1 - share) * h
        elif stage.shortcut:
            h = h_in + h
    pooled = model.head.linear(torch.cat((h.max(1).values, h.mean(1)), 1))
    return _norm(pooled, model.head.norm, running), running


def _take(x: Tensor, picked: Tensor) -> Tensor:
    return x.gather(1, picked.expand(-1, -1, x.shape[2]))


def _group(x: Tensor, idx: Tensor) -> Tensor:
    """x (B, N, C), idx (B, M, K) -> (B, C, M, K)."""
    rows = (idx + x.shape[1] * torch.arange(len(x), device=x.device).view(-1, 1, 1)).flatten()
    return x.flatten(0, 1)[rows].view(*idx.shape, -1).permute(0, 3, 1, 2).contiguous()


def _conv(x: Tensor, linear: torch.nn.Linear) -> Tensor:
    return F.conv2d(x, linear.weight[:, :, None, None], linear.bias)


def _norm(x: Tensor, norm: torch.nn.BatchNorm1d, running: Running) -> Tensor:
    assert norm.running_mean is not None and norm.running_var is not None
    running[norm] = (norm.running_mean.clone(), norm.running_var.clone())
    return F.batch_norm(x, *running[norm], norm.weight, norm.bias, norm.training, 0.1, norm.eps)


def _activate(h: Tensor, paper: bool) -> Tensor:
    return F.relu(h) if paper else F.leaky_relu(h, SLOPE)


def _edge_conv(layer: Any, h: Tensor, idx: Tensor, running: Running) -> Tensor:
    form = layer.form
    near = _group(h, idx)
    own = h.transpose(1, 2).unsqueeze(3).expand_as(near)
    y = _conv(torch.cat((near - own, own), 1), layer.linear)
    if not form.paper:
        y = _norm(y, layer.norm, running)
    if layer.mix is not None:
        share = layer.mix.sigmoid()
        y = y.max(-1).values * share + y.mean(-1) * (1 - share)
    else:
        y = y.max(-1).values if form.mix == "max" else y.mean(-1)
    if form.paper:
        y = _norm(y, layer.norm, running)
    return _activate(y, form.paper).transpose(1, 2)


def _branch(layer: Any, centers: Tensor, xyz: Tensor, h: Tensor, idx: Tensor, running: Running) -> Tensor:
    x = _group(h, idx)
    if not layer.form.paper:
        x = torch.cat((_group(xyz, idx) - centers.transpose(1, 2).unsqueeze(3), x), 1)
    y = _norm(_conv(x, layer.linear1), layer.norm1, running)
    if layer.gate is not None:
        squeezed = y.mean((2, 3), keepdim=True) if layer.form.paper else y
        inside = _conv(squeezed, layer.gate.reduce)
        inside = F.relu(inside) if layer.form.paper else inside * inside.sigmoid()
        y = y * _conv(inside, layer.gate.expand).sigmoid()
    y = F.relu(_norm(_conv(y, layer.linear2), layer.norm2, running))
    return F.max_pool2d(y, (1, y.shape[3])).squeeze(3).transpose(1, 2)
