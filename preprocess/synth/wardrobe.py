"""Dresses a body: what stands off the skin, and what is worn or held beside it, as one mesh."""

from copy import deepcopy
from math import pi
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..body import NUM_BETAS, Body, load_body, vertex_normals
from .paint import BAG, BOTTOM, HAIR, INNER, OUTFIT, SHOES, SKIN, TOP, pack, regions
from .people import BIKE, CARRY, CYCLE, DARK, HAT, LOAD, PHONE, People

RINGS, SPOKES = 9, 24  # of a skirt
PIECES = 10  # rigid things: bag, hat, brim, hair, load, and the five of a cycle
AROUND, ACROSS = 12, 10  # vertices of one
SKIRT = 0  # the first part that is no body; then the pieces


class Girth(NamedTuple):
    """Of n dressed bodies, metres: belt (n,RINGS,2), at each ring of a skirt how far x reaches beyond the hip joint and
    z from 0; hips (n,), half their width; back (n,), where it begins behind the chest's joint.
    """

    belt: np.ndarray
    hips: np.ndarray
    back: np.ndarray


def _grid(rows: int, columns: int, closed_rows: bool, first: int) -> np.ndarray:
    """Triangles (F,3) of a grid of vertices whose columns close, numbered row by row from `first`."""
    r, c = np.meshgrid(np.arange(rows if closed_rows else rows - 1), np.arange(columns), indexing="ij")
    a, b = r * columns + c, r * columns + (c + 1) % columns
    d, e = (r + 1) % rows * columns + c, (r + 1) % rows * columns + (c + 1) % columns
    return first + np.concatenate([np.stack([a, b, d], -1).reshape(-1, 3), np.stack([b, e, d], -1).reshape(-1, 3)])


class Wardrobe:
    """The low body and everything that people wear on it.

    faces (F,3) and part (F,) of the whole mesh; fields (V,8) the place of each vertex: rest position relative to the
    head joint (x, y, z) metres, how far down the arm (0 shoulder, 1 wrist) and the leg (0 hip, 1 ankle, negative above
    the hips), and how much it belongs to an arm, the head, a foot (0..1). Of things that are no body only the position
    counts, for their pattern.
    """

    def __init__(self) -> None:
        self.exact: Body = deepcopy(load_body("low")).double()
        # In double precision and then rounded, sums are the same on every machine.
        body = self.exact
        verts, joints, weights = body.v_template, body.j_template, body.weights
        self.count = len(verts)
        self.shapedirs = body.shapedirs[..., :NUM_BETAS].flatten(0, 1)
        arm = weights[:, 16:].sum(1)
        foot = (weights[:, [7, 8, 10, 11]].sum(1) > 0.5) & (verts[:, 1] < joints[7, 1] - 0.01)
        along_arm = (verts[:, 0].abs() - joints[16, 0].abs()) / (joints[20, 0].abs() - joints[16, 0].abs())
        along_leg = (joints[1, 1] - verts[:, 1]) / (joints[1, 1] - joints[7, 1])
        own = torch.cat(
            [verts - joints[15], torch.stack([along_arm, along_leg, arm, weights[:, 15], foot.double()], 1)], 1
        )
        self.normals = vertex_normals(verts[None], body.faces)[0].numpy()
        top, order = weights.topk(4)
        dirs = body.shapedirs[..., NUM_BETAS:].numpy()
        along = np.einsum("vck,vc->vk", dirs, self.normals)
        self.tailor = np.linalg.pinv(along).T
        self.along_leg, self.on_legs = along_leg.numpy(), weights[:, [1, 2, 4, 5]].sum(1).numpy()
        self.joint, self.weight = order, (top / top.sum(1, keepdim=True)).float()

        # A skirt: rings from the waist down, each the convex hull of two circles about the legs.
        level = np.linspace(-0.12, 1.0, RINGS)  # on the scale of the hem, of the longest skirt
        self.level = level
        hip, ankle = joints[1].double().numpy(), joints[7].double().numpy()
        height = hip[1] - level * (hip[1] - ankle[1])
        trunk = (arm < 0.3).numpy()
        v = verts.double().numpy()
        self.belt = [np.flatnonzero(trunk & (np.abs(v[:, 1] - h) < 0.04)) for h in height]
        near = (verts[:, 0].abs() < 0.08) & ((verts[:, 1] - joints[9, 1]).abs() < 0.1)
        self.back = near.nonzero()[:, 0].numpy()
        turn = np.arange(SPOKES) * 2 * pi / SPOKES
        self.spoke = np.stack([np.cos(turn), np.sin(turn)], 1)  # x, z
        self.left = self.spoke[:, 0] >= 0
        skirt_faces = _grid(RINGS, SPOKES, False, self.count)
        place = np.zeros((RINGS, SPOKES, 8))
        place[..., 0], place[..., 2] = self.spoke[:, 0] * 0.25, self.spoke[:, 1] * 0.25
        place[..., 1] = (height - joints[15, 1].item())[:, None]

        # Pieces: one surface of two angles for boxes, balls, rods and rings.
        u, w = np.arange(AROUND) * 2 * pi / AROUND, np.arange(ACROSS) * 2 * pi / ACROSS - pi
        self.cu, self.su, self.cw, self.sw = np.cos(u), np.sin(u), np.cos(w), np.sin(w)
        first, size = self.count + RINGS * SPOKES, AROUND * ACROSS
        pieces = [_grid(ACROSS, AROUND, True, first + k * size) for k in range(PIECES)]
        unit = np.zeros((ACROSS, AROUND, 8))
        unit[..., 0], unit[..., 1], unit[..., 2] = 0.2 * self.cu, 0.2 * self.sw[:, None] - 0.3, 0.2 * self.su
        self.fields = torch.cat(
            [own.float(), torch.from_numpy(place.reshape(-1, 8)).float()]
            + [torch.from_numpy(unit.reshape(-1, 8)).float()] * PIECES
        )  # fmt: skip
        self.faces = torch.cat([body.faces, torch.from_numpy(np.concatenate([skirt_faces, *pieces]))])
        self.part = torch.cat(
            [torch.full((len(body.faces),), -1), torch.full((len(skirt_faces),), SKIRT)]
            + [torch.full((len(p),), 1 + k) for k, p in enumerate(pieces)]
        )
        self.own_fields = own.float()

    def outfit(self, people: People) -> Tensor:
        """The rows of paint.OUTFIT."""
        strap = np.array([0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0])[people.bag]
        names = ("sleeve", "hem", "trouser", "tail", "crown", "open", "neck", "boot")
        seed = np.floor(people.phase[:, SKIN] * 4096)
        return pack(OUTFIT, {k: getattr(people, k) for k in names} | {"strap": strap, "seed": seed})

    def rest(self, people: People) -> np.ndarray:
        """Dressed bodies (n,V,3) in the rest pose, metres: the shape, and what the clothes add along the normals."""
        columns = self.outfit(people).unbind(1)
        region = regions(self.own_fields, {k: c[:, None] for k, c in zip(OUTFIT, columns, strict=True)}).numpy()
        depth = np.zeros((len(people), 7))
        depth[:, [TOP, INNER]], depth[:, BOTTOM], depth[:, HAIR] = (
            people.thickness[:, :1], people.thickness[:, 1], people.thickness[:, 2],
        )  # fmt: skip
        depth[:, SHOES], depth[:, BAG] = 0.008, people.thickness[:, 0] + 0.008
        off = np.take_along_axis(depth, region, 1)
        # torch's product, as numpy's would wake threads of its own
        shape = (torch.from_numpy(people.betas) @ self.shapedirs.T).numpy()
        return self.exact.v_template.numpy() + shape.reshape(len(people), -1, 3) + off[..., None] * self.normals

    def measure(self, rest: np.ndarray) -> "Girth":
        """What a tailor takes down of dressed bodies (n,V,3)."""
        wide = np.stack([np.abs(rest[:, b, 0]).max(1) for b in self.belt], 1)
        deep = np.stack([np.abs(rest[:, b, 2]).max(1) for b in self.belt], 1)
        hip, spine = self.exact.j_template[1, 0].item(), self.exact.j_template[9, 2].item()
        return Girth(np.stack([wide - hip, deep], 2), wide[:, 1], rest[:, self.back, 2].min(1) - spine)

    def clothes(self, people: People, rest: np.ndarray, girth: np.ndarray) -> np.ndarray:
        """The betas (n,5) of body.CLOTHES, least squares, of what people wear on dressed bodies (n,V,3).

        What a skirt adds is how far it hangs from the leg.
        """
        shape = (torch.from_numpy(people.betas) @ self.shapedirs.T).numpy().reshape(len(people), -1, 3)
        off = ((rest - self.exact.v_template.numpy() - shape) * self.normals).sum(2)
        level, radius = self.hang(people, girth)
        # At each ring of a skirt, and how many rings down each vertex of a leg is
        away = np.where((self.level <= level[:, -1:]) & (people.skirt > 0)[:, None], (radius - girth).mean(2), 0.0)
        ring = ((self.along_leg - self.level[0]) / (self.level[1] - self.level[0])).clip(0, RINGS - 1.001)
        whole, part = ring.astype(int), ring % 1
        leg = self.on_legs * ((1 - part) * away[:, whole] + part * away[:, whole + 1])
        return np.maximum(off, leg) @ self.tailor

    def hang(self, people: People, girth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Level (n,RINGS), on the scale of the hem, and radius (n,RINGS,2), along x and z from the leg, of skirts."""
        length = np.where(people.skirt > 0, people.skirt, 0.0)
        level = np.minimum(self.level, length[:, None])  # rings beyond the end lie on it
        # Cloth hangs from the widest place above it.
        radius = np.maximum.accumulate(girth, 1) + 0.012
        last = np.maximum((self.level <= length[:, None]).sum(1) - 1, 0)
        end = radius[np.arange(len(people)), last][:, None]
        radius = (
            np.where((self.level < length[:, None])[..., None], radius, end)
            + (people.flare[:, None] * level.clip(0))[..., None]
        )
        return level, radius

    def skirts(self, people: People, girth: np.ndarray, rotation: np.ndarray, joints: np.ndarray) -> np.ndarray:
        """Skirts (n,RINGS*SPOKES,3) about the legs of posed people; all in one point where there is none."""
        n = len(people)
        pelvis, at = rotation[:, 0], joints[:, 0]
        leg = np.einsum("nji,nkj->nki", pelvis, joints[:, [1, 4, 7, 2, 5, 8]] - at[:, None])  # in the pelvis' frame
        level, radius = self.hang(people, girth)
        thigh = (leg[:, 0, 1] - leg[:, 1, 1]).clip(0.1) + (leg[:, 1, 1] - leg[:, 2, 1]).clip(0.1)
        fall = (
            level
            * 0.5
            * (thigh + (leg[:, 3, 1] - leg[:, 4, 1]).clip(0.1) + (leg[:, 4, 1] - leg[:, 5, 1]).clip(0.1))[:, None]
        )
        y = 0.5 * (leg[:, 0, 1] + leg[:, 3, 1])[:, None] - fall  # (n,RINGS)

        def middle(hip: np.ndarray, knee: np.ndarray, ankle: np.ndarray) -> np.ndarray:
            """Where the leg is at each height: (n,RINGS,2) of x, z."""
            upper = ((hip[:, None, 1] - y) / (hip[:, 1] - knee[:, 1]).clip(0.1)[:, None]).clip(0, 1)[..., None]
            lower = ((knee[:, None, 1] - y) / (knee[:, 1] - ankle[:, 1]).clip(0.1)[:, None]).clip(0, 1)[..., None]
            xz = [p[:, None, [0, 2]] for p in (hip, knee, ankle)]
            return xz[0] + upper * (xz[1] - xz[0]) + lower * (xz[2] - xz[1])

        left, right = middle(leg[:, 0], leg[:, 1], leg[:, 2]), middle(leg[:, 3], leg[:, 4], leg[:, 5])
        radius[:, 0] -= 0.03  # the belt
        centre = np.where(self.left[:, None], left[:, :, None], right[:, :, None])
        xz = centre + radius[:, :, None] * self.spoke
        local = np.stack([xz[..., 0], np.broadcast_to(y[..., None], xz.shape[:-1]), xz[..., 1]], -1).reshape(n, -1, 3)
        local = np.where((people.skirt > 0)[:, None, None], local, 0.0)
        return np.einsum("nij,nvj->nvi", pelvis, local) + at[:, None]

    def pieces(
        self,
        people: People,
        girth: "Girth",
        rotation: np.ndarray,
        joints: np.ndarray,
        action: np.ndarray,
        up: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bags, hats, loads and cycles: vertices (n,PIECES*120,3) and materials (n,PIECES)."""
        n = len(people)
        centre, half = np.zeros((n, PIECES, 3)), np.zeros((n, PIECES, 3))
        frame, ring, power = np.zeros((n, PIECES, 3, 3)), np.zeros((n, PIECES)), np.ones((n, PIECES))
        frame[:] = rotation[:, :1]
        material = np.zeros((n, PIECES), dtype=np.int64)

        def put(k: int, where: np.ndarray, joint: int, at: np.ndarray, size: np.ndarray, what: int, boxy: float = 1.0,
                hang: bool = False) -> None:  # fmt: skip
            """Piece k at `at` (.., 3) in the frame of a joint; `hang`: in that of the pelvis, from the joint."""
            turn = rotation[where, 0 if hang else joint]
            at = np.broadcast_to(at, (n, 3))[where]
            centre[where, k] = joints[where, joint] + np.einsum("nij,nj->ni", turn, at)
            half[where, k] = np.broadcast_to(size, (n, 3))[where]
            frame[where, k], power[where, k], material[where, k] = turn, boxy, what

        s = people.bag_size[:, None]
        deep = 0.075 * people.bag_size
        zero = np.zeros(n)
        put(
            0,
            people.bag == 1,
            9,
            np.stack([zero, zero, girth.back - 0.7 * deep], 1),
            np.stack([0.14 * people.bag_size, 0.2 * people.bag_size, deep], 1),
            BAG,
            0.5,
        )
        for kind, sign in ((2, 1.0), (3, -1.0)):
            put(
                0,
                people.bag == kind,
                0,
                np.stack([sign * (girth.hips + 0.03), zero - 0.02, zero - 0.03], 1),
                s * np.array([0.05, 0.13, 0.16]),
                BAG,
                0.45,
            )
        for kind, hand in ((4, 22), (5, 23)):
            put(
                0,
                people.bag == kind,
                hand,
                np.stack([zero, zero - 0.2 * people.bag_size - 0.06, zero], 1),
                s * np.array([0.06, 0.17, 0.14]),
                BAG,
                0.35,
                hang=True,
            )
        put(
            0,
            (people.bag == 6) & (action != CYCLE),
            23,
            np.stack([zero, zero - 0.42, zero - 0.22], 1),
            np.array([0.17, 0.28, 0.12]),
            BAG,
            0.3,
            hang=True,
        )
        put(1, people.hat == 1, 15, np.array([0, 0.13, 0.0]), np.array([0.092, 0.075, 0.115]), HAT)
        put(2, people.hat == 1, 15, np.array([0, 0.115, 0.11]), np.array([0.075, 0.012, 0.08]), HAT)
        put(1, people.hat == 2, 15, np.array([0, 0.15, 0.0]), np.array([0.09, 0.075, 0.11]), HAT, 0.7)
        put(2, people.hat == 2, 15, np.array([0, 0.11, 0.0]), np.array([0.17, 0.012, 0.19]), HAT)
        put(1, people.hat == 3, 15, np.array([0, 0.12, -0.01]), np.array([0.1, 0.1, 0.118]), HAT)
        put(3, people.hairdo == 1, 15, np.array([0, 0.13, -0.12]), np.array([0.05, 0.05, 0.05]), HAIR)
        put(3, people.hairdo == 2, 15, np.array([0, -0.01, -0.13]), np.array([0.035, 0.13, 0.03]), HAIR)
        put(3, people.hairdo == 3, 15, np.array([0, 0.08, -0.025]), np.array([0.115, 0.125, 0.11]), HAIR)
        put(4, action == PHONE, 23, np.array([-0.05, 0.0, 0.03]), np.array([0.04, 0.01, 0.075]), DARK, 0.3)
        put(4, action == CARRY, 9, np.array([0, -0.05, 0.38]), s * np.array([0.2, 0.14, 0.13]), LOAD, 0.25)
        # A cycle under the rider: two wheels, frame, fork and saddle, upright below the pelvis.
        riding = action == CYCLE
        if riding.any():
            side = rotation[:, 0, :, 0]
            ahead = np.cross(side, up)
            ahead /= np.linalg.norm(ahead, axis=1, keepdims=True)
            upright = np.stack([np.cross(up, ahead), np.broadcast_to(up, ahead.shape), ahead], 2)  # columns x, y, z
            ground = -0.98
            for k, at, size, wheel in (
                (5, (0, ground + 0.34, 0.62), (0.022, 0.018, 0.022), 0.32),
                (6, (0, ground + 0.34, -0.42), (0.022, 0.018, 0.022), 0.32),
                (7, (0, ground + 0.55, 0.1), (0.022, 0.022, 0.45), 0),
                (8, (0, ground + 0.75, 0.52), (0.022, 0.36, 0.022), 0),
                (9, (0, -0.08, -0.05), (0.08, 0.03, 0.13), 0),
            ):  # fmt: skip
                centre[riding, k] = joints[riding, 0] + np.einsum("nij,j->ni", upright[riding], np.array(at))
                half[riding, k], ring[riding, k], material[riding, k] = size, wheel, DARK if wheel else BIKE
                lying = upright[riding][:, :, [1, 0, 2]] if wheel else upright[riding]  # a wheel's axle is sideways
                frame[riding, k] = lying * (np.array([1.0, -1.0, 1.0]) if wheel else 1.0)

        on = half.any(-1)
        h, r, e = half[on], ring[on][:, None], power[on][:, None]
        cu, su, cw, sw = (np.sign(c) * np.abs(c) ** e for c in (self.cu, self.su, self.cw, self.sw))
        local = np.empty((len(h), ACROSS, AROUND, 3))
        local[..., 0] = (r + h[:, :1] * cw)[..., None] * cu[:, None]
        local[..., 1] = (h[:, 1:2] * sw)[..., None]
        local[..., 2] = (r + h[:, 2:] * cw)[..., None] * su[:, None]
        verts = np.zeros((n, PIECES, ACROSS * AROUND, 3))
        turned = torch.from_numpy(local.reshape(len(h), ACROSS * AROUND, 3)) @ torch.from_numpy(frame[on]).mT
        verts[on] = turned.numpy() + centre[on][:, None]
        return verts.reshape(n, -1, 3), material
