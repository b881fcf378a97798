"""Synthetic people: random body shapes, clothes and gaits, drawn in batches from one generator.

Clothes are functions of a point's place on the rest body (how far down the arm, how far down the leg, height, front or
back), so they have crisp edges at any resolution and look the same from every side and in every pose.
"""

from dataclasses import dataclass, fields, replace
from math import pi

import torch
from torch import Generator, Tensor

from ..body import Body, axis_angle_to_matrix

SKIN, TOP, BOTTOM, SHOES, HAIR, BAG = range(6)
PATTERNS = ("plain", "stripes", "columns", "block", "panel")


@dataclass(frozen=True)
class People:
    """n people; every field is a tensor with leading size n. Colours are RGB in 0..1, lengths metres."""

    betas: Tensor  # (n,10)
    colour: Tensor  # (n,6,3) of SKIN, TOP, BOTTOM, SHOES, HAIR, BAG
    second: Tensor  # (n,3) second colour of the top's pattern
    pattern: Tensor  # (n,) index into PATTERNS
    pattern_scale: Tensor  # (n,) stripes per metre; for "block" the height of the edge, for "panel" its half width
    pattern_phase: Tensor  # (n,) 0..1
    sleeve: Tensor  # (n,) end of the sleeve: 0 shoulder .. 1 wrist
    hem: Tensor  # (n,) end of the top: 0 hip joint .. 1 ankle, below 0 above the hips
    trouser: Tensor  # (n,) end of the trousers, same scale
    hair: Tensor  # (n,) how far the hair reaches below the ears, metres
    bag: Tensor  # (n,) depth of the backpack, 0 for none
    thickness: Tensor  # (n,3) of top, bottom, hair
    stride: Tensor  # (n,) gait amplitude, 1 is a brisk walk
    swing: Tensor  # (n,) arm swing relative to the stride
    carriage: Tensor  # (n,) how far the arms hang down, radians
    elbow: Tensor  # (n,) base bend, radians
    lean: Tensor  # (n,) forward lean, radians
    toe_out: Tensor  # (n,) radians
    cadence: Tensor  # (n,) steps pairs per second

    def __len__(self) -> int:
        return len(self.betas)

    def __getitem__(self, index: Tensor) -> "People":
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})


def uniform(generator: Generator, n: int | tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(n, generator=generator)


def normal(generator: Generator, n: int | tuple[int, ...], sigma: float = 1.0) -> Tensor:
    """Normal numbers of mean 0."""
    return sigma * torch.randn(n, generator=generator)


def choice(generator: Generator, n: int, weights: list[float]) -> Tensor:
    """Indices (n,) drawn with the given weights."""
    return torch.multinomial(torch.tensor(weights), n, replacement=True, generator=generator)


def hsv_to_rgb(hsv: Tensor) -> Tensor:
    """RGB (...,3) of HSV (...,3), all in 0..1."""
    hue, saturation, value = hsv.unbind(-1)
    k = (hue[..., None] * 6 + torch.tensor([5.0, 3.0, 1.0])) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))


def sample_colours(generator: Generator, n: int) -> Tensor:
    """Colours (n,3) of things people wear and stand before: 45 % greys, the rest any hue."""
    grey = uniform(generator, (n, 1)) ** 1.3 + normal(generator, (n, 3), 0.03)
    hsv = uniform(generator, (n, 3))
    hsv[:, 2] = hsv[:, 2] ** 0.8
    return torch.where(uniform(generator, (n, 1)) < 0.45, grey, hsv_to_rgb(hsv)).clamp(0, 1)


def sample_people(n: int, generator: Generator) -> People:
    """n random people."""
    tone = uniform(generator, (n, 1))
    skin = torch.tensor([0.35, 0.22, 0.15]) * (1 - tone) + torch.tensor([0.95, 0.78, 0.68]) * tone
    hair = torch.tensor([0.08, 0.06, 0.05]) + uniform(generator, (n, 1)) ** 3 * torch.tensor([0.6, 0.45, 0.3])
    worn = [sample_colours(generator, n) for _ in range(4)]
    pattern = choice(generator, n, [0.45, 0.18, 0.07, 0.15, 0.15])
    scale = torch.stack(
        [
            torch.zeros(n),
            uniform(generator, n, 4, 16),
            uniform(generator, n, 5, 16),
            uniform(generator, n, 0.05, 0.35),
            uniform(generator, n, 0.05, 0.13),
        ]
    )
    long_coat = uniform(generator, n) < 0.2
    return People(
        betas=normal(generator, (n, 10)).clamp(-2.5, 2.5),
        colour=torch.stack([skin, worn[0], worn[1], worn[2], hair, worn[3]], 1),
        second=sample_colours(generator, n),
        pattern=pattern,
        pattern_scale=scale.gather(0, pattern[None])[0],
        pattern_phase=uniform(generator, n),
        sleeve=torch.tensor([0.25, 0.45, 1.05])[choice(generator, n, [0.25, 0.2, 0.55])],
        hem=torch.where(long_coat, uniform(generator, n, 0.3, 0.6), uniform(generator, n, -0.1, 0.2)),
        trouser=torch.tensor([0.3, 0.55, 1.05])[choice(generator, n, [0.1, 0.15, 0.75])],
        hair=torch.where(uniform(generator, n) < 0.35, uniform(generator, n, 0.05, 0.25), torch.zeros(n)),
        bag=torch.where(uniform(generator, n) < 0.25, uniform(generator, n, 0.06, 0.15), torch.zeros(n)),
        thickness=torch.stack([uniform(generator, n) ** 2 * 0.045, uniform(generator, n) ** 2 * 0.035,
                               0.005 + uniform(generator, n) ** 2 * 0.035], 1),
        stride=uniform(generator, n, 0.55, 1.15),
        swing=uniform(generator, n, 0.4, 1.2),
        carriage=uniform(generator, n, 1.05, 1.32),
        elbow=0.12 + normal(generator, n, 0.18).abs(),
        lean=0.04 + normal(generator, n, 0.05),
        toe_out=uniform(generator, n, 0.0, 0.15),
        cadence=uniform(generator, n, 0.8, 1.1),
    )  # fmt: skip


def _rotation(n: int, x: Tensor | float = 0.0, y: Tensor | float = 0.0, z: Tensor | float = 0.0) -> Tensor:
    """Rotation matrices (n,3,3) about one axis-angle vector given by its components."""
    return axis_angle_to_matrix(torch.stack([torch.as_tensor(c, dtype=torch.float32).expand(n) for c in (x, y, z)], -1))


def sample_poses(people: People, phase: Tensor, standing: Tensor, generator: Generator) -> Tensor:
    """Rotations (n,24,3,3) of people at phase (n,) radians of their gait; the root is left upright, facing +z.

    `standing` (n,) bool stills the legs and arms. One arm in eight, at random, is raised to a phone or half bent.
    """
    n = len(people)
    amplitude = torch.where(standing, 0.08, people.stride)

    def noise(sigma: float) -> Tensor:
        return normal(generator, n, sigma)

    pose = torch.eye(3).repeat(n, 24, 1, 1)
    for i, side in ((0, 1.0), (1, -1.0)):
        q = phase + pi * i
        hip = -0.45 * amplitude * q.sin() - 0.05 + noise(0.05)
        pose[:, 1 + i] = _rotation(
            n, hip, noise(0.06) + side * people.toe_out * 0.4, -side * (0.02 - noise(0.04).abs())
        )
        lift = 0.15 * amplitude + 0.75 * amplitude * (q + 2.2).sin().clamp(min=0) ** 1.5
        pose[:, 4 + i] = _rotation(n, lift + 0.05 + noise(0.05).abs(), noise(0.03), noise(0.02))
        pose[:, 7 + i] = _rotation(
            n, 0.15 * amplitude * (q + 0.6).sin() + noise(0.08), noise(0.06) + side * people.toe_out, noise(0.05)
        )
        pose[:, 13 + i] = _rotation(n, noise(0.04), noise(0.06), -side * (0.08 + noise(0.04)))
        swing = 0.45 * amplitude * q.sin() * people.swing + noise(0.12)  # the arm goes with the other leg
        bend = people.elbow + 0.25 * amplitude * (-q.sin()).clamp(min=0)
        mode = uniform(generator, n)
        raised, half = mode < 0.08, (mode >= 0.08) & (mode < 0.13)
        bend = torch.where(
            raised, uniform(generator, n, 1.2, 2.2), torch.where(half, uniform(generator, n, 0.5, 1.1), bend)
        )
        swing = torch.where(raised, -uniform(generator, n, 0.0, 0.5), swing)
        away = side * noise(0.06).abs()
        pose[:, 16 + i] = _rotation(n, swing) @ _rotation(n, z=away) @ _rotation(n, z=-side * people.carriage)
        pose[:, 18 + i] = _rotation(n, x=uniform(generator, n, -0.6, 0.6)) @ _rotation(n, y=-side * bend)
        pose[:, 20 + i] = _rotation(n, noise(0.15), noise(0.15), noise(0.15))
    pose[:, 3] = _rotation(n, people.lean + noise(0.02), noise(0.06), noise(0.03))
    pose[:, 6] = _rotation(n, noise(0.04), noise(0.06), noise(0.03))
    pose[:, 9] = _rotation(n, noise(0.04) - 0.03, noise(0.04) + 0.08 * amplitude * phase.sin(), noise(0.03))
    pose[:, 12] = _rotation(n, noise(0.08), noise(0.15), noise(0.05))
    pose[:, 15] = _rotation(n, noise(0.1) + 0.05, noise(0.2), noise(0.06))
    return pose


class Tailor:
    """Dresses a body: for every place on its rest surface, who wears what there.

    `fields` (V,9) are the places of the vertices; they may be interpolated over the faces. Columns: rest position
    relative to the head joint (x, y, z) metres, how far down the arm (0 shoulder, 1 wrist), how far down the leg
    (0 hip, 1 ankle, negative above the hips), and how much the place belongs to arm, leg, head, foot (0..1).
    """

    def __init__(self, body: Body) -> None:
        joints, verts, weights = body.j_template, body.v_template, body.weights
        arm, leg = weights[:, 16:].sum(1), weights[:, [1, 2, 4, 5, 7, 8, 10, 11]].sum(1)
        foot = (weights[:, [7, 8, 10, 11]].sum(1) > 0.5) & (verts[:, 1] < joints[7, 1] - 0.01)
        along_arm = (verts[:, 0].abs() - joints[16, 0].abs()) / (joints[20, 0].abs() - joints[16, 0].abs())
        along_leg = (joints[1, 1] - verts[:, 1]) / (joints[1, 1] - joints[7, 1])
        self.fields = torch.cat(
            [verts - joints[15], torch.stack([along_arm, along_leg, arm, leg, weights[:, 15], foot.float()], 1)], 1
        )

    def regions(self, fields: Tensor, people: People) -> Tensor:
        """Which of SKIN .. BAG covers each place: fields (P,9) with people[P], or (V,9) broadcast over people (n,1)."""
        x, y, z, along_arm, along_leg, arm, _, head, foot = fields.unbind(-1)
        on_arm, on_head, on_foot = arm > 0.5, head > 0.5, foot > 0.5
        trunk = ~on_arm & ~on_head & (y < -0.06)
        top = (on_arm & (along_arm < people.sleeve)) | (trunk & (along_leg < people.hem))
        bottom = trunk & (along_leg >= people.hem) & (along_leg < people.trouser)
        crown = on_head & ((y > 0.115) | ((z < 0.02) & (y > 0.0)))
        tail = (z < -0.02) & (y < 0.05) & (y > -people.hair) & (x.abs() < 0.11) & ~on_arm & (people.hair > 0)
        chest = ~on_arm & (y < -0.14) & (y > -0.52)
        pack = chest & (z < 0.0) & (x.abs() < 0.15)
        strap = ~on_arm & (y < -0.06) & (y > -0.45) & (z >= 0.0) & ((x.abs() - 0.1).abs() < 0.018)
        region = torch.full_like(along_arm + people.hem, SKIN).long()
        for part, code in (
            (top, TOP), (bottom, BOTTOM), (on_foot, SHOES), (tail | crown, HAIR),
            ((pack | strap) & (people.bag > 0), BAG),
        ):  # fmt: skip
            region = torch.where(part, code, region)
        return region

    def offsets(self, people: People) -> Tensor:
        """How far clothes, hair and backpack stand off the skin along the rest normals: (n,V) metres."""
        column = replace(
            people, **{k: getattr(people, k)[:, None] for k in ("sleeve", "hem", "trouser", "hair", "bag")}
        )
        region = self.regions(self.fields, column)
        top, bottom, hair = people.thickness.unbind(1)
        depth = torch.stack(
            [torch.zeros(len(people)), top, bottom, torch.full((len(people),), 0.008), hair, people.bag], 1
        )
        y, z = self.fields[:, 1], self.fields[:, 2]
        # The pack swells towards its middle; the strap has no depth.
        swell = ((1 - ((y + 0.33) / 0.19) ** 2).clamp(min=0) * (z < 0)).clamp(max=1).sqrt()
        out = depth.gather(1, region)
        return torch.where(region == BAG, out * swell + 0.01, out)

    def colours(self, fields: Tensor, people: People) -> Tensor:
        """Colours (P,3) of places (P,9) on people (P)."""
        region = self.regions(fields, people)
        colour = people.colour.gather(1, region[:, None, None].expand(-1, 1, 3))[:, 0]
        x, y, z = fields[:, 0], fields[:, 1], fields[:, 2]
        scale, phase = people.pattern_scale, people.pattern_phase
        marked = torch.stack(
            [
                torch.zeros_like(x, dtype=torch.bool),
                (y * scale + phase) % 1 < 0.25 + 0.4 * phase,
                (x * scale + phase) % 1 < 0.25 + 0.4 * phase,
                y < -0.15 - scale,
                (x.abs() < scale) & (z > 0) & (y < -0.2) & (y > -0.45),
            ]
        ).gather(0, people.pattern[None])[0]
        return torch.where((marked & (region == TOP))[:, None], people.second, colour)
