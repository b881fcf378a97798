"""What is known of a synthetic world, in place of what is found in its crops: bodies, and the pixels of a person."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reid3d.cloud import PointCloud
from reid3d.data import open_clouds
from reid3d.io import DATASET_FILE, Shard, atomic_write, write_shard

from ..body import load_body
from ..fit import BodyFit, Fitter
from .paint import WIDTH
from .render import HEIGHT


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
        self.body = load_body("full")
        with np.load(_truth(world)) as truth:
            self.rows = {name: i for i, name in enumerate(truth["names"].tolist())}
            for name in ("rotmats", "betas", "cam"):
                self.register_buffer(name, torch.from_numpy(truth[name]))

    def forward(self, crops: Sequence[np.ndarray], names: Sequence[str]) -> BodyFit:
        which = torch.tensor([self.rows[name] for name in names])
        rotmats, betas, cam = self.rotmats[which], self.betas[which], self.cam[which]
        posed = self.body(rotmats, betas)
        return BodyFit(posed.verts, cam, torch.ones(len(cam)), rotmats, betas, posed.joints)


def keep_person(world: str | Path, clouds: str | Path, out: str | Path) -> None:
    """Write clouds of a world again, without the background that is not the person: what is worn, carried or missed by
    the fit stays, in the plane of the background.

    Args:
        world: folder that `synth` wrote.
        clouds: folder of its clouds.
        out: folder to write. One that is whole is left as it is, what a stopped call wrote is written again.

    Raises: FileNotFoundError: no such world, or no such folder; ValueError: clouds that are not of this world, or a
        folder with those of others.
    """
    with np.load(_truth(world)) as truth:
        rows = {name: i for i, name in enumerate(truth["names"].tolist())}
        seen = np.unpackbits(truth["seen"], axis=1).reshape(-1, HEIGHT, WIDTH).astype(bool)
    clouds, out = open_clouds(clouds).root, Path(out)  # whole
    about = {**json.loads((clouds / DATASET_FILE).read_text()), "kept": "person"}
    if (out / DATASET_FILE).exists():
        if json.loads((out / DATASET_FILE).read_text()) != about:
            raise ValueError(f"out must not hold other clouds, got those of another conversion: {out}")
        return
    out.mkdir(parents=True, exist_ok=True)
    for shard in map(Shard, sorted(clouds.glob("[!.]*.safetensors"))):
        kept, records = [], []
        for i, record in enumerate(shard.records):
            if record.name not in rows:
                raise ValueError(f"clouds must be of the world {world}, which has no {record.name}: {clouds}")
            (height, width), cloud = record.size, shard[i]
            x, y = record.project(cloud.xyz.astype(np.float64)).T
            column = np.clip(x / width * WIDTH, 0, WIDTH - 1).astype(int)
            line = np.clip(y / height * HEIGHT, 0, HEIGHT - 1).astype(int)
            keep = (cloud.vertex >= 0) | seen[rows[record.name], line, column]
            if not keep.any():  # neither a body nor a person was seen
                keep[:] = True
            kept.append(PointCloud(cloud.xyz[keep], cloud.rgb[keep], cloud.vertex[keep]))
            records.append(replace(record, points=len(kept[-1])))
        write_shard(out / shard.path.name, kept, records, config=shard.config)
    with atomic_write(out / DATASET_FILE) as file:  # the last: now the folder is whole
        file.write(json.dumps(about, indent=2).encode() + b"\n")


def _truth(world: str | Path) -> Path:
    path = Path(world) / "gt.npz"
    if not path.is_file():
        raise FileNotFoundError(f"world must be a synthetic one, with its truth, got no {path}")
    return path
