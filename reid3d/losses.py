"""Metric losses: what pulls descriptors of one person together and pushes those of others apart.

In all of them feats is (B, D) of any floating dtype, read as float32 unless it is float64, under autocast too, and
labels (B,) int64 on the same device. The result is a scalar. Of finite feats, whose squares are finite too, it is
finite and so is its gradient, copies of a sample and zero vectors (whose direction is the zero vector) included; where
the batch holds no pair to learn from, both are exactly 0. Values of tensors are never waited for, so that a step can be
captured in a CUDA graph; NaN is therefore not looked for. Beyond feats, memory is O(B * B).

Label smoothing needs no loss of its own: it is ``torch.nn.functional.cross_entropy(label_smoothing=)``.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def circle_loss(
    feats: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.25,
    gamma: float = 64.0,
    over: Literal["anchors", "batch"] = "anchors",
) -> Tensor:
    """Circle loss on cosine similarities s: softplus(LSE of the negative logits + LSE of the positive logits).

    A positive pair has the logit -gamma * relu(1 + margin - s) * (s - 1 + margin), a negative one gamma *
    relu(s + margin) * (s - margin); the relu is a weight, a constant to the gradient.

    over="anchors": the paper's. Every sample is an anchor with the positive and negative pairs that it is in; the mean
    over the anchors that have both. over="batch": what the published OG-Net was trained with. All pairs of the batch,
    each once, in one softplus, divided by B.

    Args:
        margin: m, finite and >= 0. gamma: the scale, finite and > 0.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or range that does not fit, another `over`.

    Source: Sun et al., "Circle Loss", CVPR 2020, eq. 5 and 6; ``train_M.py`` of layumi/person-reid-3d.
    """
    feats = _checked(feats)
    _check_labels(labels, feats)
    _check_number("margin", margin, positive=False)
    _check_number("gamma", gamma, positive=True)
    if over not in ("anchors", "batch"):
        raise ValueError(f"over must be 'anchors' or 'batch', got {over!r}")
    unit = _unit(feats)
    sim = _matmul(unit, unit.T)
    positive = -gamma * F.relu(1 + margin - sim.detach()) * (sim - 1 + margin)
    negative = gamma * F.relu(sim.detach() + margin) * (sim - margin)
    same, other = _pairs(labels)
    if over == "batch":
        pairs = _logsumexp(negative, other.triu(), (0, 1)) + _logsumexp(positive, same.triu(), (0, 1))
        return _softplus(pairs) / max(len(feats), 1)
    anchors = _logsumexp(negative, other, 1) + _logsumexp(positive, same, 1)
    return _mean(_softplus(anchors), same.any(1) & other.any(1))


def triplet_loss(feats: Tensor, labels: Tensor, *, margin: float | None = 0.3) -> Tensor:
    """Batch-hard triplet loss: relu(farthest positive - nearest negative + margin) in Euclidean distance, not squared.

    The mean over the anchors that have a positive and a negative, those within the margin included. feats are taken as
    they are, not normalised. Equally hard samples share the gradient; between copies of a sample, whose distance has
    none, it is 0.

    Args:
        margin: finite and >= 0, or None for the soft margin, softplus(farthest positive - nearest negative).

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or range that does not fit.

    Source: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017, eq. 5 and sec. 2.
    """
    feats = _checked(feats)
    _check_labels(labels, feats)
    if margin is not None:
        _check_number("margin", margin, positive=False)
    same, other = _pairs(labels)
    dist = F.pad(_distances(feats), (0, 1))  # one more column, for a batch of none has no maximum
    farthest = dist.masked_fill(~F.pad(same, (0, 1)), -math.inf).amax(1)
    nearest = dist.masked_fill(~F.pad(other, (0, 1)), math.inf).amin(1)
    gap = farthest - nearest  # -inf where one is missing
    return _mean(_softplus(gap) if margin is None else F.relu(gap + margin), same.any(1) & other.any(1))


def contrastive_loss(feats: Tensor, labels: Tensor, *, margin: float = 1.0) -> Tensor:
    """Contrastive loss on Euclidean distances d of the normalised feats: d of positives, relu(margin - d) of negatives.

    The mean over the positive pairs that are apart, d > 0, plus the mean over the negative pairs within the margin:
    pairs that have nothing left to learn do not dilute the others. Distances are not squared, unlike in the paper.

    Args:
        margin: finite and >= 0; 2 is the largest distance there is.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or range that does not fit.

    Source: Hadsell et al., CVPR 2006, eq. 4, in the form of pytorch-metric-learning's ContrastiveLoss, which the
    published OG-Net code offers.
    """
    feats = _checked(feats)
    _check_labels(labels, feats)
    _check_number("margin", margin, positive=False)
    same, other = _pairs(labels)
    dist = _distances(_unit(feats))
    return _mean(dist, same & (dist > 0)) + _mean(margin - dist, other & (dist < margin))


def instance_loss(feats: Tensor, labels: Tensor | None = None, *, scale: float = 32.0) -> Tensor:
    """Instance loss: every sample is a class of its own, whose weight is its own direction.

    Cross-entropy of the logits scale * u u^T, u the normalised feats, where row i is of class i; the mean over rows.
    That takes samples of one person for different people, so with labels the samples of an identity are merged first:
    u holds one row an identity, the normalised mean of its normalised feats, and the mean is over identities.

    The loss pushes apart and never pulls together, with labels too. Another form in use, pytorch-metric-learning's,
    keeps the B rows and takes the rank of the label for the number of the right column, which is a column of another
    person unless the labels are 0, 1, ... in order.

    Args:
        labels: None where every sample is a class.
        scale: finite and > 0; 32 is the published training's.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or range that does not fit.

    Source: Zheng et al., "Dual-Path Convolutional Image-Text Embeddings with Instance Loss", TOMM 2020; within the
    batch, and with identities merged, as in layumi/Person_reID_baseline_pytorch, ``instance_loss.py``.
    """
    feats = _checked(feats)
    if labels is None:
        labels = torch.arange(len(feats), device=feats.device)
    _check_labels(labels, feats)
    _check_number("scale", scale, positive=True)
    same = labels[:, None] == labels
    first = ~same.tril(-1).any(1)  # rows that stand for their identity: a fixed shape, unlike a list of identities
    unit = _unit(_matmul(same.to(feats.dtype), _unit(feats)))  # a sum has the direction of the mean
    logits = scale * _matmul(unit, unit.T)
    # Cross-entropy is the softplus of what the other logits exceed the own one by: nothing cancels where it is small.
    others = first & ~torch.eye(len(first), dtype=torch.bool, device=first.device)
    return _mean(_softplus(_logsumexp(logits - logits.diagonal()[:, None], others, 1)), first)


def _checked(feats: Tensor) -> Tensor:
    """feats as float32 or float64."""
    if not isinstance(feats, Tensor) or not feats.is_floating_point():
        raise TypeError(f"feats must be a floating point tensor, got {_kind(feats)}")
    if feats.dim() != 2:
        raise ValueError(f"feats must have shape (B, D), got {tuple(feats.shape)}")
    return feats if feats.dtype == torch.float64 else feats.float()


def _check_labels(labels: Tensor, feats: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be an int64 tensor, got {_kind(labels)}")
    if labels.shape != feats.shape[:1]:
        raise ValueError(f"labels must have shape ({len(feats)},), as feats has rows, got {tuple(labels.shape)}")
    if labels.device != feats.device:
        raise ValueError(f"labels must be on the device of feats, {feats.device}, got {labels.device}")


def _kind(x: object) -> object:
    return x.dtype if isinstance(x, Tensor) else type(x).__name__


def _check_number(name: str, value: float, *, positive: bool) -> None:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not 0 <= value < math.inf or (positive and value == 0):
        rule = "greater than 0" if positive else "at least 0"
        raise ValueError(f"{name} must be finite and {rule}, got {value}")


def _pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) masks of the positive pairs, a sample with itself left out, and of the negative ones."""
    same = labels[:, None] == labels
    return same ^ torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


def _unit(feats: Tensor) -> Tensor:
    """feats of length 1. F.normalize would give a zero vector a gradient of 1e12."""
    length = torch.linalg.vector_norm(feats, dim=1, keepdim=True)
    return feats / torch.where(length > 1e-12, length, 1.0)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):  # which would round to half precision
        return a @ b


def _distances(feats: Tensor) -> Tensor:
    """(B, B) Euclidean distances from differences: a matrix product would cancel where they are small."""
    return torch.cdist(feats, feats, compute_mode="donot_use_mm_for_euclid_dist")


def _logsumexp(logits: Tensor, kept: Tensor, dim: int | tuple[int, int]) -> Tensor:
    """Over the logits `kept`; of none, so low a number that softplus is 0. The gradient of -inf would be NaN."""
    return logits.masked_fill(~kept, torch.finfo(logits.dtype).min).logsumexp(dim)


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # linear from 40, where float64 sees no difference; from torch's 20 it would


def _mean(losses: Tensor, counted: Tensor) -> Tensor:
    """The mean of the losses that are counted, 0 of none."""
    return torch.where(counted, losses, 0.0).sum() / counted.sum().clamp(min=1)
