"""The reference of `paint` in plain torch, slow and clear: the same sums in the same order, and so the same bytes.

Its names are those of csrc/cpu/paint.h. Tensors of pixels are (H,64), planes of red, green and blue (3,H,64). What is
read from the tables stays a tensor: Python would reckon with it in double precision.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from reid3d.ops.rasterize import barycentric, rasterize_reference

from .paint import (
    _DARK,
    _SKIN,
    GROUNDS,
    MATERIAL,
    OUTFIT,
    PATTERNS,
    QUAD,
    TAPS,
    TEXTURES,
    VIEW,
    WIDTH,
    Picture,
    Scene,
    regions,
)

WORD = 0xFFFFFFFF  # torch has no sums of uint32: they are those of int64, cut off
Row = SimpleNamespace  # of a table: its columns by name
Texel = tuple[Tensor | float, Tensor | float, Tensor | bool]  # share of the second colour, brightness, whether opaque


def scramble(v: Tensor) -> Tensor:
    """pcg_output of Jarzynski and Olano, "Hash Functions for GPU Rendering", 2020."""
    state = ((v & WORD) * 747796405 + 2891336453) & WORD
    word = (((state >> ((state >> 28) + 4)) ^ state) * 277803737) & WORD
    return (word >> 22) ^ word


def cell(x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Random numbers in [0,1) at whole x and y."""
    return (scramble(x.long() + scramble(y.long() + seed)) >> 8).float() * 2.0**-24


def fraction(x: Tensor) -> Tensor:
    return x - x.floor()


def mixed(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t


def noise(x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Value noise in [0,1): random at whole x and y, smooth between."""
    i, j = x.floor(), y.floor()
    u, v = x - i, y - j
    s, t = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    near = mixed(cell(i, j, seed), cell(i + 1, j, seed), s)
    return mixed(near, mixed(cell(i, j + 1, seed), cell(i + 1, j + 1, seed), s), t)


def plain(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    return 0.0, 0.9 + 0.2 * noise(s * 9, h * 9, seed), True


def bricks(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    row = (h / q.size * 2).floor()
    along = s / q.size + fraction(row * 0.5)
    mortar = (fraction(along) < 0.07) | (fraction(h / q.size * 2) < 0.14)
    return mortar.float(), 0.85 + 0.3 * cell(along.floor(), row, seed), True


def windows(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    along, high = s / q.size, h / (q.size * 1.25)
    across, up = fraction(along), fraction(high)
    glass = (across > 0.28) & (across < 0.78) & (up > 0.3) & (up < 0.85)
    pane = cell(along.floor(), high.floor(), seed)
    return glass.float(), torch.where(glass, 0.5 + pane, 0.92 + 0.16 * noise(s * 5, h * 5, seed)), True


def slats(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    return (fraction(h / q.size * 4) < 0.25).float(), 1.0, True


def blocks(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    i, j = (s / q.size).floor(), (h / q.size * 0.7).floor()
    return cell(i, j, seed), 0.55 + 0.9 * cell(i, j, seed + 1), True


def foliage(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    v = h / (q.top - q.bottom)
    x, y = (s - 0.5 * q.width) / (0.5 * q.width), 2 * v - 1
    leaves, boughs = noise(s * 7, h * 7, seed), noise(s * 2, h * 2, seed + 1)
    crown = x * x + y * y < 0.45 + 0.55 * boughs + 0.3 * leaves - 0.15
    return leaves, (0.45 + 0.8 * boughs) * (0.8 + 0.35 * v), crown


def figure(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    """2 as the share of the second colour is skin, 3 dark."""
    tall = q.top - q.bottom
    v, x = h / tall, s / tall - 0.5 * q.width / tall
    side, gap = x.abs(), q.size * (0.5 - v)
    head = x * x * 494 + (v - 0.93) * (v - 0.93) * 204 < 1
    shoulder = (v - 0.8).clamp(min=0) * 0.9
    wide = 0.07 + 0.1 * (v - 0.6).clamp(min=0) + 0.15 * (0.56 - v).clamp(min=0)
    torso = (side < wide - shoulder) & (v > 0.47) & (v < 0.87)
    arm = (side >= wide) & (side < wide + 0.036 - shoulder) & (v > 0.44) & (v < 0.83)
    legs = ((side - gap * 0.5 - 0.032).abs() - 0.012 - 0.05 * v < 0) & (v <= 0.48)
    below = torch.where(torso | arm, 0.0, torch.where(v < 0.035, 3.0, 1.0))
    second = torch.where(head, torch.where(v > 0.945, 3.0, 2.0), torch.where(arm & (v < 0.485), 2.0, below))
    light = (0.8 + 0.3 * noise(s * 8, h * 5, seed)) * torch.where(arm, 0.85, 1.1 - 30 * side * side)
    return second, light * torch.where(x < 0, 0.92, 1.05), head | torso | arm | legs


def car(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    """3 as the share of the second colour is dark."""
    v, x = h / (q.top - q.bottom), s / q.width
    front, rear = s - 0.19 * q.width, s - 0.81 * q.width
    nearer = torch.minimum(front * front, rear * rear) + (h - 0.31) * (h - 0.31)
    tyre = nearer < 0.105
    body = (v > 0.16) & (v < 0.64) & (x > 0.02 * v) & (x < 1 - 0.02 * v)
    cabin = (v >= 0.6) & (x > 0.16 + (v - 0.6) * 0.4) & (x < 0.86 - (v - 0.6) * 0.25)
    glass = cabin & (v < 0.95) & (v > 0.65) & ((x - 0.5).abs() > 0.012)
    second = torch.where(tyre, 3.0, torch.where(glass, 1.0, 0.0))
    return second, torch.where(nearer < 0.03, 4.0, 0.75 + 0.45 * v), body | cabin | tyre


def fence(q: Row, s: Tensor, h: Tensor, seed: int) -> Texel:
    v = h / (q.top - q.bottom)
    return 0.0, 1.0, (fraction(s / q.size) < 0.16) | (v > 0.93) | ((v > 0.1) & (v < 0.16))


TEXELS = {f.__name__: f for f in (plain, bricks, windows, slats, blocks, foliage, figure, car, fence)}


def read(table: Mapping[str, int], rows: Tensor) -> Row:
    """The columns of rows (...,columns) by name: (...) or (...,width)."""
    columns = zip(table.items(), rows.split(list(table.values()), -1), strict=True)
    return Row(**{name: column.squeeze(-1) if width == 1 else column for (name, width), column in columns})


class Frame(NamedTuple):
    """Where a view has its person, see Picture.frame."""

    zoom: Tensor
    x0: Tensor
    y0: Tensor
    height: Tensor


def rays(view: Row, frame: Frame, height: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rays of the pixels' centres in the world: metres right, up and forward for each metre away."""
    r = view.rotation
    right = (torch.arange(WIDTH, device=r.device) + 0.5 - frame.x0) / frame.zoom
    down = ((torch.arange(height, device=r.device) + 0.5 - frame.y0) / frame.zoom)[:, None]
    x, y, z = (r[k] * right + r[k + 1] * down + r[k + 2] for k in (0, 3, 6))
    return x, y, z


def paint_quad(q: Row, view: Row, frame: Frame, planes: Tensor) -> Tensor:
    """Paints one quad; returns where."""
    nx, nz, tall = -q.dz, q.dx, q.top - q.bottom
    away = (q.x - view.x) * nx + (q.z - view.z) * nz
    start = (view.x - q.x) * q.dx + (view.z - q.z) * q.dz
    x, y, z = rays(view, frame, planes.shape[1])
    t = away / (x * nx + z * nz)
    s, h = start + t * (x * q.dx + z * q.dz), frame.height - q.bottom + t * y
    inside = (t > 0.3) & (s >= 0) & (s < q.width) & (h >= 0) & (h < tall)
    s, h = s[inside], h[inside]
    texel = TEXELS[TEXTURES[int(q.kind)]](q, s, h, int(q.seed))
    second, light, opaque = (torch.as_tensor(c, device=s.device).expand_as(s) for c in texel)
    dark, skin = s.new_tensor(_DARK)[:, None], s.new_tensor(_SKIN)[:, None]
    colour = mixed(q.colour[:, None], q.second[:, None], second.clamp(max=1))
    colour = torch.where(second > 2.5, dark, torch.where(second > 1.5, skin, colour))
    where = inside.masked_scatter(inside, opaque)
    planes[:, where] = (colour * light)[:, opaque]
    return where


def paint_quads(quads: Tensor, before: bool, view: Row, frame: Frame, planes: Tensor) -> Tensor:
    """Paints every quad (S,QUAD) in turn that stands before the person, or behind; returns where any is."""
    where = torch.zeros_like(planes[0], dtype=torch.bool)
    for q in (read(QUAD, row) for row in quads):
        if (q.before > 0.5) == before and q.width > 0:
            where |= paint_quad(q, view, frame, planes)
    return where


def ground(view: Row, frame: Frame, height: int) -> Tensor:
    """The ground, and the sky above it."""
    seed = int(view.ground_seed)
    x, y, z = rays(view, frame, height)
    t = frame.height / torch.where(y < -0.01, -y, 0.01)
    x, z = (view.x + t * x) * view.ground_scale, (view.z + t * z) * view.ground_scale
    coarse, fine = noise(x * 0.7, z * 0.7, seed), noise(x * 7, z * 7, seed + 1)
    light = 0.75 + 0.3 * coarse + 0.2 * fine
    joint = (fraction(x) < 0.06) | (fraction(z) < 0.06)
    shares = {
        "asphalt": ((fraction(z * 0.11 + 0.37) - 0.5).abs() < 0.012).float(),  # with a line
        "tiles": torch.where(joint, 1.0, 0.2 * cell(x.floor(), z.floor(), seed + 2)),
        "grass": fine,
    }
    one, other, haze, sky = (c[:, None, None] for c in (view.ground_colour, view.ground_second, view.haze, view.sky))
    floor = mixed(one, other, shares[GROUNDS[int(view.ground)]]) * light
    return torch.where(y < 0, mixed(haze, floor, (-y * 12).clamp(0, 1)), mixed(haze, sky, (0.5 + y * 2).clamp(0, 1)))


def convolved(planes: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Convolved along one axis."""
    size = planes.shape[dim]
    place = torch.arange(size, device=planes.device)
    total = taps[0] * planes
    for k in range(1, TAPS):
        earlier, later = (planes.index_select(dim, (place + step).clamp(0, size - 1)) for step in (-k, k))
        total = total + taps[k] * (earlier + later)
    return total


def blur(planes: Tensor, taps: Tensor) -> Tensor:
    """Convolved with the taps (middle, one off, two off, ..) along both axes; the border repeats."""
    return convolved(convolved(planes, taps, 2), taps, 1) if taps[0] < 1 else planes


def grain(word: Tensor) -> Tensor:
    """Four bytes added: nearly Gaussian, of variance 1."""
    total = (word & 255) + (word >> 8 & 255) + (word >> 16 & 255) + (word >> 24)
    return (total.float() - 510) * 0.006766


def develop(planes: Tensor, view: Row, tone: Tensor) -> Tensor:
    """Exposure, tone curve, noise, eight bits (H,64,3)."""
    value = (planes * view.gain[:, None, None]).clamp(0, 1) * 255
    step = value.long()
    value = mixed(tone[step], tone[step + 1], fraction(value))
    word = torch.arange(planes[0].numel(), device=planes.device).view_as(planes[0]) * 4 + int(view.seed)
    luma = grain(scramble(word))
    chroma = torch.stack([grain(scramble(word + channel)) for channel in (1, 2, 3)])
    value = (value + view.noise * (0.8 * luma + 0.6 * chroma)).clamp(0, 1) * 255 + 0.5
    return value.to(torch.uint8).permute(1, 2, 0)


def pattern_at(m: Row, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """How much of the second colour materials (P,) have at places (P,)."""
    duty = 0.25 + 0.4 * m.phase
    across, down = fraction(x * m.scale + m.phase), fraction(y * m.scale + m.phase)
    badge = (x.abs() < m.scale) & (y < -0.2) & (y > -0.45)
    u, v = across - 0.5, down - 0.5
    shares = {
        "plain": torch.zeros_like(x),
        "stripes": down < duty,
        "columns": across < duty,
        "checks": 0.5 * ((down < 0.3).float() + (across < 0.3).float()),
        "blocks": y < -m.scale,
        "panel": badge & (z > 0),
        "print": badge & (z < 0),
        "dots": u * u + v * v < 0.07,
        "camouflage": noise(x * m.scale + 40 * m.phase, (y + z) * m.scale, 77) > 0.5,
        "sides": (z + 0.02).abs() < m.scale,
    }
    return torch.stack([shares[name].float() for name in PATTERNS]).gather(0, m.pattern.long()[None])[0]


def lit(corners: Tensor, view: Row) -> Tensor:
    """How bright flat faces are, of corners (P,3,3) in space."""
    a, b, c = corners.unbind(1)
    (ax, ay, az), (bx, by, bz) = (b - a).unbind(1), (c - a).unbind(1)
    nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
    # torch's float32 root is often one bit off; that of double precision, rounded, never is
    length = (nx * nx + ny * ny + nz * nz).double().sqrt().float() + 1e-12
    facing, upward = ((nx * d[0] + ny * d[1] + nz * d[2]) / length for d in (view.light, view.up))
    return view.ambient * (0.75 + 0.25 * upward) + view.sun * facing.clamp(min=0)


def dress(scene: Scene, b: int, view: Row, verts: Tensor, points: Tensor, face: Tensor, planes: Tensor) -> None:
    """Draws the person over what is painted: the pixels whose face is not -1."""
    row, column = (face >= 0).nonzero(as_tuple=True)
    face = face[row, column]
    corners, part, outfit = scene.faces[face], scene.part[face], read(OUTFIT, scene.outfit[b])
    u, v, t = barycentric(points[corners], torch.stack([column, row], 1) + 0.5).unsqueeze(-1).unbind(1)
    first, second, third = scene.fields[corners].unbind(1)
    place = u * first + v * second + t * third
    light = lit(verts[corners], view)
    x, y, z = place[:, :3].unbind(1)
    folds = noise(x * 11 + z * 5, y * 7 + outfit.seed, 5) + noise(x * 23 - z * 9, y * 19 + outfit.seed, 6) - 1
    weave = noise(x * 90 + z * 60, y * 90, 7) - 0.5
    which = regions(place, vars(outfit))
    worn = part >= 0
    which[worn] = scene.part_material[b, part[worn]]
    m = read(MATERIAL, scene.material[b, which])
    bright = light * (1 + m.rough * (folds * 0.28 + weave * 0.12))
    planes[:, row, column] = mixed(m.colour.T, m.second.T, pattern_at(m, x, y, z)) * bright


def stage(scene: Scene, b: int, view: Row) -> tuple[Tensor, Tensor, Tensor, Frame]:
    """Poses the mesh of image b, stands it before the camera, and frames it.

    Returns vertices (V+E,3) in the camera's frame, their pixels and depths, and those of the shadow that they cast on
    the ground.
    """
    blend = scene.rest.new_zeros(len(scene.joint), 12)
    for k in range(4):
        blend = blend + scene.weight[:, k, None] * scene.transforms[b, scene.joint[:, k]]
    x, y, z = scene.rest[b].unbind(1)
    posed = (blend[:, i] * x + blend[:, i + 1] * y + blend[:, i + 2] * z + blend[:, i + 3] for i in (0, 4, 8))
    x, y, z = torch.cat([torch.stack(list(posed), 1), scene.worn[b]]).unbind(1)
    up, light = view.up, view.light
    level = x * up[0] + y * up[1] + z * up[2]
    low, z = level.min(), z + view.distance
    column, row = x / z, y / z
    left, right = column[: scene.framed].aminmax()
    top, bottom = row[: scene.framed].aminmax()
    zoom = view.tall / (bottom - top)
    x0, y0 = view.column - (left + right) * 0.5 * zoom, view.row - (top + bottom) * 0.5 * zoom
    frame = Frame(zoom, x0, y0, -(up[2] * view.distance + low))
    along = (level - low) / (light[0] * up[0] + light[1] * up[1] + light[2] * up[2])
    ahead = z - along * light[2]
    across, down = (x - along * light[0]) / ahead * zoom + x0, (y - along * light[1]) / ahead * zoom + y0
    laid = torch.stack([across, down, torch.where(ahead > 0.3, ahead, torch.inf)], 1)  # not drawn behind the camera
    return torch.stack([x, y, z], 1), torch.stack([column * zoom + x0, row * zoom + y0, z], 1), laid, frame


def draw(mesh: Tensor, faces: Tensor, height: int) -> tuple[Tensor, Tensor]:
    depth, face = rasterize_reference(mesh[None], faces, height, WIDTH)
    return depth[0], face[0]


def paint_one(scene: Scene, b: int, height: int) -> Picture:
    """Image b of the scenes."""
    view, quads = read(VIEW, scene.view[b]), scene.quad[b]
    verts, points, laid, frame = stage(scene, b, view)
    planes = ground(view, frame, height)
    if view.shadow > 0:
        _, face = draw(laid, scene.faces, height)
        planes = planes * torch.where(face < 0, 1.0, 1 - view.shadow)
    paint_quads(quads, False, view, frame, planes)
    planes = blur(planes, scene.taps[b, 0])
    depth, face = draw(points, scene.faces, height)
    mask = face >= 0
    dress(scene, b, view, verts, points, face, planes)
    seen = mask & ~paint_quads(quads, True, view, frame, planes)
    image = develop(blur(planes, scene.taps[b, 1]), view, scene.tone[b])
    shown = torch.zeros(len(verts), dtype=torch.bool, device=face.device)
    shown[scene.faces[face[seen]]] = True
    return Picture(image, mask, seen, torch.where(mask, depth - view.distance, 0.0), shown, torch.stack(frame))


def check_columns(name: str, rows: Tensor, table: Mapping[str, int]) -> None:
    if rows.shape[-1] != sum(table.values()):
        raise RuntimeError(f"{name} must have {sum(table.values())} columns, got {rows.shape[-1]}")


def check_indices(name: str, indices: Tensor, least: int, count: int) -> None:
    if ((indices < least) | (indices >= count)).any():
        raise RuntimeError(f"{name} must hold indices between {least} and {count - 1}")


def paint_reference(
    rest: Tensor,
    transforms: Tensor,
    joint: Tensor,
    weight: Tensor,
    worn: Tensor,
    framed: int,
    faces: Tensor,
    part: Tensor,
    fields: Tensor,
    outfit: Tensor,
    part_material: Tensor,
    material: Tensor,
    quad: Tensor,
    view: Tensor,
    taps: Tensor,
    tone: Tensor,
    height: int,
) -> Picture:
    """`paint` in plain torch, of the fields of a Scene."""
    check_indices("faces", faces, 0, rest.shape[1] + worn.shape[1])
    check_indices("joint", joint, 0, transforms.shape[1])
    check_indices("part", part, -1, part_material.shape[1])
    check_indices("part_material", part_material, 0, material.shape[1])
    for name, rows, table in (
        ("outfit", outfit, OUTFIT), ("material", material, MATERIAL), ("quad", quad, QUAD), ("view", view, VIEW),
    ):  # fmt: skip
        check_columns(name, rows, table)
    scene = Scene(rest, transforms, joint, weight, worn, framed, faces, part, fields, outfit, part_material, material,
                  quad, view, taps, tone)  # fmt: skip
    n, pixels = len(rest), (len(rest), height, WIDTH)
    pictures = Picture(
        image=rest.new_empty(*pixels, 3, dtype=torch.uint8),
        mask=rest.new_empty(pixels, dtype=torch.bool),
        seen=rest.new_empty(pixels, dtype=torch.bool),
        depth=rest.new_empty(pixels),
        shown=rest.new_empty(n, len(fields), dtype=torch.bool),
        frame=rest.new_empty(n, 4),
    )
    for b in range(n):
        for every, one in zip(pictures, paint_one(scene, b, height), strict=True):
            every[b] = one
    return pictures


torch.library.impl("reid3d::paint", "CompositeExplicitAutograd", paint_reference)
