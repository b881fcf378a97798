"""Paints streets with a person, a crop of 64 pixels' width at a time: what the pixels of a scene are.

The world has x to the right, y up and z forward, metres; the camera stands at (x, height, z), and the ground is y = 0.
Every surface but the person is a `quad`: an upright rectangle whose texture is a function of the place on it. The
person is a mesh; a pixel's place on the rest body decides which garment it shows.

A row of each table is a fixed list of numbers (QUAD, MATERIAL, OUTFIT, VIEW), made by `pack`. All arithmetic is float32
and rounded as it is written, with no function that differs between machines: a scene is the same bytes everywhere.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import reid3d.ops  # noqa: F401 (loads the kernels)

WIDTH = 64
TAPS = 5  # of half a blur kernel

QUAD = dict(
    x=1, z=1, dx=1, dz=1,  # one foot of the rectangle and the direction, of length 1, towards the other
    width=1, bottom=1, top=1,  # metres; width 0 for none
    kind=1,  # of TEXTURES
    size=1,  # of a brick, a window, a slat, a block, a bar (metres); of a figure, how far its legs stand apart
    seed=1,  # whole, below 2**24
    before=1,  # 1 where it stands between the camera and the person
    colour=3, second=3,
)  # fmt: skip
MATERIAL = dict(colour=3, second=3, pattern=1, scale=1, phase=1, rough=1)
OUTFIT = dict(sleeve=1, hem=1, trouser=1, tail=1, crown=1, open=1, neck=1, boot=1, strap=1, seed=1)
VIEW = dict(
    up=3, light=3,  # unit vectors in the camera's frame, light towards the sun
    distance=1,  # of the body's origin along the camera's axis, metres
    tall=1,  # how high the person is in the crop, pixels
    column=1, row=1,  # where the middle of their box falls, pixels
    rotation=9,  # row by row; its columns are the camera's right, down and forward in the world
    x=1, z=1,  # where the camera stands
    ambient=1, sun=1,  # how bright
    shadow=1,  # how much of the light the person's shadow takes from the ground
    gain=3,  # exposure times white balance
    noise=1, seed=1,
    sky=3, haze=3,  # overhead and at the horizon
    ground=1, ground_scale=1, ground_seed=1, ground_colour=3, ground_second=3,  # ground: of GROUNDS
)  # fmt: skip
TEXTURES = ("plain", "bricks", "windows", "slats", "blocks", "foliage", "figure", "car", "fence")
GROUNDS = ("asphalt", "tiles", "grass")
SKIN, TOP, BOTTOM, SHOES, HAIR, INNER, BAG = range(7)  # materials of a dressed body; `part_material` may name others
PATTERNS = ("plain", "stripes", "columns", "checks", "blocks", "panel", "print", "dots", "camouflage", "sides")
_SKIN, _DARK = (0.62, 0.46, 0.38), (0.06, 0.055, 0.05)  # of figures; tyres


class Scene(NamedTuple):
    """n scenes. A mesh has V vertices that are skinned, E already posed, F faces, and P parts that are not body."""

    rest: Tensor  # (n,V,3) float32: dressed bodies in the rest pose, metres
    transforms: Tensor  # (n,J,12) float32: of each joint a 3 x 4 matrix, into the frame of the root
    joint: Tensor  # (V,4) int64: which joints move a vertex
    weight: Tensor  # (V,4) float32: and how much
    worn: Tensor  # (n,E,3) float32: in the frame of the root
    framed: int  # how many of all vertices, the first, the crop is framed about
    faces: Tensor  # (F,3) int64
    part: Tensor  # (F,) int64: -1 body, or the part that a face belongs to
    fields: Tensor  # (V+E,8) float32: place on the rest body, see wardrobe.Wardrobe
    outfit: Tensor  # (n,OUTFIT)
    part_material: Tensor  # (n,P) int64
    material: Tensor  # (n,M,MATERIAL)
    quad: Tensor  # (n,S,QUAD), the farther first
    view: Tensor  # (n,VIEW)
    taps: Tensor  # (n,2,5) halves of the blur kernels, middle first: behind the person, and of the lens
    tone: Tensor  # (n,257) brightness of 256 + 1 steps of exposure


class Picture(NamedTuple):
    """n pictures."""

    image: Tensor  # (n,H,64,3) uint8
    mask: Tensor  # (n,H,64) bool: the person with all that is worn, as if nothing stood before them
    seen: Tensor  # (n,H,64) bool: where the image shows them
    depth: (
        Tensor  # (n,H,64) float32: how far behind the root the mask lies along the camera's axis, metres; 0 elsewhere
    )
    shown: Tensor  # (n,V+E) bool: vertices of a face that is seen
    frame: (
        Tensor  # (n,4): a point (x, y, z) of the camera's frame falls on the pixel zoom * (x, y) / z + (x0, y0): zoom,
    )
    # x0, y0, and how high the camera stands above the ground, metres


def pack(table: Mapping[str, int], values: Mapping[str, np.ndarray]) -> Tensor:
    """Rows (...,columns) float32 of a table, from an array (...) or (...,width) for each name.

    Raises:
        ValueError: names that are not the table's.
    """
    if values.keys() != table.keys():
        raise ValueError(f"values must be {', '.join(table)}; {', '.join(sorted(values.keys() ^ table.keys()))}")
    columns = [np.asarray(values[k])[..., None] if w == 1 else np.asarray(values[k]) for k, w in table.items()]
    shape = np.broadcast_shapes(*(c.shape[:-1] for c in columns))
    rows = [np.broadcast_to(c, (*shape, w)) for c, w in zip(columns, table.values(), strict=True)]
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(rows, -1), dtype=np.float32))


def paint(scene: Scene, height: int) -> Picture:
    """The pictures of n scenes, height x 64 pixels each."""
    contiguous = (x.contiguous() if isinstance(x, Tensor) else x for x in scene)
    return Picture(*torch.ops.reid3d.paint(*contiguous, height))


def regions(fields: Tensor, outfit: Mapping[str, Tensor]) -> Tensor:
    """Which of SKIN .. BAG a dressed body shows at places (...,8); the outfit's numbers broadcast against (...)."""
    x, y, z, along_arm, along_leg, on_arm, on_head, on_foot = fields.unbind(-1)
    o, side = outfit, x.abs()
    arm, head = on_arm > 0.5, on_head > 0.5
    slope = (y + 0.27) * 0.6
    off = torch.where(o["strap"] < 1.5, side - 0.1, torch.where(o["strap"] < 2.5, x * 0.8 + slope, x * 0.8 - slope))
    strap = (o["strap"] > 0.5) & ~arm & (y < -0.06) & (y > -0.45) & (off.abs() < 0.02) & ((z >= 0) | (o["strap"] > 1.5))
    crown = head & (o["crown"] < 1) & ((y > o["crown"]) | ((z < 0.02) & (y > o["crown"] - 0.115)))
    tail = (o["tail"] > 0) & ~arm & (z < -0.02) & (y < 0.05) & (y > -o["tail"]) & (side < 0.11)
    shoe = (on_foot > 0.5) | (~arm & (along_leg > o["boot"]))
    collar = (z > 0) & (y > -0.06 - o["neck"] * (1 - side * 11))
    trunk = ~arm & ~head & (y < -0.06) & ~collar
    top = (arm & (along_arm < o["sleeve"])) | (trunk & (along_leg < o["hem"]))
    inner = top & ~arm & (z > 0) & (side < o["open"])
    region = torch.where(trunk & (along_leg < o["trouser"]), BOTTOM, SKIN)
    for where, code in ((top, TOP), (inner, INNER), (shoe, SHOES), (crown | tail, HAIR), (strap, BAG)):
        region = torch.where(where, code, region)
    return region


torch.library.define(
    "reid3d::paint",
    "(Tensor rest, Tensor transforms, Tensor joint, Tensor weight, Tensor worn, int framed, Tensor faces, Tensor part, "
    "Tensor fields, Tensor outfit, Tensor part_material, Tensor material, Tensor quad, Tensor view, Tensor taps, "
    "Tensor tone, int height) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
