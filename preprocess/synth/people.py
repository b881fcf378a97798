"""Synthetic people: who they are, what they wear and how they move, drawn at random.

Clothes are functions of a point's place on the rest body (how far down the arm, how far down the leg, height, front or
back), so they have crisp edges at any resolution and look the same from every side and in every pose.
"""

from dataclasses import dataclass, fields, replace
from math import pi

import numpy as np
import torch

from ..body import axis_angle_to_matrix
from .paint import BAG, BOTTOM, HAIR, INNER, SHOES, SKIN, TOP

HAT, DARK, BIKE, LOAD = range(7, 11)  # materials of what is no part of the body: hats, phones, cycles, boxes
MATERIALS = 11
BAGS = ("none", "backpack", "left shoulder bag", "right shoulder bag", "left hand", "right hand", "trolley")
HATS = ("none", "cap", "brimmed", "beanie")
HAIRDOS = ("short", "bun", "ponytail", "full")
ACTIONS = ("walk", "stand", "phone", "carry", "cycle")
WALK, STAND, PHONE, CARRY, CYCLE = range(5)


@dataclass(frozen=True)
class People:
    """n people; every field is an array with leading size n. Colours are RGB in 0..1, lengths metres."""

    # the person
    betas: np.ndarray  # (n,10)
    hairdo: np.ndarray  # (n,) index of HAIRDOS
    crown: np.ndarray  # (n,) where the hair begins above the head joint; 1 for bald
    tail: np.ndarray  # (n,) how far the hair reaches below it, 0 for short
    stride: np.ndarray  # (n,) gait amplitude, 1 is a brisk walk
    swing: np.ndarray  # (n,) arm swing relative to the stride
    carriage: np.ndarray  # (n,) how far the arms hang down, radians
    elbow: np.ndarray  # (n,) base bend, radians
    lean: np.ndarray  # (n,) forward lean, radians
    toe_out: np.ndarray  # (n,) radians
    cadence: np.ndarray  # (n,) pairs of steps per second
    speed: np.ndarray  # (n,) metres per second
    # what they wear
    colour: np.ndarray  # (n,MATERIALS,3)
    second: np.ndarray  # (n,MATERIALS,3) second colour of the pattern
    pattern: np.ndarray  # (n,MATERIALS) index of paint.PATTERNS
    scale: np.ndarray  # (n,MATERIALS) repeats per metre; of two blocks the edge's depth, of panels the half width
    phase: np.ndarray  # (n,MATERIALS) 0..1
    rough: np.ndarray  # (n,MATERIALS) how much folds and weave show
    sleeve: np.ndarray  # (n,) end of the sleeve: 0 shoulder .. 1 wrist
    hem: np.ndarray  # (n,) end of the top: 0 hip joint .. 1 ankle, below 0 above the hips
    trouser: np.ndarray  # (n,) end of the trousers, same scale
    open: np.ndarray  # (n,) half width of what an open jacket shows, 0 for closed
    neck: np.ndarray  # (n,) depth of the neckline
    boot: np.ndarray  # (n,) where boots begin, on the scale of the hem; 2 for shoes
    thickness: np.ndarray  # (n,3) of top, bottom, hair
    skirt: np.ndarray  # (n,) end of a skirt or coat on the scale of the hem, 0 for none
    flare: np.ndarray  # (n,) how much wider it is at its end
    coat: np.ndarray  # (n,) bool: the skirt is of the top's cloth
    bag: np.ndarray  # (n,) index of BAGS
    bag_size: np.ndarray  # (n,) 0.7..1.3
    hat: np.ndarray  # (n,) index of HATS

    def __len__(self) -> int:
        return len(self.betas)

    def __getitem__(self, index: np.ndarray) -> "People":
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})


WORN = ("colour", "second", "pattern", "scale", "phase", "rough", "sleeve", "hem", "trouser", "open", "neck", "boot",
        "thickness", "skirt", "flare", "coat", "bag", "bag_size", "hat")  # fmt: skip


def hsv_to_rgb(hsv: np.ndarray) -> np.ndarray:
    """RGB (...,3) of HSV (...,3), all in 0..1."""
    hue, saturation, value = np.moveaxis(hsv, -1, 0)
    k = (hue[..., None] * 6 + np.array([5.0, 3.0, 1.0])) % 6
    return value[..., None] * (1 - saturation[..., None] * np.minimum(k, 4 - k).clip(0, 1))


def sample_colours(rng: np.random.Generator, shape: tuple[int, ...], vivid: float = 0.5) -> np.ndarray:
    """Colours (...,3) of things in a street: the share `vivid` of any hue, mostly muted, the others greys."""
    grey = rng.random((*shape, 1)) ** 1.5 * 0.9 + 0.03 + rng.normal(0, 0.02, (*shape, 3))
    hsv = np.stack([rng.random(shape), 0.15 + 0.75 * rng.random(shape) ** 1.3, 0.08 + 0.87 * rng.random(shape)], -1)
    return np.where(rng.random((*shape, 1)) < vivid, hsv_to_rgb(hsv), grey).clip(0.02, 1)


def sample_people(n: int, rng: np.random.Generator) -> People:
    """n random people."""

    def uniform(low: float = 0.0, high: float = 1.0, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (n, *shape))

    def chance(p: float) -> np.ndarray:
        return rng.random(n) < p

    def choice(weights: list[float]) -> np.ndarray:
        return np.searchsorted(np.cumsum(weights) / np.sum(weights), rng.random(n), side="right")

    tone = uniform(0, 1, 1)
    skin = np.array([0.30, 0.19, 0.13]) * (1 - tone) + np.array([0.88, 0.70, 0.60]) * tone
    hair = np.array([0.05, 0.04, 0.035]) + uniform(0, 1, 1) ** 4 * np.array([0.55, 0.42, 0.28])
    colour, second = sample_colours(rng, (n, MATERIALS)), sample_colours(rng, (n, MATERIALS))
    denim = chance(0.3)[:, None]  # of all trousers jeans are the commonest
    colour[:, BOTTOM] = np.where(denim, np.array([0.13, 0.18, 0.3]) * uniform(0.5, 2.0, 1), colour[:, BOTTOM])
    dark = chance(0.5)[:, None]
    colour[:, SHOES] = np.where(dark, uniform(0.03, 0.15, 1), colour[:, SHOES])
    colour[:, SKIN], colour[:, HAIR] = skin, hair
    colour[:, DARK], colour[:, BIKE] = 0.04, colour[:, BIKE] * 0.5
    colour[:, LOAD] = np.array([0.55, 0.42, 0.28]) * uniform(0.7, 1.3, 1)  # cardboard

    pattern = np.zeros((n, MATERIALS), dtype=np.int64)
    pattern[:, TOP] = choice([0.42, 0.11, 0.04, 0.08, 0.08, 0.1, 0.07, 0.04, 0.03, 0.03])
    pattern[:, BOTTOM] = choice([0.82, 0, 0, 0.04, 0, 0, 0, 0, 0.03, 0.11])
    pattern[:, INNER] = choice([0.7, 0.2, 0, 0, 0, 0.1])
    pattern[:, BAG] = choice([0.7, 0.15, 0, 0.1, 0, 0, 0, 0, 0.05])
    repeats, edge, half, side = (
        uniform(4, 14, MATERIALS), uniform(0.1, 0.4, MATERIALS), uniform(0.05, 0.13, MATERIALS),
        uniform(0.015, 0.03, MATERIALS),
    )  # fmt: skip
    scale = np.select([pattern == 4, (pattern == 5) | (pattern == 6), pattern == 9], [edge, half, side], repeats)
    rough = np.full((n, MATERIALS), 0.9)
    rough[:, [SKIN, DARK, BIKE]] = 0.25

    # Suits of clothes: trousers, shorts, a skirt or a dress below; a shirt, a jacket or a coat above.
    below = choice([0.72, 0.1, 0.1, 0.08])
    jacket, coat = chance(0.4), chance(0.13)
    sleeve = np.where(jacket | coat, 1.05, np.array([0.02, 0.28, 0.45, 1.05])[choice([0.06, 0.4, 0.14, 0.4])])
    skirt_end = uniform(0.28, 0.85)
    hairdo = choice([0.62, 0.1, 0.16, 0.12])
    bag = choice([0.42, 0.2, 0.1, 0.1, 0.07, 0.07, 0.04])
    hat = choice([0.84, 0.07, 0.03, 0.06])
    return People(
        betas=rng.normal(0, 1, (n, 10)).clip(-2.5, 2.5),
        hairdo=hairdo,
        crown=np.where(chance(0.05), 1.0, uniform(0.09, 0.13)),
        tail=np.where((hairdo == 0) & chance(0.35) | (hairdo == 3), uniform(0.04, 0.28), 0.0),
        stride=uniform(0.5, 1.0),
        swing=uniform(0.4, 1.2),
        carriage=uniform(1.08, 1.34),
        elbow=0.12 + np.abs(rng.normal(0, 0.18, n)),
        lean=0.04 + rng.normal(0, 0.05, n),
        toe_out=uniform(0.0, 0.15),
        cadence=uniform(0.8, 1.05),
        speed=uniform(1.0, 1.6),
        colour=colour,
        second=second,
        pattern=pattern,
        scale=scale,
        phase=uniform(0, 1, MATERIALS),
        rough=rough,
        sleeve=sleeve,
        hem=np.where(below == 3, 0.12, np.where(jacket, uniform(0.0, 0.22), uniform(-0.05, 0.12))),
        trouser=np.where(below == 1, uniform(0.25, 0.6), np.where(below >= 2, np.where(chance(0.4), 1.05, 0.1), 1.05)),
        open=np.where((jacket | coat) & chance(0.45), uniform(0.03, 0.09), 0.0),
        neck=np.where(chance(0.5), uniform(0.0, 0.12), 0.0),
        boot=np.where(chance(0.12), uniform(0.55, 0.85), 2.0),
        thickness=np.stack([
            np.where(jacket | coat, uniform(0.015, 0.05), uniform(0.004, 0.02)),
            uniform(0.004, 0.028),
            uniform(0.008, 0.035),
        ], 1),
        skirt=np.where(coat, uniform(0.2, 0.7), np.where(below >= 2, skirt_end, 0.0)),
        flare=np.where(coat, uniform(0.0, 0.05), uniform(0.0, 0.14)),
        coat=coat | (below == 3),
        bag=bag,
        bag_size=uniform(0.7, 1.3),
        hat=hat,
    )  # fmt: skip


def change_clothes(people: People, rng: np.random.Generator) -> People:
    """The same people in other clothes."""
    other = sample_people(len(people), rng)
    colour = other.colour.copy()
    colour[:, [SKIN, HAIR]] = people.colour[:, [SKIN, HAIR]]
    return replace(people, **{name: getattr(other, name) for name in WORN} | {"colour": colour})


def dress_alike(people: People, model: People) -> People:
    """`people` in clothes of the cut and colours of `model`'s: what differs is body, gait, hair, pattern and bag."""
    kept = ("pattern", "scale", "phase", "bag", "bag_size")
    worn = {name: getattr(model, name) for name in WORN if name not in kept}
    colour = model.colour.copy()
    colour[:, [SKIN, HAIR]] = people.colour[:, [SKIN, HAIR]]
    return replace(people, **worn | {"colour": colour})


def vectors(x: np.ndarray | float, y: np.ndarray | float = 0.0, z: np.ndarray | float = 0.0) -> np.ndarray:
    """Vectors (...,3) of components that broadcast against each other."""
    return np.stack(np.broadcast_arrays(*(np.asarray(c, dtype=np.float64) for c in (x, y, z))), -1)


def rotations(x: np.ndarray | float, y: np.ndarray | float = 0.0, z: np.ndarray | float = 0.0) -> np.ndarray:
    """Rotation matrices (...,3,3) about axis-angle vectors given by their components."""
    return axis_angle_to_matrix(torch.from_numpy(vectors(x, y, z))).numpy()


def sample_poses(
    people: People,
    phase: np.ndarray,
    action: np.ndarray,
    rng: np.random.Generator,
    track: np.ndarray | None = None,
) -> np.ndarray:
    """Rotations (n,24,3,3) of people at phase (n,) radians of their gait; the root is left upright, facing +z.

    action: (n,) of ACTIONS. track: (n,) which rows are one person at one time, who keeps habits of the moment; by
    default each is its own.
    """
    n = len(people)
    track = np.arange(n) if track is None else track
    tracks = int(track.max()) + 1 if n else 0
    walking, cycling = action != STAND, action == CYCLE
    amplitude = np.where(cycling, 0.0, np.where(walking, people.stride, 0.08))

    def noise(sigma: float) -> np.ndarray:  # mostly of the moment, a little of the frame
        return sigma * (0.9 * rng.standard_normal(tracks)[track] + 0.4 * rng.standard_normal(n))

    def uniform(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, tracks)[track]

    turn = np.zeros((n, 30, 3))  # axis-angle of the joints, then of what comes before shoulders and elbows
    shoulder_bag = (people.bag == 2) | (people.bag == 3)
    for i, side in ((0, 1.0), (1, -1.0)):
        q = phase + pi * i
        hip = np.where(cycling, -1.0 + 0.42 * np.sin(q), -0.45 * amplitude * np.sin(q) - 0.05) + noise(0.05)
        spread = -side * (0.02 - np.abs(noise(0.04)))
        turn[:, 1 + i] = vectors(hip, noise(0.06) + side * people.toe_out * 0.4, spread)
        lift = 0.15 * amplitude + 0.75 * amplitude * np.sin(q + 2.2).clip(0) ** 1.5
        knee = np.where(cycling, 1.15 - 0.5 * np.sin(q + 0.5), lift + 0.05 + np.abs(noise(0.05)))
        turn[:, 4 + i] = vectors(knee, noise(0.03), noise(0.02))
        foot = 0.15 * amplitude * np.sin(q + 0.6) + noise(0.08)
        turn[:, 7 + i] = vectors(foot, noise(0.06) + side * people.toe_out, noise(0.05))
        turn[:, 13 + i] = vectors(noise(0.04), noise(0.06), -side * (0.08 + noise(0.04)))
        swing = 0.45 * amplitude * np.sin(q) * people.swing + noise(0.1)  # the arm goes with the other leg
        bend = people.elbow + 0.25 * amplitude * (-np.sin(q)).clip(0)
        # A hand at a strap, in a pocket, on a phone, round a box, on the handlebar, or with something heavy in it.
        habit = uniform(0, 1)
        strap = ((people.bag == 1) & (habit < 0.2)) | (shoulder_bag & (habit < 0.3))
        pocket = ~strap & (habit > 0.88)
        phone = (action == PHONE) & (side < 0)
        held = ((people.bag == 4) & (side > 0)) | ((people.bag >= 5) & (side < 0))
        swing = np.select(
            [action == CYCLE, action == CARRY, phone, strap, held],
            [-1.0 + noise(0.08), -0.35 + noise(0.08), -uniform(0.2, 0.7), -uniform(0, 0.3), 0.25 * swing],
            swing,
        )
        bend = np.select(
            [action == CYCLE, action == CARRY, phone, strap, pocket, held],
            [0.35 + np.abs(noise(0.1)), 1.35 + noise(0.1), uniform(1.5, 2.2), uniform(1.6, 2.2), uniform(0.5, 0.9),
             0.1 + 0 * bend],
            bend,
        )  # fmt: skip
        inward = np.where((action == CARRY) | phone, side * 0.35, np.where(cycling, side * 0.1, uniform(-0.5, 0.5)))
        away = side * np.abs(noise(0.06))
        turn[:, 24 + i, 0], turn[:, 26 + i, 2], turn[:, 16 + i, 2] = swing, away, -side * people.carriage
        turn[:, 28 + i, 0], turn[:, 18 + i, 1] = inward, -side * bend
        turn[:, 20 + i] = vectors(noise(0.15), noise(0.15), noise(0.15))
    turn[:, 3] = vectors(np.where(cycling, 0.35, people.lean) + noise(0.02), noise(0.06), noise(0.03))
    turn[:, 6] = vectors(np.where(cycling, 0.15, 0.0) + noise(0.04), noise(0.06), noise(0.03))
    turn[:, 9] = vectors(noise(0.04) - 0.03, noise(0.04) + 0.08 * amplitude * np.sin(phase), noise(0.03))
    look_down = np.where(action == PHONE, 0.25, np.where(cycling, -0.25, 0.0))
    turn[:, 12] = vectors(look_down + noise(0.08), noise(0.15), noise(0.05))
    turn[:, 15] = vectors(look_down + noise(0.1) + 0.05, noise(0.2), noise(0.06))
    every = axis_angle_to_matrix(torch.from_numpy(turn)).numpy()
    pose = every[:, :24]
    pose[:, 16:18] = every[:, 24:26] @ every[:, 26:28] @ pose[:, 16:18]
    pose[:, 18:20] = every[:, 28:30] @ pose[:, 18:20]
    return pose
