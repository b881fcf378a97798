"""QAConv: two images are compared by the best match of every position of one map among those of the other.

Source: Liao and Shao, "Interpretable and Generalizable Person Re-Identification with Query-Adaptive Convolution and
Temporal Lifting", ECCV 2020, and the code published with it, ShengcaiLiao/QAConv: version 1.0 is the paper's, version
2.1 that of Liao and Shao, "Graph Sampling Based Deep Metric Learning for Generalizable Person Re-Identification", 2022.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import match_maps
from ..ops.arguments import check_int
from ..retrieval.features import Features, check_model
from .image_model import Form, Heads, ImageModel
from .resnet import ResNet

Version = Literal["1.0", "2.1"]

CHANNELS = 128  # of a map
STRIDE = 16  # of a map
MARGIN = 16.0  # of the triplets of version 2.1, between scores
MEMORY = "class_memory"
BLOCK = 128  # maps on either side that are matched at once: 24 MiB of maxima for 384 x 128 pixels
FINE = 32  # the same on the diagonal of a set with itself, of whose blocks half is matched in vain


class Correspondences(NamedTuple):
    """What the positions (h, w) of a query map find in a gallery map. place: (h, w, 2) int64, row and column of the
    most similar position there, the first of equals; similarity: (h, w), its cosine; contribution: (h, w), what it adds
    to the output of the matcher's FC layer.
    """

    place: Tensor
    similarity: Tensor
    contribution: Tensor


class Matcher(nn.Module):
    """The maxima of pairs of maps, (Q, G, 2, positions) as of `match_maps`, to logits (Q, G): BN, FC, BN.

    symmetric: one FC layer for both halves, which are added, so that in eval mode a pair has the same logit in either
    order, to the last bit; it starts as the mean. Otherwise it is over both, first the half of the gallery's positions,
    as in the published code, in whose training the class memory is the gallery.
    """

    def __init__(self, positions: int, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.bn = nn.BatchNorm1d(1)
        self.fc = nn.Linear(positions if symmetric else 2 * positions, 1)
        self.logit_bn = nn.BatchNorm1d(1)
        if symmetric:
            nn.init.constant_(self.fc.weight, 1 / positions)

    def forward(self, best: Tensor) -> Tensor:
        pairs = best.shape[:2]
        with torch.autocast(best.device.type, enabled=False):  # which would round logits to half precision
            best = best.to(self.fc.weight.dtype)
            best = self.bn(best.reshape(-1, 1, best.shape[3])).view(best.shape)
            if self.symmetric:  # the sums of the halves, and no matrix product: neither depends on the order
                logits = (best.sum(2) * self.fc.weight[0]).sum(2) + 2 * self.fc.bias
            else:
                logits = self.fc(best.flip(2).flatten(2))
            return self.logit_bn(logits.reshape(-1, 1)).view(pairs)

    def query_weight(self) -> Tensor:
        """(positions,): the weights of the half of the query's positions."""
        return self.fc.weight[0] if self.symmetric else self.fc.weight[0].chunk(2)[1]


class QAConv(ImageModel):
    """QAConv on any backbone.

    A neck brings the backbone's map to `channels`, and each position of it to length 1. In eval mode the descriptor is
    that map, flattened, of which `scores` makes similarities; its cosine, which compares equal positions alone, is not
    what was trained. Heads.feats is the map (B, C, h, w).

    Version 1.0 compares a batch with the class memory, a map of each training id, 0 before its first image, and
    Heads.logits are those of all images with all ids. Version 2.1 compares the images of a batch with each other, in
    `loss`; the statistics of its backbone's BatchNorm stay as they are in training.

    Args:
        backbone: (B, 3, H, W) to a map (B, `backbone.channels`, H / 16, W / 16).
        num_classes: training ids; 0 for no class memory.
        version: of the published code.
        height, width: of the images, in pixels.
        channels: of the map.
        form: whose way it is where paper and published code differ, unless one of the following says another:
        neck: the paper's 1x1 convolution; the code's of 3x3 pixels without bias, and BatchNorm.
        empty: ids without an image in the class memory are negatives in the code of version 1.0; with "paper", of
            which it says nothing, they count in no sum, as in later code.

    The neck of version 2.1 is a 3x3 convolution with bias. New layers start as torch makes them, but for its matcher.

    Raises:
        ValueError: num_classes or channels out of range, another version, height or width no multiple of 16, another
            word for a form, or the paper's for version 2.1; when called, images of another size.

    Source: as this file, sec. 3. The paper's sigmoid is taken of a tenth of the logit in the code, here too: the order
    is the same.
    """

    size = (384, 128)
    resample = "bicubic"
    normalised = False
    backbone = ("base.",)
    classifiers = (MEMORY,)
    class_memory: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 0,
        *,
        version: Version = "1.0",
        height: int = 384,
        width: int = 128,
        channels: int = CHANNELS,
        form: Form = "official",
        neck: Form | None = None,
        empty: Form | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if version not in get_args(Version):
            raise ValueError(f"version must be '1.0' or '2.1', got {version!r}")
        for side, pixels in (("height", height), ("width", width)):
            if pixels < STRIDE or pixels % STRIDE:
                raise ValueError(f"{side} must be a multiple of {STRIDE}, got {pixels}")
        neck, empty = (form if way is None else way for way in (neck, empty))
        for name, way in (("form", form), ("neck", neck), ("empty", empty)):
            if way not in get_args(Form):
                raise ValueError(f"{name} must be 'official' or 'paper', got {way!r}")
            if version == "2.1" and way == "paper":
                raise ValueError(f"{name} must be 'official' for version 2.1, which is not the paper's, got 'paper'")
        self.version, self.empty, self.num_classes = version, empty, num_classes
        self.size = self._pixels = (height, width)
        self.map_shape = channels, height // STRIDE, width // STRIDE
        self.base = backbone
        inputs: Any = backbone.channels
        self.neck_conv = nn.Conv2d(inputs, channels, 1)
        if neck == "official":
            self.neck_conv = nn.Conv2d(inputs, channels, 3, padding=1, bias=version == "2.1")
        normed = neck == "official" and version == "1.0"
        self.neck_bn = nn.BatchNorm2d(channels) if normed else nn.Identity()
        self.matcher = Matcher(math.prod(self.map_shape[1:]), symmetric=version == "2.1")
        if version == "1.0" and num_classes:
            self.register_buffer(MEMORY, torch.zeros(num_classes, *self.map_shape))
        self.train()

    def train(self, mode: bool = True) -> QAConv:
        super().train(mode)
        if self.version == "2.1":
            self.base.eval()
        return self

    def describe(self, images: Tensor) -> Tensor | Heads:
        if images.shape[2:] != self._pixels:
            raise ValueError(f"images must have {self._pixels[0]} x {self._pixels[1]} pixels, got {_sides(images)}")
        maps = self.neck_bn(self.neck_conv(self.base(images)))
        maps = F.normalize(maps.to(self.neck_conv.weight.dtype), dim=1)  # from what autocast leaves
        if not self.training:
            return maps.flatten(1)
        if self.version == "2.1" or not self.num_classes:
            return Heads((maps,), ())
        # A copy, of which the gradient is, when `loss` has written the memory.
        best = match_maps(maps.flatten(2), self.class_memory.flatten(2).clone())
        return Heads((maps,), (self.matcher(best),))

    def loss(self, output: Heads, labels: Tensor) -> dict[str, Tensor]:
        """focal, in version 1.0: binary cross-entropy of the pairs with the class memory, each times the square of what
        its probability is short of 1, the sum over ids, the mean over images. Then the memory takes the maps of the
        batch, of several images of one id the last.

        triplet, in version 2.1: batch-hard on scores, relu(highest negative - lowest positive + 16), 0 for images that
        lack either, the mean over images.

        Args:
            output: of training mode. labels: (B,) int64 in [0, num_classes).

        Raises:
            TypeError: labels not int64. ValueError: another shape, a label outside the classes, a model without any.

        Source: as this file, sec. 3.3 and eq. 1, 2, or ``reid/loss/triplet_loss.py``.
        """
        maps = output.feats[0]
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be an int64 tensor, got {labels.dtype}")
        if labels.shape != maps.shape[:1]:
            raise ValueError(f"labels must have shape ({len(maps)},), got {tuple(labels.shape)}")
        self.check_classes(labels, self.num_classes)
        same = labels[:, None] == labels
        if self.version == "2.1":
            return {"triplet": self._triplet(self.matcher(match_maps(maps.flatten(2), maps.flatten(2))), same)}
        (logits,) = output.logits
        positive = labels[:, None] == torch.arange(self.num_classes, device=labels.device)
        right = torch.where(positive, logits, -logits)
        terms = torch.sigmoid(-right).square() * F.softplus(-right)
        if self.empty == "paper":
            terms = terms * self.class_memory.flatten(1).any(1)
        with torch.no_grad():
            last = ~same.triu(1).any(1)
            self.class_memory[labels[last]] = maps.detach()[last].to(self.class_memory.dtype)
        return {"focal": terms.sum(1).mean()}

    @staticmethod
    def _triplet(scores: Tensor, same: Tensor) -> Tensor:
        positive = same ^ torch.eye(len(same), dtype=torch.bool, device=same.device)
        lowest = scores.masked_fill(~positive, math.inf).amin(1)
        highest = scores.masked_fill(same, -math.inf).amax(1)
        counted = positive.any(1) & ~same.all(1)
        return torch.where(counted, F.relu(highest - lowest + MARGIN), 0.0).sum() / len(same)

    def of_backbone(self, key: str) -> tuple[str, ...]:
        return (f"base.{key}",)

    def scores(self, q: Features, g: Features, *, shortlist: int | None = None) -> np.ndarray:
        """The similarities of all queries with the gallery, (Q, G) float32, in eval mode.

        Version 1.0 gives sigmoid(logit / 10), in [0, 1], which depends on the order of a pair; version 2.1 the logit,
        which does not, but for rounding.

        Maps are matched `BLOCK` by `BLOCK`, those of the gallery in float16, which moves scores in [0, 1] by less than
        1e-3; beside the result memory does not grow with their numbers. Where q is g each pair is matched in one order,
        which gives the scores of both: half the work.

        Args:
            q, g: of this model; their maps may be scaled, as `extract` does.
            shortlist: an approximation: of each row, score only as many items, those whose mean over positions is the
                nearest by cosine. All others get the lowest of these scores less (2 - cosine): they come after them, in
                the order of the cosine, and their values mean nothing else. None: all.

        Raises:
            TypeError: shortlist no int. ValueError: features of another length, or of two models, or a memory map with
                NaN or infinity; shortlist below 1.
        """
        length = math.prod(self.map_shape)
        for name, features in (("q", q), ("g", g)):
            if features.feats.shape[1] != length:
                shape = " x ".join(map(str, self.map_shape))
                raise ValueError(f"{name} must have {length} = {shape} numbers each, got {features.feats.shape[1]}")
        check_model(q, g)
        if shortlist is not None:
            shortlist = check_int("shortlist", shortlist, 1)
        out = np.empty((len(q), len(g)), np.float32)
        with self._judging():
            if shortlist is None or shortlist >= len(g):
                self._match_all(q, g, out)
            else:
                self._match_nearest(q, g, out, shortlist)
        return out

    def distances(self, q: Features, g: Features) -> np.ndarray:
        """sigmoid(-logit / 10), (Q, G) float32 in [0, 1], as `rerank` takes those of q and q, q and g, and g and g.

        Version 2.1 ranks by -logit in its code, which may be negative; the order is the same. Arguments and errors as
        of `scores`.
        """
        scores = self.scores(q, g)
        return 1 - scores if self.version == "1.0" else torch.sigmoid(torch.from_numpy(scores) / -10).numpy()

    def correspondences(self, query_map: Tensor, gallery_map: Tensor) -> Correspondences:
        """What each position of one map finds in another, for drawing.

        Args:
            query_map, gallery_map: (C, h, w) of `map_shape`, as the descriptor unflattened.

        Raises: ValueError: another shape.
        """
        for name, one in (("query_map", query_map), ("gallery_map", gallery_map)):
            if one.shape != self.map_shape:
                raise ValueError(f"{name} must have shape {self.map_shape}, got {tuple(one.shape)}")
        with self._judging():
            query, gallery = (F.normalize(one.flatten(1), dim=0) for one in (query_map, gallery_map))
            similarity, place = (query.T @ gallery).max(1)
            contribution = self.matcher.query_weight() * self.matcher.bn(similarity.view(1, 1, -1))[0, 0]
        rows, columns = self.map_shape[1:]
        place = torch.stack((place // columns, place % columns), 1)
        return Correspondences(*(x.unflatten(0, (rows, columns)) for x in (place, similarity, contribution)))

    @contextmanager
    def _judging(self) -> Iterator[None]:
        """In eval mode, and in inference mode."""
        mode = self.training
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(mode)

    def _maps(self, features: Features, rows: slice | np.ndarray) -> Tensor:
        """(n, C, positions), each position of length 1."""
        feats = torch.from_numpy(np.array(features.checked(rows))).to(self.neck_conv.weight.device)
        return F.normalize(feats.unflatten(1, self.map_shape).flatten(2), dim=1)

    def _score(self, best: Tensor) -> np.ndarray:
        logits = self.matcher(best)
        return (logits if self.version == "2.1" else torch.sigmoid(logits / 10)).float().cpu().numpy()

    def _match_all(self, q: Features, g: Features, out: np.ndarray) -> None:
        for rows, columns in _triangle(len(q)) if q is g else _rectangle(len(q), len(g)):
            best = match_maps(self._maps(q, rows), self._maps(g, columns).half())
            out[rows, columns] = self._score(best)
            if q is g:  # what a finds in b is what b lets a find
                later = np.arange(*columns.indices(len(g)))[:, None] > np.arange(*rows.indices(len(g)))
                out[columns, rows] = np.where(later, self._score(best.flip(2)).T, out[columns, rows])

    def _match_nearest(self, q: Features, g: Features, out: np.ndarray, shortlist: int) -> None:
        means = np.concatenate([self._means(g, slice(first, first + BLOCK)) for first in range(0, len(g), BLOCK)])
        for start in range(0, len(q), BLOCK):
            rows = slice(start, start + BLOCK)
            queries, cosines = self._maps(q, rows), self._means(q, rows) @ means.T
            for row, query, cosine in zip(out[rows], queries, cosines, strict=True):
                near = np.argsort(-cosine, kind="stable")[:shortlist]
                scores = [
                    self._score(match_maps(query[None], self._maps(g, near[first : first + BLOCK]).half()))[0]
                    for first in range(0, shortlist, BLOCK)
                ]
                found = np.concatenate(scores)
                row[:] = found.min() - (2 - cosine)
                row[near] = found

    def _means(self, features: Features, rows: slice) -> np.ndarray:
        """(n, C) unit means over positions."""
        return F.normalize(self._maps(features, rows).mean(2), dim=1).cpu().numpy()


def _rectangle(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    for first in range(0, columns, BLOCK):
        for start in range(0, rows, BLOCK):
            yield slice(start, start + BLOCK), slice(first, first + BLOCK)


def _triangle(count: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of all pairs in one order at least."""
    for first in range(0, count, BLOCK):
        for start in range(0, first, BLOCK):
            yield slice(start, start + BLOCK), slice(first, first + BLOCK)
        for start in range(first, min(count, first + BLOCK), FINE):
            end = min(start + FINE, first + BLOCK)
            yield slice(first, end), slice(start, end)


def _sides(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[2:]))


def qaconv50(
    num_classes: int = 0,
    *,
    form: Form = "official",
    version: Version = "1.0",
    height: int = 384,
    width: int = 128,
    neck: Form | None = None,
    empty: Form | None = None,
) -> QAConv:
    """QAConv on ResNet-50 up to layer3: 9,723,200 parameters and 389 of the matcher. See QAConv."""
    base = ResNet(50, stages=3)
    return QAConv(base, num_classes, form=form, version=version, height=height, width=width, neck=neck, empty=empty)


def qaconv152(
    num_classes: int = 0,
    *,
    form: Form = "official",
    version: Version = "1.0",
    height: int = 384,
    width: int = 128,
    neck: Form | None = None,
    empty: Form | None = None,
) -> QAConv:
    """QAConv on ResNet-152 up to layer3: 44,358,976 parameters and 389 of the matcher. See QAConv."""
    base = ResNet(152, stages=3)
    return QAConv(base, num_classes, form=form, version=version, height=height, width=width, neck=neck, empty=empty)


def qaconv50_ibn_b(
    num_classes: int = 0,
    *,
    form: Form = "official",
    version: Version = "2.1",
    height: int = 384,
    width: int = 128,
    neck: Form | None = None,
    empty: Form | None = None,
) -> QAConv:
    """QAConv on ResNet-50 with IBN-b, as the published version 2.1: 9,724,608 parameters and 197 of the matcher. See
    QAConv.
    """
    base = ResNet(50, ibn="b", stages=3)
    return QAConv(base, num_classes, form=form, version=version, height=height, width=width, neck=neck, empty=empty)


def from_official(
    state: Mapping[str, Tensor], criterion: Mapping[str, Tensor]
) -> tuple[str, dict[str, Any], dict[str, Tensor], int]:
    """A published checkpoint's ``model`` and ``criterion`` as (name, kwargs, state, num_classes): which factory here,
    with what, and the state dict of the model that it makes of them. layer4 and fc, which QAConv does not use, are left
    out; the maps in the class memory are brought to length 1, as the first code did only when it read them.

    Raises: ValueError: the first key that is missing or unknown, or of another shape than in versions 1.0 and 2.x.

    Source: as this file.
    """
    shared = any(key.startswith("matcher.") for key in criterion)
    version: Version = "2.1" if shared and "neck_bn.weight" not in state else "1.0"
    blocks = {found[1] for key in state if (found := re.match(r"base\.layer3\.(\d+)\.", key))}
    ibn = "b" if "base.bn1.weight" in state and "base.bn1.running_mean" not in state else None
    known: dict[tuple[int, str | None], tuple[str, Callable[..., QAConv]]] = {
        (6, None): ("qaconv50", qaconv50),
        (36, None): ("qaconv152", qaconv152),
        (6, "b"): ("qaconv50_ibn_b", qaconv50_ibn_b),
    }
    if (len(blocks), ibn) not in known:
        raise ValueError(f"base.layer3 must have 6 blocks, or without IBN 36, got {len(blocks)}")
    name, make = known[len(blocks), ibn]
    kwargs: dict[str, Any] = {} if (version == "2.1") == (ibn == "b") else {"version": version}
    rows, columns, num_classes = 24, 8, 0
    if version == "1.0":
        memory = criterion.get(MEMORY)
        if memory is None or memory.dim() != 4 or 0 in memory.shape:
            raise ValueError(f"{MEMORY} must be (ids, channels, rows, columns), got {_shape(memory)}")
        num_classes, _, rows, columns = memory.shape
    elif (weight := criterion.get("matcher.fc.weight")) is not None and weight.dim() == 2 and weight.shape[1]:
        # The file says how many positions there are; the published sizes are three times as high as wide.
        columns = max(1, math.isqrt(weight.shape[1] // 3))
        rows = 3 * columns
    if (rows, columns) != (24, 8):
        kwargs |= {"height": STRIDE * rows, "width": STRIDE * columns}
    with torch.device("meta"):
        own = cast("dict[str, Tensor]", make(num_classes, **kwargs).state_dict())
    theirs = {key: (key, tensor) for key, tensor in state.items() if not key.startswith(("base.layer4.", "base.fc."))}
    for key, tensor in criterion.items():
        inside = key == MEMORY or shared
        theirs[key if inside else f"matcher.{key}"] = key, tensor
    published = {key: key if shared else key.removeprefix("matcher.") for key in own}
    for key, expected in own.items():
        if key not in theirs:
            raise ValueError(f"{published[key]} is missing for {name}, version {version}")
        if theirs[key][1].shape != expected.shape:
            got = _shape(theirs[key][1])
            raise ValueError(f"{published[key]} must have shape {_shape(expected)} for {name}, got {got}")
    for key, (published_key, _) in theirs.items():
        if key not in own:
            raise ValueError(f"{published_key} is unknown to {name}, version {version}")
    tensors = {key: theirs[key][1] for key in own}
    if MEMORY in tensors:
        tensors[MEMORY] = F.normalize(tensors[MEMORY], dim=1)
    return name, kwargs, tensors, num_classes


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)
