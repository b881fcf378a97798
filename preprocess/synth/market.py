"""Writes synthetic people as a data set in the layout and file naming of Market-1501."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil, pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from reid3d.io import atomic_write, hold_folder
from reid3d.progress import Progress

from .people import People, normal, sample_people, sample_poses, uniform
from .render import HEIGHT, WIDTH, Renderer, Truth, Views, sample_backgrounds, sample_views

FORMAT = "reid3d-synth-1"
NOTE = "synth.json"
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
FRAME_RATE = 25
PANORAMA = 384  # pixels of background that a camera pans over


@dataclass(frozen=True)
class Cameras:
    """C fixed cameras: what they do to every image (views) and the street behind (C,128,PANORAMA,3)."""

    views: Views
    street: Tensor


@dataclass(frozen=True)
class Crops:
    """The images of one person: file names, crops (n,128,64,3) and the truth about them."""

    names: list[str]
    images: Tensor
    truth: Truth


def stream(*key: int) -> Generator:
    """A generator for one purpose: streams of different keys are independent."""
    return Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))


def sample_cameras(count: int, generator: Generator) -> Cameras:
    """Cameras that differ in height, direction, light, colours, sharpness and street."""
    views = sample_views(count, generator)
    return Cameras(
        replace(
            views,
            # One camera in each sector, so that any two see different sides of who walks by.
            yaw=(torch.arange(count) + uniform(generator, count, -0.3, 0.3)) * 2 * pi / count,
            pitch=uniform(generator, count, 0.0, 0.45),
            exposure=uniform(generator, count, 0.7, 1.15),
            gamma=uniform(generator, count, 0.85, 1.2),
            blur=uniform(generator, count, 0.2, 0.9),
            noise=uniform(generator, count, 0.0, 0.02),
        ),
        sample_backgrounds(count, PANORAMA, generator),
    )


def film(
    renderer: Renderer, person: People, pid: int, box: int, cameras: Cameras, images: int, generator: Generator
) -> Crops:
    """A person walks past every camera once: `images` crops at each, some frames apart. Junk (pid -1) is badly cut.

    `box` is the last number of the file names; it keeps apart people who share a pid.
    """
    count = len(cameras.views)
    camera = torch.arange(count).repeat_interleave(images)
    shot = torch.arange(images).repeat(count)
    n = len(camera)
    # When the person is where: cameras in random order, half a minute of walking between two.
    travel = uniform(generator, count, 10, 40) * FRAME_RATE
    arrival = torch.empty(count)
    arrival[torch.randperm(count, generator=generator)] = travel.cumsum(0) + uniform(generator, 1, 0, 1e5)
    frame = (arrival[camera] + shot * uniform(generator, count, 6, 14)[camera]).long()
    phase = 2 * pi * person.cadence * (frame / FRAME_RATE) + uniform(generator, 1, 0, 2 * pi)

    # Of each passage: heading (either way along the street), distance, where in the street.
    heading = normal(generator, count, 0.3) + pi * (uniform(generator, count) < 0.3)
    near = uniform(generator, count, 0.8, 1.25)
    place = uniform(generator, count, 0, PANORAMA - WIDTH - 40)
    base = cameras.views[camera]
    # A few images have one occluder; a fixed camera has the clear view most of the time.
    hidden = uniform(generator, n) < 0.08
    random = sample_views(n, generator)
    views = replace(
        base,
        yaw=base.yaw + heading[camera] + normal(generator, n, 0.08),
        distance=(base.distance * near[camera]).clamp(min=3.5),
        fill=(0.92 + normal(generator, n, 0.035)).clamp(0.78, 1.05),
        shift=normal(generator, (n, 2)) * torch.tensor([0.04, 0.02]),
        exposure=base.exposure * (1 + normal(generator, n, 0.04)),
        occluder=torch.where(hidden[:, None, None], random.occluder, torch.zeros(())),
    )
    if pid < 0:  # a detector's mistakes: half a person, or a zoom on one
        side = torch.where(uniform(generator, n) < 0.5, -1.0, 1.0) * uniform(generator, n, 0.45, 0.7)
        drop = torch.where(uniform(generator, n) < 0.5, -1.0, 1.0) * uniform(generator, n, 0.3, 0.5)
        views = replace(views, shift=torch.stack([side, drop], 1), fill=views.fill * uniform(generator, n, 1.0, 1.6))
    span = PANORAMA - WIDTH
    left = (span - ((place[camera] + 3 * shot) % (2 * span) - span).abs()).long()  # to the street's end and back
    background = torch.stack(
        [cameras.street[c, :, x : x + WIDTH] for c, x in zip(camera.tolist(), left.tolist(), strict=True)]
    )
    people = person[torch.zeros(n, dtype=torch.long)]
    poses = sample_poses(people, phase, torch.zeros(n, dtype=torch.bool), generator)
    crops, truth = renderer(people, poses, views, background, generator)
    label = "-1" if pid < 0 else f"{pid:04d}"
    sequence, within = 1 + frame // 50_000, frame % 50_000
    names = [
        f"{label}_c{c + 1}s{s}_{f:06d}_{box:02d}.jpg"
        for c, s, f in zip(camera.tolist(), sequence.tolist(), within.tolist(), strict=True)
    ]
    return Crops(names, crops, truth)


def roll(ids: int, images: int) -> list[int]:
    """Who is filmed: 1 to ids, then distractors (0) and people badly cut (-1), relative to the gallery as in
    Market-1501, about one in five and three in ten.
    """
    gallery = (ids - ids // 2) * (images - 1) / images  # in people, of whom each camera sees as many images
    return [*range(1, ids + 1), *[0] * ceil(0.2 * gallery), *[-1] * ceil(0.3 * gallery)]


def cast(ids: int, cams: int, images: int, seed: int) -> Iterator[tuple[str, Crops]]:
    """Every crop of the data set as (folder, crops), a person at a time."""
    renderer = Renderer()
    cameras = sample_cameras(cams, stream(seed, 0))
    pids, train = roll(ids, images), ids // 2
    people = sample_people(len(pids), stream(seed, 1))
    for k, pid in enumerate(pids):
        box = 1 if pid > 0 else k - ids + 1
        crops = film(renderer, people[torch.tensor([k])], pid, box, cameras, images, stream(seed, 2, k))
        if 0 < pid <= train:
            yield "bounding_box_train", crops
        elif pid > train:
            first = torch.arange(cams * images) % images == 0  # one query of each person and camera
            yield "query", select(crops, first)
            yield "bounding_box_test", select(crops, ~first)
        else:
            yield "bounding_box_test", crops


def select(crops: Crops, keep: Tensor) -> Crops:
    """The crops where keep (n,) is true."""
    t = crops.truth
    return Crops(
        [name for name, k in zip(crops.names, keep.tolist(), strict=True) if k],
        crops.images[keep],
        Truth(t.rotmats[keep], t.betas[keep], t.cam[keep], t.joints2d[keep], t.mask[keep]),
    )


def claim(out: Path, plan: dict[str, Any]) -> bool:
    """Make `out` the folder of this plan, or see that it is; whether it is complete.

    The note comes before any other file, so that a run that was stopped is known by it.
    """
    note = out / NOTE
    if note.exists():
        try:
            found = json.loads(note.read_text())
            same, complete = {k: found[k] for k in plan} == plan, bool(found["complete"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"out must be empty or made by the same command, but {note} is no note of synth"
            ) from error
        if not same:
            raise ValueError(f"out must be empty or made by the same command, but {note} says {found}")
        for pattern in (*(f"{folder}/.*.jpg.*.tmp" for folder in FOLDERS), ".gt.npz.*.tmp", f".{NOTE}.*.tmp"):
            for left_behind in out.glob(pattern):  # by a run that was killed
                left_behind.unlink()
        return complete
    if out.exists() and any(p.name != ".lock" and not p.name.startswith(f".{NOTE}.") for p in out.iterdir()):
        raise ValueError(f"out must be empty or made by the same command, got {out} with other files")
    with atomic_write(note) as file:
        file.write(json.dumps({**plan, "complete": False}).encode() + b"\n")
    return False


def synth(
    out: str | Path, *, ids: int = 32, cams: int = 4, images: int = 4, seed: int = 0, progress: bool = True
) -> Path:
    """Write a data set of synthetic pedestrians in Market-1501's layout, with the ground truth beside it.

    Half of the identities (rounded down) are in bounding_box_train, the others in query (one image of each camera) and
    bounding_box_test (the rest), which also holds distractors (0000) and badly cut boxes (-1). The crops are 128x64
    JPEG. gt.npz holds, in the order of its `names`: rotmats (n,24,3,3), betas (n,10), cam (n,3), joints2d (n,24,2) in
    half crop heights from the centre, and mask (n,1024) uint8, the bits of the 128x64 silhouette (numpy.packbits).
    The same arguments give the same bytes; a run that was stopped is finished by the same call.

    Args:
        out: folder to make or to finish.
        ids: identities, at least 2.
        cams: cameras, 2 to 6 (Market-1501 has 6).
        images: images of each identity in each camera, at least 2.
        seed: non-negative.
        progress: show a bar on a terminal.

    Raises:
        ValueError: an argument is out of range, or `out` holds something else.
        OSError: `out` cannot be written, or another run is writing there.
    """
    for name, value, low, high in (
        ("ids", ids, 2, 9000), ("cams", cams, 2, 6), ("images", images, 2, 1000), ("seed", seed, 0, 2**63),
    ):  # fmt: skip
        if not low <= value <= high:
            raise ValueError(f"{name} must be in {low}..{high}, got {value}")
    out = Path(out)
    plan: dict[str, Any] = {"format": FORMAT, "ids": ids, "cams": cams, "images": images, "seed": seed}
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    with hold_folder(out, "another synth"):
        if not claim(out, plan):
            _write(out, plan, progress)
    return out


def _write(out: Path, plan: dict[str, Any], progress: bool) -> None:
    """Everything but the first note."""
    for folder in FOLDERS:
        (out / folder).mkdir(exist_ok=True)
    names: list[str] = []
    truths: list[Truth] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums come out the same whatever the number of cores
    try:
        total = len(roll(plan["ids"], plan["images"])) * plan["cams"] * plan["images"]
        with Progress(total, "synth", "image", progress) as bar:
            for folder, crops in cast(plan["ids"], plan["cams"], plan["images"], plan["seed"]):
                for name, image in zip(crops.names, crops.images, strict=True):
                    with atomic_write(out / folder / name) as file:
                        Image.fromarray(image.numpy()).save(file, "JPEG", quality=90)
                names += [f"{folder}/{name}" for name in crops.names]
                truths.append(crops.truth)
                bar.add(len(crops.names))
    finally:
        torch.set_num_threads(threads)

    def column(field: str) -> np.ndarray:
        return torch.cat([getattr(t, field) for t in truths]).numpy()

    with atomic_write(out / "gt.npz") as file:
        np.savez(
            file,
            names=np.array(names),
            rotmats=column("rotmats"),
            betas=column("betas"),
            cam=column("cam"),
            joints2d=column("joints2d"),
            mask=np.packbits(column("mask").reshape(len(names), HEIGHT * WIDTH), axis=1),
        )
    with atomic_write(out / NOTE) as file:
        file.write(json.dumps({**plan, "complete": True, "crops": len(names)}).encode() + b"\n")
