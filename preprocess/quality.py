"""How good the fits of a converted folder are: quality.json, and worst.png to look at those trusted least."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from reid3d.cloud import PointCloud
from reid3d.data.images import read_image
from reid3d.io import Record, Shard, atomic_write

from .camera import project

QUALITY_FILE, WORST_FILE = "quality.json", "worst.png"
SHARES = (1, 5, 25, 50, 75)  # per cent
BINS = 10
WORST = 24
TILE = (256, 128)  # pixels
COLUMNS = 6


@dataclass(frozen=True)
class Summary:
    """Of all clouds of a folder.

    clouds: how many. fits: how many by each fitter; "mean" are the upright bodies that stand in. percentiles: of the
    confidence. histogram: clouds with confidence in 0..0.1, 0.1..0.2 and so on. means: of every number in the records'
    quality, over those that have it. worst: names, least confident first. shards: a hash of all that was counted.
    """

    clouds: int
    fits: dict[str, int]
    percentiles: dict[str, float]
    histogram: list[int]
    means: dict[str, float]
    worst: list[str]
    shards: str

    def __str__(self) -> str:
        upright = self.fits.get("mean", 0)
        return (
            f"confidence: median {self.percentiles['50']:.2f}, {SHARES[1]} % below {self.percentiles['5']:.2f}; "
            f"{upright} of {self.clouds} clouds have an upright body; the worst: {WORST_FILE}"
        )


def write_quality(out: Path, shards: Sequence[Shard], pictures: Mapping[str, Path]) -> Summary:
    """Write quality.json and worst.png for the shards in `out`, unless they are there; pictures: the crops by name."""
    digest = hashlib.sha256(json.dumps([shard.metadata.get("sha256") for shard in shards]).encode()).hexdigest()
    try:
        found = Summary(**json.loads((out / QUALITY_FILE).read_bytes()))
        if found.shards == digest and (out / WORST_FILE).exists():
            return found
    except (FileNotFoundError, ValueError, TypeError):
        pass  # not there yet, or not ours: written anew
    rows = [(shard, i, record) for shard in shards for i, record in enumerate(shard.records)]
    confidence = np.array([record.quality.get("confidence", 0.0) for *_, record in rows])
    order = np.argsort(confidence, kind="stable")[:WORST]
    values: dict[str, list[float]] = {}
    for *_, record in rows:
        for name, value in record.quality.items():
            values.setdefault(name, []).append(value)
    summary = Summary(
        clouds=len(rows),
        fits=dict(sorted(Counter(record.fit for *_, record in rows).items())),
        percentiles={str(share): round(float(np.percentile(confidence, share)), 4) for share in SHARES},
        histogram=np.histogram(confidence, BINS, (0, 1))[0].tolist(),
        means={name: round(float(np.mean(numbers)), 4) for name, numbers in sorted(values.items())},
        worst=[rows[i][2].name for i in order],
        shards=digest,
    )
    tiles = [_tile(shard[i], record, pictures[record.name]) for shard, i, record in (rows[k] for k in order)]
    with atomic_write(out / WORST_FILE) as file:
        contact_sheet(tiles).save(file, "PNG", compress_level=1)  # three times as fast, a third larger
    with atomic_write(out / QUALITY_FILE) as file:  # last: it says that both are there
        file.write(json.dumps(asdict(summary), indent=2).encode() + b"\n")
    return summary


def _tile(cloud: PointCloud, record: Record, path: Path) -> Image.Image:
    """A crop, the same under its cloud's body points, coloured by depth, and what the record says."""
    height, width = TILE
    try:
        crop = Image.fromarray(read_image(path, (height, width)))
    except (OSError, ValueError):  # it was there when it was converted
        crop = Image.new("RGB", (width, height), (64, 64, 64))
    covered = Image.blend(crop.convert("L").convert("RGB"), Image.new("RGB", crop.size), 0.3)
    draw = ImageDraw.Draw(covered)
    body = cloud.xyz[cloud.vertex >= 0]
    if len(body):
        aspect = torch.tensor([record.aspect or record.size[1] / record.size[0]])
        pixels = project(torch.from_numpy(body)[None], torch.tensor([record.cam]), height, width, aspect)[0].numpy()
        near, far = body[:, 2].min(), body[:, 2].max()
        for x, y, z in pixels[np.argsort(-pixels[:, 2], kind="stable")].tolist():
            t = (z - near) / max(far - near, 1e-6)
            colour = (int(255 - 215 * t), int(190 - 90 * t), int(60 + 160 * t))
            draw.rectangle((x - 1, y - 1, x + 1, y + 1), fill=colour)
    tile = Image.new("RGB", (2 * width, height + 28), "white")
    tile.paste(crop, (0, 0))
    tile.paste(covered, (width, 0))
    words = f"{record.quality.get('confidence', 0.0):.2f} {'upright' if record.fit == 'mean' else record.fit}"
    text = ImageDraw.Draw(tile)
    text.text((3, height + 1), words, fill="black")
    text.text((3, height + 14), Path(record.name).name[-40:], fill="black")
    return tile


def contact_sheet(tiles: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures of one size in rows of COLUMNS."""
    width, height = tiles[0].size
    columns, rows = min(COLUMNS, len(tiles)), -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), (230, 230, 230))
    for k, tile in enumerate(tiles):
        row, column = divmod(k, COLUMNS)
        sheet.paste(tile, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
