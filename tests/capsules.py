"""Clouds of people made of ellipses, drawn by the contract of a crop: every pixel is a point. No body model needed."""

from pathlib import Path

import numpy as np

from reid3d.cloud import PointCloud
from reid3d.io import Record, write_shard

PARTS = (  # centre x, centre y, half width, half height in metres (y down, pelvis at 0), colour slot
    (0.00, -0.68, 0.10, 0.13, 0),
    (0.00, -0.28, 0.19, 0.32, 1),
    (-0.25, -0.22, 0.06, 0.33, 1),
    (0.25, -0.22, 0.06, 0.33, 1),
    (-0.10, 0.42, 0.09, 0.50, 2),
    (0.10, 0.42, 0.09, 0.50, 2),
)


def capsule_person(pid: int, camid: int, seed: int, *, size: tuple[int, int] = (128, 64)) -> tuple[PointCloud, Record]:
    """Clothes follow pid, background camid, pose and noise the seed."""
    height, width = size
    clothes, scene, rng = (np.random.default_rng((kind, n)) for kind, n in ((1, abs(pid)), (2, abs(camid)), (3, seed)))
    s, tx, ty = 0.95, float(rng.normal(0, 0.03)), float(rng.normal(0.02, 0.03))
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    x, y = (2 * column - width) / (s * height) - tx, (2 * row - height) / (s * height) - ty
    z, slot = np.full(size, np.inf), np.full(size, -1)
    swing = rng.normal(0, 0.08)
    for n, (cx, cy, hx, hy, colour) in enumerate(PARTS):
        lean = swing * (y - cy + hy) * (-1) ** n if n > 1 else 0
        inside = 1 - ((x - cx - lean) / hx) ** 2 - ((y - cy) / hy) ** 2
        nearer = (inside > 0) & (-hx * np.sqrt(np.maximum(inside, 0)) < z)
        z[nearer], slot[nearer] = -hx * np.sqrt(inside[nearer]), colour
    body = slot >= 0
    z[~body] = z[body].mean()
    colours = np.concatenate([[[205, 165, 140]], clothes.integers(20, 235, (2, 3))])
    rgb = np.where(body[..., None], colours[slot], scene.integers(90, 200, 3) * (0.7 + 0.5 * row / height)[..., None])
    rgb = np.clip(rgb + rng.normal(0, 8, (*size, 3)), 0, 255).astype(np.uint8)
    xyz = np.stack([x, y, z], -1).astype(np.float32)
    front, behind = np.flatnonzero(body), np.flatnonzero(~body)
    order = np.concatenate([front, behind])
    vertex = np.concatenate([np.arange(len(front)), np.full(len(behind), -1)]).astype(np.int32)
    cloud = PointCloud(xyz.reshape(-1, 3)[order], rgb.reshape(-1, 3)[order], vertex)
    name = f"{pid:04d}_c{camid}s1_{seed:06d}_00.jpg"
    return cloud, Record(name, "all", pid, camid, seed, size, (s, tx, ty), {"visible": 0.3})


def write_capsules(
    root: Path, *, ids: int = 4, cams: int = 2, images: int = 2, size: tuple[int, int] = (32, 16)
) -> Path:
    """A converted data set: the first half of the ids for training; a query per camera, the rest gallery, for the
    others; one distractor and one junk item in the gallery."""
    root.mkdir(parents=True)
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "query": [], "gallery": [(0, 1), (-1, 2)]}
    for pid in range(1, ids + 1):
        for camid in range(1, cams + 1):
            for image in range(images):
                split = "train" if pid <= ids // 2 else "query" if image == 0 else "gallery"
                splits[split].append((pid, camid))
    for split, members in splits.items():
        clouds, records = [], []
        for seed, (pid, camid) in enumerate(members):
            cloud, record = capsule_person(pid, camid, seed, size=size)
            clouds.append(cloud)
            records.append(Record(f"{split}/{record.name}", split, *list(vars(record).values())[2:]))
        write_shard(root / f"{split}-00000.safetensors", clouds, records, config={}, dtype="float32")
    return root
