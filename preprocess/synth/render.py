"""Renders synthetic people in streets as surveillance crops, with the exact truth beside each."""

from dataclasses import dataclass, replace
from math import pi

import numpy as np
import torch
from torch import Tensor

from ..body import NUM_BETAS, NUM_JOINTS
from . import painter  # noqa: F401 (the reference, where no kernel was built)
from .paint import BOTTOM, MATERIAL, PATTERNS, TAPS, TOP, VIEW, WIDTH, Scene, pack, paint
from .people import BAGS, CARRY, CYCLE, HATS, PHONE, STAND, WALK, People, rotations, sample_people, sample_poses
from .street import (
    BLOCKS,
    BRICKS,
    COLUMN,
    FENCE,
    PLAIN,
    SLATS,
    WINDOWS,
    Shots,
    Streets,
    sample_shots,
    sample_streets,
)
from .wardrobe import Girth, Wardrobe

HEIGHT = 128
# What training never shows, and what it shows instead: of paint.PATTERNS and paint.TEXTURES.
UNSEEN_PATTERNS = {PATTERNS.index(a): PATTERNS.index(b) for a, b in
                   (("checks", "columns"), ("dots", "stripes"), ("camouflage", "plain"))}  # fmt: skip
UNSEEN_TEXTURES = {SLATS: BRICKS, BLOCKS: WINDOWS}
NARROWEST_WALL = 5.0  # metres
TRUNK, LIMBS = [0, 3, 6, 9], [1, 2, 4, 5, 16, 17, 18, 19]  # the whole and the spine; hips, knees, shoulders, elbows
NEAR = 0.4  # metres before the person where something begins to hide them


@dataclass(frozen=True)
class Truth:
    """What is known of n crops. A tensor each, with leading size n."""

    rotmats: Tensor  # (n,24,3,3) float32: the root in the camera's frame
    betas: Tensor  # (n,15) float32: of the person, and those of body.CLOTHES that come nearest to what is worn
    cam: Tensor  # (n,3) float32: the nearest weak perspective camera, see camera.py
    camera: Tensor  # (n,4) float32: focal length, x0, y0 (pixels), distance of the body's origin (metres), exactly
    joints2d: Tensor  # (n,24,2) float32 in half crop heights from the crop's centre: what camera.py calls s (X + t)
    mask: Tensor  # (n,H,W) bool: the person with all that is worn, held or ridden, as if nothing stood before them
    seen: Tensor  # (n,H,W) bool: where the crop shows them
    depth: Tensor  # (n,H,W) float32: how far behind the body's origin the mask lies, metres; 0 elsewhere
    vertices: Tensor  # (n,V) bool: vertices of the low body of which a face is seen


def half_kernel(sigma: np.ndarray) -> np.ndarray:
    """The middle and one side (n,TAPS) of Gaussian kernels that sum to 1."""
    taps = np.exp(-0.5 * (np.arange(TAPS) / sigma.clip(0.05)[:, None]) ** 2)
    return taps / (taps[:, :1] + 2 * taps[:, 1:].sum(1, keepdims=True))


def tone_curves(gamma: np.ndarray, contrast: np.ndarray) -> Tensor:
    """Brightness (n,257) of 256 steps of exposure and one more for interpolation: a power, then an S."""
    x = np.minimum(np.arange(257) / 255, 1) ** gamma[:, None]
    return torch.from_numpy((x + contrast[:, None] * (x * x * (3 - 2 * x) - x)).astype(np.float32))


def sample_scenes(
    n: int, rng: np.random.Generator, unseen: bool = False
) -> tuple[People, np.ndarray, np.ndarray, Streets, Shots]:
    """What Renderer takes, n scenes far more varied than any world's: people, poses, actions, streets, shots.

    Some patterns, a hat, a bag, walls and fences are in no scene, so that a fitter which learned from the others
    can be tried on what it never saw: with `unseen` every top has one of the patterns, every street only such walls,
    and the rest are about. Without, one person in five leans, bends and spreads their limbs as people in photos do.
    """
    people = sample_people(n, rng)
    action = rng.choice([WALK, STAND, PHONE, CARRY, CYCLE], n, p=[0.6, 0.16, 0.1, 0.06, 0.08])
    poses = sample_poses(people, rng.uniform(0, 2 * pi, n), action, rng)
    # Now and then somebody does what none of the actions is: the joints are where chance puts them.
    loose = np.where(rng.random((n, 1, 1)) < 0.1, 0.3, 0.0) * rng.standard_normal((n, len(LIMBS), 3))
    poses[:, LIMBS] = poses[:, LIMBS] @ rotations(*np.moveaxis(loose, -1, 0))
    shots = sample_shots(n, rng)
    streets = sample_streets(n, rng, np.hypot(shots.x, shots.z))
    pattern, kind = people.pattern.copy(), streets.quads[..., COLUMN["kind"]].copy()
    if unseen:
        pattern[:, TOP] = np.array(list(UNSEEN_PATTERNS))[rng.integers(len(UNSEEN_PATTERNS), size=n)]
        seen_walls = np.isin(kind, [PLAIN, BRICKS, WINDOWS]) & (streets.quads[..., COLUMN["width"]] > NARROWEST_WALL)
        kind = np.where(seen_walls, rng.choice([SLATS, BLOCKS], kind.shape), kind)
        people = replace(people, pattern=pattern, scale=np.where(
            np.isin(pattern, list(UNSEEN_PATTERNS)), rng.uniform(4, 14, pattern.shape), people.scale))  # fmt: skip
    else:
        for other, known in UNSEEN_PATTERNS.items():
            pattern[pattern == other] = known
        for other, known in UNSEEN_TEXTURES.items():
            kind[kind == other] = known
        people = replace(
            people,
            pattern=pattern,
            hat=np.where(people.hat == HATS.index("brimmed"), HATS.index("cap"), people.hat),
            bag=np.where(people.bag == BAGS.index("trolley"), BAGS.index("none"), people.bag),
        )
    quads = streets.quads.copy()
    quads[..., COLUMN["kind"]] = kind
    if not unseen:
        quads[..., COLUMN["width"]] *= kind != FENCE
        sigma = np.zeros((NUM_JOINTS, 1))
        sigma[TRUNK], sigma[LIMBS] = 0.14, 0.35
        turn = np.where(rng.random((n, 1, 1)) < 0.2, sigma, 0.0) * rng.standard_normal((n, NUM_JOINTS, 3))
        poses = poses @ rotations(*np.moveaxis(turn, -1, 0))
    return people, poses, action, replace(streets, quads=quads), shots


class Renderer:
    """Draws people in streets; holds the wardrobe."""

    def __init__(self) -> None:
        self.wardrobe = Wardrobe()

    @torch.no_grad()
    def __call__(
        self,
        people: People,
        poses: np.ndarray,
        action: np.ndarray,
        streets: Streets,
        shots: Shots,
        who: np.ndarray | None = None,
    ) -> tuple[Tensor, Truth]:
        """Crops (n,128,64,3) uint8 and the truth about them.

        Args:
            people: n of them, or, with `who` (n,) their indices, as many as there are.
            poses: (n,24,3,3) from sample_poses; the root's rotation is added to the shot's.
            action: (n,) of people.ACTIONS. streets, shots: n of each.
        """
        n, wardrobe = len(shots), self.wardrobe
        dressed = wardrobe.rest(people)
        girth, rest = wardrobe.measure(dressed), torch.from_numpy(dressed.astype(np.float32))
        clothes = wardrobe.clothes(people, dressed, girth.belt)
        if who is not None:
            people, clothes, girth, rest = (
                people[who],
                clothes[who],
                Girth(girth.belt[who], girth.hips[who], girth.back[who]),
                rest[torch.from_numpy(who)],
            )
        ground = np.hypot(shots.x, shots.z)
        pan, drop = np.arctan2(shots.x, shots.z), shots.height - 0.92
        distance, pitch = np.hypot(ground, drop), np.arctan2(drop, ground)

        upright = rotations(0.0, 0.0, shots.roll) @ rotations(pitch) @ rotations(pi)
        up = upright[:, :, 1]
        poses = np.concatenate([(upright @ rotations(0.0, shots.heading) @ poses[:, 0])[:, None], poses[:, 1:]], 1)
        rotation, joints = (
            t.numpy() for t in wardrobe.exact.joints(torch.from_numpy(poses), torch.from_numpy(people.betas))
        )
        body = wardrobe.exact
        dirs = body.j_shapedirs[..., :NUM_BETAS].numpy()
        rest_joints = body.j_template.numpy() + np.einsum("jck,nk->njc", dirs, people.betas)
        offset = joints - np.einsum("njik,njk->nji", rotation, rest_joints)
        transforms = torch.from_numpy(np.concatenate([rotation, offset[..., None]], -1).astype(np.float32)).flatten(2)
        skirts = wardrobe.skirts(people, girth.belt, rotation, joints)
        pieces, material = wardrobe.pieces(people, girth, rotation, joints, action, up)
        worn = torch.from_numpy(np.concatenate([skirts, pieces], 1).astype(np.float32))

        # The world as paint has it.
        right = np.stack([np.cos(pan), 0 * pan, -np.sin(pan)], 1)
        ahead = np.stack([np.cos(pitch) * np.sin(pan), -np.sin(pitch), np.cos(pitch) * np.cos(pan)], 1)
        down = np.stack([-np.sin(pitch) * np.sin(pan), -np.cos(pitch), -np.sin(pitch) * np.cos(pan)], 1)
        c, s = np.cos(shots.roll)[:, None], np.sin(shots.roll)[:, None]
        to_world = np.stack([c * right - s * down, s * right + c * down, ahead], 2)
        light = (to_world * streets.towards_sun[:, :, None]).sum(1)
        middle = shots.shift * np.array([WIDTH, HEIGHT]) + np.array([WIDTH, HEIGHT]) / 2
        quads = streets.quads.copy()
        normal = quads[..., [COLUMN["dz"], COLUMN["dx"]]] * np.array([-1.0, 1.0])
        reach = (quads[..., [COLUMN["x"], COLUMN["z"]]] * normal).sum(-1)
        sight = normal[..., 0] * np.sin(pan)[:, None] + normal[..., 1] * np.cos(pan)[:, None]
        meets = reach / np.where(np.abs(sight) < 1e-6, 1e-6, sight)
        quads[..., COLUMN["before"]] = (meets > 0) & (meets < ground[:, None] - NEAR)
        lens = {k: getattr(shots, k) for k in ("gain", "noise", "seed")}
        place = {k: getattr(streets, k) for k in ("ambient", "sun", "shadow", "sky", "haze", "ground", "ground_scale",
                                                  "ground_seed", "ground_colour", "ground_second")}  # fmt: skip
        view = pack(
            VIEW,
            {"up": up, "light": light, "distance": distance, "tall": shots.fill * HEIGHT, "column": middle[:, 0],
             "row": middle[:, 1], "rotation": to_world.reshape(n, 9), "x": np.zeros(n), "z": np.zeros(n)}
            | lens | place,
        )  # fmt: skip
        look = ("colour", "second", "pattern", "scale", "phase", "rough")
        blurs = np.stack([half_kernel(shots.defocus), half_kernel(shots.blur)], 1)
        cloth = np.where(people.coat, TOP, BOTTOM)[:, None]
        scene = Scene(
            rest=rest,
            transforms=transforms,
            joint=wardrobe.joint,
            weight=wardrobe.weight,
            worn=worn,
            framed=wardrobe.count + skirts.shape[1],
            faces=wardrobe.faces,
            part=wardrobe.part,
            fields=wardrobe.fields,
            outfit=wardrobe.outfit(people),
            part_material=torch.from_numpy(np.concatenate([cloth, material], 1)),
            material=pack(MATERIAL, {k: getattr(people, k) for k in look}),
            quad=torch.from_numpy(quads.astype(np.float32)),
            view=view,
            taps=torch.from_numpy(blurs.astype(np.float32)),
            tone=tone_curves(shots.gamma, shots.contrast),
        )
        picture = paint(scene, HEIGHT)
        zoom, origin, away = picture.frame[:, 0], picture.frame[:, 1:3], torch.from_numpy(distance.astype(np.float32))

        half = HEIGHT / 2
        centre = torch.tensor([WIDTH / 2, HEIGHT / 2])
        flat = torch.from_numpy(joints.astype(np.float32))
        joints2d = (
            flat[..., :2] / (flat[..., 2:] + away[:, None, None]) * zoom[:, None, None] + origin[:, None] - centre
        ) / half
        scale = zoom / (half * away)
        return picture.image, Truth(
            rotmats=torch.from_numpy(poses.astype(np.float32)),
            betas=torch.from_numpy(np.concatenate([people.betas, clothes], 1).astype(np.float32)),
            cam=torch.cat([scale[:, None], (origin - centre) / (half * scale[:, None])], 1),
            camera=torch.cat([zoom[:, None], origin, away[:, None]], 1),
            joints2d=joints2d,
            mask=picture.mask,
            seen=picture.seen,
            depth=picture.depth,
            vertices=picture.shown[:, : wardrobe.count],
        )
