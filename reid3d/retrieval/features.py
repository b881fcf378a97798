"""Features of a split: what a model says of it, and all that retrieval reads.

A feature file is a safetensors file with the metadata {"format": "reid3d-features-1"} and the tensors feats (N, D)
float32, pids, camids and, where they are known, times (N,) int64, and text, uint8, the JSON of {"names", "source",
"split", "made_by"}: a header has not the room for millions of names, and its writer does not keep the order of several
strings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn
from torch.utils.data import DataLoader

from ..data.transforms import EvalTransform
from ..io import atomic_write
from ..progress import Progress

if TYPE_CHECKING:
    from ..data import CloudSplit

FORMAT = "reid3d-features-1"


@dataclass(frozen=True, eq=False)
class Features:
    """N feature vectors with the identities, cameras and names they belong to.

    feats: (N, D) float32, finite; `extract` gives unit length, and search and evaluate normalise anyhow.
    pids, camids: (N,) int64; pid -1 junk or unknown, 0 distractor; camid -1 unknown.
    names: N image names. times: (N,) int64, or None. source: folder of the clouds. split: name of the split there.
    made_by: the same for all features of the same weights, points and scales; "" unknown.

    Raises: TypeError for anything but NumPy arrays of these dtypes; ValueError for other shapes or non-finite values.
    """

    feats: np.ndarray
    pids: np.ndarray
    camids: np.ndarray
    names: list[str]
    times: np.ndarray | None = None
    source: str = ""
    split: str = ""
    made_by: str = ""

    def __post_init__(self) -> None:
        n = len(self.names)
        arrays = [("feats", "float32", 2), ("pids", "int64", 1), ("camids", "int64", 1)]
        for name, dtype, ndim in [*arrays, ("times", "int64", 1)] if self.times is not None else arrays:
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                raise TypeError(f"{name} must be a {dtype} NumPy array, got {getattr(array, 'dtype', type(array))}")
            if array.ndim != ndim or len(array) != n:
                shape = "(N,)" if ndim == 1 else "(N, D)"
                raise ValueError(f"{name} must have shape {shape} with N = {n} names, got {array.shape}")
        if bad := np.flatnonzero(~np.isfinite(self.feats).all(axis=1)).tolist():
            raise ValueError(f"feats must be finite, got NaN or infinity for {len(bad)} of {n}: {self.names[bad[0]]}")

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; equal features give equal bytes. Raises: OSError naming the file."""
        words = {"names": self.names, "source": self.source, "split": self.split, "made_by": self.made_by}
        text = json.dumps(words).encode()
        tensors = {"feats": self.feats, "pids": self.pids, "camids": self.camids, "text": np.frombuffer(text, np.uint8)}
        if self.times is not None:
            tensors["times"] = self.times
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        with atomic_write(path) as file:
            file.write(save(contiguous, {"format": FORMAT}))

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Read what `save` wrote. Raises: FileNotFoundError; ValueError when it is another or a damaged file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such feature file: {path}")
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            return cls(**json.loads(tensors.pop("text").tobytes()), **tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a reid3d feature file: {error}") from error


def extract(
    model: nn.Module,
    split: CloudSplit,
    *,
    points: int | None = None,
    scales: Sequence[float] = (1.0, 1.1),
    batch: int = 32,
    workers: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Features:
    """The features of every cloud of a split, in its order, each the unit vector along the sum over `scales` of
    model(scale * xyz, rgb).

    points: taken evenly from each cloud, without the background if the model's weights were trained so. None takes them
    as the split's transform says, and where none was chosen, as many as the model's weights were trained with. The
    default scales are those of the published OG-Net test code. The model is used in eval mode and given back in the
    mode it came in; device None leaves it where it is, any other moves it there.

    Raises: ValueError for an empty split, points < 1, no scales, batch < 1, workers < 0, a model of images, or a model
        that returns NaN.
    Source: OG-Net (Zheng et al., TNNLS 2022), test_M.py of the published code.
    """
    if getattr(model, "inputs", "cloud") != "cloud":
        raise ValueError(f"model must take clouds, got one whose inputs are {model.inputs!r}")
    if not len(split):
        raise ValueError(f"split must not be empty, got {split.name!r} of {split.root} with no clouds")
    if not scales:
        raise ValueError("scales must not be empty")
    if batch < 1 or workers < 0:
        raise ValueError(f"batch must be at least 1 and workers at least 0, got {batch} and {workers}")
    if points is None and split.transform is None:
        points = getattr(model, "points", None)
    if points is not None:
        if points < 1:
            raise ValueError(f"points must be at least 1, got {points}")
        split = split.with_transform(EvalTransform(points, getattr(model, "background", True)))
    if device is not None:
        model = model.to(device)
    where = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    loader = DataLoader(split, batch_size=batch, num_workers=workers, pin_memory=where.type == "cuda")
    feats: list[torch.Tensor] = []
    mode = model.training
    model.eval()
    try:
        with torch.inference_mode(), Progress(len(split), f"features of {split.name}", "cloud", progress) as bar:
            for xyz, rgb, *_ in loader:
                xyz, rgb = xyz.to(where, non_blocking=True), rgb.to(where, non_blocking=True)
                total = torch.stack([model(scale * xyz, rgb) for scale in scales]).sum(0)
                feats.append(nn.functional.normalize(total.float(), dim=1).cpu())
                bar.add(len(xyz))
    finally:
        model.train(mode)
    return Features(
        feats=torch.cat(feats).numpy(),
        pids=split.pids,
        camids=split.camids,
        names=[record.name for record in split.records],
        times=split.times,
        source=str(split.root),
        split=split.name,
        made_by=_made_by(model, points, scales),
    )


def _made_by(model: nn.Module, points: int | None, scales: Sequence[float]) -> str:
    background = getattr(model, "background", True)
    digest = hashlib.sha256(json.dumps([points, background, *map(float, scales)]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
