"""Writes a synthetic world as a data set in the layout and file naming of Market-1501."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from io import BytesIO
from math import pi
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reid3d.data.layouts import FRAMES_PER_SESSION
from reid3d.io import atomic_write, hold_folder
from reid3d.progress import Progress

from ..engines import share_out
from .people import CARRY, CYCLE, PHONE, STAND, WALK, People, change_clothes, dress_alike, sample_people, sample_poses
from .render import HEIGHT, WIDTH, Renderer, Truth
from .street import COLUMN, Shots, Streets, sample_figures, sample_obstacles, sample_streets

FORMAT = "reid3d-synth-2"
NOTE = "synth.json"
TRUTH = "gt.npz"
FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
DONE = ".done"  # while it is being made: one file for each handful of people
FRAME_RATE = 25
SESSIONS = 6  # as in Market-1501
HALF_HOUR = 1800  # seconds in which people set out, in each session
TOUR = 1200  # seconds that one way past all cameras may take
TOGETHER = 240  # crops rendered at a time, about


@dataclass(frozen=True)
class World:
    """What a world is like: how much there is of it, and how hard it is to find a person in it.

    Args:
        ids: identities, half of them (rounded down) for training.
        cams: cameras.
        tracklets: passages of each person through each camera.
        images: crops of each passage.
        frames: frames that a passage lasts, at 25 a second.
        distractors: boxes of other people (0000) in the gallery, relative to those of the people searched for.
        junk: boxes that are badly cut (-1), the same.
        look_alikes: share of people who wear the cut and the colours of another's clothes.
        clothes_change: share of passages in other clothes.
        colour_cast: how far the cameras' light and colours lie apart; 1 is what a city's cameras do.
        occlusion: how often something stands before people.
        viewpoint: how far the cameras' directions lie apart: 0 all the same, 1 evenly all round.
        detector: how far boxes lie from people; 1 is a good detector.
        background: share of passages in training that take place where only this person passes in each camera: what is
            learnt from the background does not hold for the people of the test.
    """

    ids: int = 600
    cams: int = 6
    tracklets: int = 1
    images: int = 3
    frames: int = 75
    distractors: float = 0.2
    junk: float = 0.2
    look_alikes: float = 0.2
    clothes_change: float = 0.0
    colour_cast: float = 0.8
    occlusion: float = 0.06
    viewpoint: float = 1.0
    detector: float = 1.0
    background: float = 0.2


PRESETS = {
    "easy": World(look_alikes=0.0, colour_cast=0.3, occlusion=0.0, viewpoint=0.5, detector=0.5, background=0.0),
    "standard": World(),
    "hard": World(look_alikes=0.8, clothes_change=0.25, colour_cast=1.8, occlusion=0.18, detector=2.0, background=0.9),
}
LIMITS: dict[str, tuple[float, float, str]] = {
    "ids": (2, 9000, "one identity cannot be told from another, and names have four digits"),
    "cams": (2, 6, "people are searched for across cameras, and Market-1501's names have six"),
    "tracklets": (1, 9, "a session has no more time"),
    "images": (2, 1000, "one for the query and one for the gallery"),
    "frames": (2, 1000, "a passage lasts at most 40 seconds"),
    "distractors": (0, 10, ""),
    "junk": (0, 10, ""),
    "look_alikes": (0, 1, ""),
    "clothes_change": (0, 1, ""),
    "colour_cast": (0, 3, ""),
    "occlusion": (0, 1, ""),
    "viewpoint": (0, 1, ""),
    "detector": (0, 4, ""),
    "background": (0, 1, ""),
}


@dataclass(frozen=True)
class Cameras:
    """C fixed cameras. Arrays with leading size C; lengths metres, angles radians."""

    streets: Streets
    place: np.ndarray  # (C,2) on the map of the town
    lane: np.ndarray  # (C,) distance of the lane that people walk along
    facing: np.ndarray  # (C,) heading of who walks along it, see Shots
    height: np.ndarray  # (C,)
    roll: np.ndarray  # (C,)
    gain: np.ndarray  # (C,3)
    gamma: np.ndarray  # (C,)
    contrast: np.ndarray  # (C,)
    defocus: np.ndarray  # (C,) pixels
    blur: np.ndarray  # (C,) pixels, of somebody on the lane
    noise: np.ndarray  # (C,)
    quality: np.ndarray  # (C,) of JPEG


@dataclass(frozen=True)
class Crops:
    """n images and what is known of them."""

    names: list[str]
    folders: list[str]
    images: Tensor  # (n,128,64,3) uint8
    quality: np.ndarray  # (n,) of JPEG
    truth: Truth
    seconds: np.ndarray  # (n,) on the world's clock
    outfit: np.ndarray  # (n,) 0 what the person usually wears, 1 other clothes
    action: np.ndarray  # (n,) of people.ACTIONS


def sample_cameras(world: World, rng: np.random.Generator) -> Cameras:
    """Cameras that differ in place, height, direction, light, colours, sharpness and street."""
    n, cast = world.cams, world.colour_cast
    lane = rng.uniform(5, 11, n)
    around = (np.arange(n) + rng.uniform(-0.3, 0.3, n)) * 2 * pi / n
    dim = np.where(rng.random(n) < 0.15 * cast, 0.65, 1.0)
    exposure = dim * np.exp(rng.normal(0, 0.18 * cast, n).clip(-0.5, 0.4)) * 1.1
    return Cameras(
        streets=sample_streets(n, rng, lane + 4, 0.0),
        place=rng.uniform(0, 200, (n, 2)),
        lane=lane,
        facing=0.6 + world.viewpoint * rng.permutation(around),
        height=rng.uniform(1.3, 3.8, n),
        roll=rng.normal(0, 0.025, n),
        gain=exposure[:, None] * np.exp(rng.normal(0, 0.09 * cast, (n, 3)).clip(-0.3, 0.3)),
        gamma=np.exp(rng.normal(-0.1, 0.13 * cast, n).clip(-0.45, 0.3)),
        contrast=rng.uniform(0, 0.6, n),
        defocus=rng.uniform(0.0, 1.2, n),
        blur=rng.uniform(0.42, 0.85, n),
        noise=rng.uniform(0.0, 0.022, n) / dim,
        quality=rng.integers(60, 93, n),
    )


class Town:
    """A world that can be filmed: its people, their cameras, and when each passes which.

    Everything random follows from (seed, name of the world) and the numbers of the people who are filmed together.
    """

    def __init__(self, world: World, name: str, seed: int) -> None:
        self.world, self.key = world, (seed, ord(name))
        self.cameras = sample_cameras(world, self.rng(0))
        self.train = world.ids // 2
        gallery = (world.ids - self.train) * (world.images - 1) / world.images
        strangers, junk = round(world.distractors * gallery), round(world.junk * gallery)
        self.pids = np.array([*range(1, world.ids + 1), *[0] * strangers, *[-1] * junk])
        rng = self.rng(1)
        people = sample_people(len(self.pids), rng)
        # Look-alikes are neighbours in the list and in the same half.
        k = np.arange(len(self.pids))
        alike = (k % 2 == 1) & (k != self.train) & (rng.random(len(k)) < world.look_alikes)
        self.people = _where(alike, dress_alike(people, people[np.maximum(k - 1, 0)]), people)
        self.changed = change_clothes(self.people, rng)
        self.renderer = Renderer()

    def rng(self, *purpose: int) -> np.random.Generator:
        """Random numbers for one purpose: streams of different purposes are independent."""
        return np.random.default_rng((*self.key, *purpose))

    def arrivals(self, k: int) -> np.ndarray:
        """When person k arrives at the cameras: seconds (tracklets, cams).

        People walk from camera to camera, mostly to one nearby, some in company: who was seen together at one camera is
        likely to be seen together at the next.
        """
        world, place = self.world, self.cameras.place
        own = self.rng(2, k)
        leader = k - k % 3 if own.random() < 0.5 else k
        tour, speed = self.rng(3, leader), self.people.speed[leader] * np.exp(own.normal(0, 0.02))
        session = tour.integers(SESSIONS) * FRAMES_PER_SESSION / FRAME_RATE
        start = session + tour.uniform(0, HALF_HOUR) + own.uniform(0, 6)
        out = np.zeros((world.tracklets, world.cams))
        for t in range(world.tracklets):
            left, at, now = list(range(world.cams)), int(tour.integers(world.cams)), start + TOUR * t
            while True:
                out[t, at] = now
                left.remove(at)
                if not left:
                    break
                metres = 15 + 1.3 * np.hypot(*(place[left] - place[at]).T)
                to = int(tour.choice(len(left), p=(w := np.exp(-metres / 40)) / w.sum()))
                now += min(metres[to] / speed * np.exp(tour.normal(0, 0.08)), TOUR * 0.9 / world.cams)
                at = left[to]
        return out

    def film(self, numbers: np.ndarray) -> Iterator[Crops]:
        """All crops of the people with these numbers, so many at a time that memory stays small."""
        take = self.plan(numbers)
        both = _interleave(self.people[numbers], self.changed[numbers])
        for first in range(0, len(take.shots), TOGETHER):
            part = take[np.arange(first, min(first + TOGETHER, len(take.shots)))]
            worn = 2 * part.person + part.outfit
            present = np.unique(worn)
            streets = self.cameras.streets[part.camera]
            streets = replace(streets, quads=np.concatenate([streets.quads, part.passing], 1))
            who = np.searchsorted(present, worn)
            images, truth = self.renderer(both[present], part.poses, part.action, streets, part.shots, who)
            folders, names = self.names(numbers, part)
            yield Crops(names, folders, images, part.shots.quality, truth, part.seconds, part.outfit, part.action)

    def plan(self, numbers: np.ndarray) -> "Take":
        """Where, when and how the people with these numbers are filmed: person after person, passage after passage."""
        world, cams = self.world, self.cameras
        rng, count = self.rng(4, int(numbers[0])), len(numbers) * world.tracklets * world.cams
        # Of each passage: who, where and when, what they do, which way they go, where in the street, in which clothes.
        passage = np.arange(count)
        camera, person = passage % world.cams, passage // (world.cams * world.tracklets)
        arrival = np.concatenate([self.arrivals(int(k)).reshape(-1) for k in numbers])
        people, pid = self.people[numbers[person]], self.pids[numbers[person]]
        action = rng.choice([WALK, STAND, PHONE, CARRY, CYCLE], count, p=[0.76, 0.08, 0.09, 0.03, 0.04])
        facing = cams.facing[camera] + rng.normal(0, 0.25, count) + pi * (rng.random(count) < 0.3)
        speed = np.select([action == STAND, action == CYCLE], [0.0, 3.5], people.speed)
        own = np.stack([self.rng(5, int(k)).uniform(-14, 14, world.cams) for k in numbers])[person, camera]
        alone = (pid > 0) & (pid <= self.train) & (rng.random(count) < world.background)
        spot = np.where(alone, own + rng.uniform(-0.5, 0.5, count), rng.uniform(-2.5, 2.5, count))
        outfit = (rng.random(count) < world.clothes_change).astype(np.int64)
        depth = cams.lane[camera] * rng.uniform(0.85, 1.25, count)
        start = rng.uniform(0, 2 * pi, count)
        cadence = np.where(action == CYCLE, 1.1, people.cadence)

        # Of each crop: a frame of its own part of the passage.
        n = count * world.images
        track, shot = np.arange(n) // world.images, np.arange(n) % world.images
        first, after = (-(-(shot + k) * world.frames // world.images) for k in (0, 1))
        elapsed = (first + np.floor(rng.random(n) * (after - first))) / FRAME_RATE
        walked = (speed[track] * (elapsed - 0.5 * world.frames / FRAME_RATE)).clip(-3, 3)
        x = spot[track] + walked * np.sin(facing[track])
        z = (depth[track] - walked * np.cos(facing[track])).clip(2.8)
        phase = start[track] + 2 * pi * cadence[track] * elapsed
        c, d = camera[track], world.detector
        shift = rng.normal(0, 1, (n, 2)) * np.array([0.04, 0.018]) * d
        fill = (0.92 + rng.normal(0, 0.03 * d, n)).clip(0.72, 1.08)
        missed = rng.random(n) < 0.025 * d  # the box ends above the feet
        shift[:, 1] += np.where(missed, rng.uniform(0.08, 0.3, n), 0.0)
        fill = np.where(missed, fill * rng.uniform(1.0, 1.2, n), fill)
        bad = pid[track] < 0  # half a person, or a zoom on one
        off = np.where(rng.random((n, 2)) < 0.5, -1.0, 1.0) * rng.uniform([0.45, 0.3], [0.7, 0.5], (n, 2))
        shift, fill = np.where(bad[:, None], off, shift), np.where(bad, fill * rng.uniform(1.0, 1.6, n), fill)
        far = np.hypot(x, z) / cams.lane[c]
        shots = Shots(
            x=x,
            z=z,
            heading=facing[track] + np.arctan2(x, z) + rng.normal(0, 0.06, n),
            height=cams.height[c],
            roll=cams.roll[c],
            fill=fill,
            shift=shift,
            gain=cams.gain[c] * np.exp(rng.normal(0, 0.03, n))[:, None],
            gamma=cams.gamma[c],
            contrast=cams.contrast[c],
            defocus=cams.defocus[c],
            blur=(cams.blur[c] * far.clip(0.9)).clip(0.4, 2),
            noise=cams.noise[c],
            seed=rng.integers(1 << 24, size=n),
            quality=cams.quality[c],
        )

        # Others in the street: two who walk along behind, and somebody or something between the person and the camera.
        beside, beyond = rng.uniform(-2, 2, (count, 2))[track], rng.uniform(1.5, 6, (count, 2))[track]
        behind = sample_figures(rng, x[:, None] + beside, z[:, None] + beyond)
        behind[..., COLUMN["width"]] *= (rng.random((count, 2)) < 0.3)[track]
        near = z - rng.uniform(0.7, 1.4, n)
        before = sample_figures(rng, x * near / z + rng.uniform(-0.5, 0.5, n), near)
        before[..., COLUMN["width"]] *= rng.random(n) < world.occlusion
        still = depth * rng.uniform(0.55, 0.8, count)
        thing = sample_obstacles(rng, spot * still / depth + rng.normal(0, 0.4, count), still)
        thing[..., COLUMN["width"]] *= rng.random(count) < 1.5 * world.occlusion
        return Take(
            shots,
            sample_poses(people[track], phase, action[track], rng, track),
            np.concatenate([behind, thing[track][:, None], before[:, None]], 1),
            person[track],
            c,
            shot + (track // world.cams % world.tracklets) * world.images,
            action[track],
            outfit[track],
            arrival[track] + elapsed,
        )

    def names(self, numbers: np.ndarray, take: "Take") -> tuple[list[str], list[str]]:
        """Folders and file names of crops."""
        folders, names = [], []
        rows = (
            numbers[take.person],
            take.camera + 1,
            np.floor(take.seconds * FRAME_RATE + 0.5).astype(np.int64),
            take.nth,
        )
        for k, camera, frame, nth in zip(*(r.tolist() for r in rows), strict=True):
            pid = int(self.pids[k])
            label, box = ("-1" if pid < 0 else f"{pid:04d}"), 1 if pid > 0 else k - self.world.ids + 1
            names.append(
                f"{label}_c{camera}s{1 + frame // FRAMES_PER_SESSION}_{frame % FRAMES_PER_SESSION:06d}_{box:02d}.jpg"
            )
            # one query of each person and camera
            folders.append(FOLDERS[0 if 0 < pid <= self.train else 1 if pid > 0 and nth == 0 else 2])
        return folders, names


@dataclass(frozen=True)
class Take:
    """n crops to come."""

    shots: Shots
    poses: np.ndarray  # (n,24,3,3)
    passing: np.ndarray  # (n,4,columns of paint.QUAD): what is only there now
    person: np.ndarray  # (n,) index among those asked for
    camera: np.ndarray  # (n,)
    nth: np.ndarray  # (n,) crop of this person in this camera
    action: np.ndarray
    outfit: np.ndarray
    seconds: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> "Take":
        return Take(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def _interleave(a: People, b: People) -> People:
    """a[0], b[0], a[1], .."""
    order = np.arange(2 * len(a)).reshape(2, -1).T.reshape(-1)
    return People(**{f.name: np.concatenate([getattr(a, f.name), getattr(b, f.name)])[order] for f in fields(People)})


def _where(condition: np.ndarray, a: People, b: People) -> People:
    """Person by person."""

    def pick(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(condition.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return People(**{f.name: pick(getattr(a, f.name), getattr(b, f.name)) for f in fields(People)})


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
        for left_behind in (*out.glob(f"{DONE}/.*.tmp"), *out.glob(f".{TRUTH}.*.tmp"), *out.glob(f".{NOTE}.*.tmp")):
            left_behind.unlink()  # by a run that was killed
        return complete
    if out.exists() and any(p.name != ".lock" and not p.name.startswith(f".{NOTE}.") for p in out.iterdir()):
        raise ValueError(f"out must be empty or made by the same command, got {out} with other files")
    with atomic_write(note) as file:
        file.write(json.dumps({**plan, "complete": False}).encode() + b"\n")
    return False


def synth(
    out: str | Path,
    *,
    preset: Literal["easy", "standard", "hard"] = "standard",
    world: Literal["A", "B"] = "A",
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    **knobs: Any,
) -> Path:
    """Write a world of synthetic pedestrians as a data set in Market-1501's layout, with the ground truth beside it.

    Half of the identities are in bounding_box_train, the others in query (one image of each camera) and
    bounding_box_test (the rest), which also holds distractors (0000) and badly cut boxes (-1). The crops are 128x64
    JPEG; the numbers in their names are frames at 25 a second, so that times of travel between cameras mean something.
    The same arguments give the same bytes, whatever the number of workers and the processor, with the same versions of
    numpy and Pillow; a run that was stopped is finished by the same call. synth.json notes the arguments and, at the
    end, a checksum of all names and images.

    gt.npz holds, in the order of its `names`: rotmats (n,24,3,3), betas (n,15), cam (n,3), camera (n,4) and joints2d
    (n,24,2) as in render.Truth; mask and seen (n,1024) uint8, the bits of the 128x64 pixels of the person whole and of
    what the crop shows of them, and vertices (n,223) uint8, the bits of the visible vertices of the low body
    (numpy.packbits); depth, float16 metres behind the body's origin of the pixels of all masks in turn; seconds (n,) on
    the world's clock, outfit (n,), 1 for changed clothes, and action (n,), an index of people.ACTIONS.

    Args:
        out: folder to make or to finish.
        preset: "easy", "standard" or "hard": values for the fields of World.
        world: one of two that have neither people nor cameras in common.
        seed: non-negative.
        workers: threads that draw; by default as many as there are processors. No part in the result.
        progress: show a bar on a terminal.
        knobs: values for fields of World that differ from the preset's.

    Raises:
        ValueError: an argument is out of range, or `out` holds something else.
        TypeError: a knob that is no field of World, or of the wrong kind.
        OSError: `out` cannot be written, or another run is writing there.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if world not in ("A", "B"):
        raise ValueError(f"world must be A or B, got {world!r}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be in 0..2**63-1, got {seed}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be positive, got {workers}")
    setting = replace(PRESETS[preset], **knobs)
    check_world(setting)
    out = Path(out)
    plan = {"format": FORMAT, "world": world, "seed": seed, **asdict(setting)}
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    with hold_folder(out, "another synth"):
        if not claim(out, plan):
            _write(out, plan, Town(setting, world, seed), workers or len(os.sched_getaffinity(0)), progress)
    return out


def check_world(world: World) -> None:
    """TypeError or ValueError, saying why, unless such a world can be."""
    for knob, (low, high, why) in LIMITS.items():
        value, kind = getattr(world, knob), type(getattr(PRESETS["standard"], knob))
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
            raise TypeError(f"{knob} must be {'a whole' if kind is int else 'a'} number, got {value!r}")
        if not low <= value <= high:
            raise ValueError(f"{knob} must be in {low}..{high}, got {value}" + (f": {why}" if why else ""))
    if world.images > world.frames:
        raise ValueError(
            f"images must not exceed the {world.frames} frames of a passage, got {world.images}: each is another frame"
        )


def _write(out: Path, plan: dict[str, Any], town: Town, workers: int, progress: bool) -> None:
    """Everything but the first note: people by the handful, and of each handful a file that says that it is done."""
    for folder in (*FOLDERS, DONE):
        (out / folder).mkdir(exist_ok=True)
    world = town.world
    each = world.cams * world.tracklets * world.images
    handful = max(1, TOGETHER // each)
    handfuls = [np.arange(k, min(k + handful, len(town.pids))) for k in range(0, len(town.pids), handful)]
    with Progress(len(town.pids) * each, "synth", "image", progress) as bar:
        for images in share_out(list(enumerate(handfuls)), partial(partial, _draw, out, town), workers):
            bar.add(images)
    files = [out / DONE / f"{i:06d}.npz" for i in range(len(handfuls))]
    with atomic_write(out / TRUTH) as file:
        checksum = _gather(files, file)
    note = {**plan, "crops": len(town.pids) * each, "sha256": checksum, "complete": True}
    with atomic_write(out / NOTE) as file:
        file.write(json.dumps(note).encode() + b"\n")
    for path in files:
        path.unlink()
    (out / DONE).rmdir()


def _draw(out: Path, town: Town, task: tuple[int, np.ndarray]) -> Iterator[int]:
    """Draw a handful, unless its file says that it is done and its images are as they were; yields how many."""
    i, numbers = task
    done = out / DONE / f"{i:06d}.npz"
    if done.exists():
        with np.load(done) as found:
            paths = [out / name for name in found["names"].tolist()]
            if all(p.exists() for p in paths) and _checksum(out, paths) == str(found["sha256"]):
                yield len(paths)
                return
    parts: list[Crops] = []
    digest = hashlib.sha256()
    for crops in town.film(numbers):
        for folder, name, image, quality in zip(crops.folders, crops.names, crops.images, crops.quality, strict=True):
            buffer = BytesIO()
            Image.frombuffer("RGB", (WIDTH, HEIGHT), image.numpy(), "raw", "RGB", 0, 1).save(
                buffer, "JPEG", quality=int(quality)
            )
            data = buffer.getvalue()
            path = out / folder / name
            try:
                path.write_bytes(data)
            except OSError as error:  # a failed write() does not know the file's name
                raise OSError(error.errno, error.strerror, str(path)) from error
            digest.update(f"{folder}/{name}\n".encode() + data)
        parts.append(replace(crops, images=crops.images[:0]))
        yield len(crops.names)

    def column(field: str) -> np.ndarray:
        return torch.cat([getattr(c.truth, field) for c in parts]).numpy()

    n = sum(len(c.names) for c in parts)
    arrays = {field: column(field) for field in ("rotmats", "betas", "cam", "camera", "joints2d")}
    arrays |= {f: np.packbits(column(f).reshape(n, -1), axis=1) for f in ("mask", "seen", "vertices")}
    arrays["depth"] = column("depth")[column("mask")].astype(np.float16)
    for field in ("seconds", "outfit", "action"):
        values = np.concatenate([getattr(c, field) for c in parts])
        arrays[field] = values if field == "seconds" else values.astype(np.uint8)
    names = [f"{folder}/{name}" for c in parts for folder, name in zip(c.folders, c.names, strict=True)]
    everything: dict[str, Any] = {"names": np.array(names), **arrays, "sha256": np.array(digest.hexdigest())}
    with atomic_write(done) as truth:
        np.savez(truth, **everything)


def _checksum(out: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(out)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _gather(files: list[Path], out: IO[bytes]) -> str:
    """Put the arrays of the files end to end into one .npz, an array at a time; the checksum of all their checksums."""
    digest = hashlib.sha256()
    with np.load(files[0]) as first:
        keys = [k for k in first.files if k != "sha256"]
    with zipfile.ZipFile(out, "w") as archive:
        for key in keys:
            shapes, kinds = [], []
            for path in files:
                with np.load(path) as part:
                    shapes.append(part[key].shape)
                    kinds.append(part[key].dtype)
            kind = np.result_type(*kinds)  # names may be longer in one than in another
            shape = (sum(s[0] for s in shapes), *shapes[0][1:])
            header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for path in files:
                    with np.load(path) as part:
                        member.write(np.ascontiguousarray(part[key], dtype=kind).tobytes())
    for path in files:
        with np.load(path) as part:
            digest.update(str(part["sha256"]).encode())
    return digest.hexdigest()
