"""Pictures of clouds, fitted bodies, heat and matches, by Pillow alone: PNG files in place of windows and pages."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..cloud import PointCloud
from ..io import Record
from ..ops import rasterize

SIZE = (384, 192)  # height and width of a panel, in pixels
FRONT, SIDE, ABOVE = (0.0, 0.0), (math.pi / 2, 0.0), (0.0, math.pi / 2)  # yaw and pitch
RIGHT, WRONG = (46, 160, 67), (207, 34, 46)  # frames of matches
PAPER, INK, SKIN = (255, 255, 255), (60, 60, 60), (166, 189, 219)
GAP, LINE = 14, 26  # pixels between panels, and for a line of text
HEAT = (  # from little to much: blue to yellow, as seen with any eyes, ever lighter
    (22, 24, 84),
    (86, 38, 140),
    (160, 50, 132),
    (218, 88, 88),
    (246, 156, 52),
    (252, 238, 130),
)
# Of the system, behind Pillow's own, for letters that it has not: the first that has all of a text.
FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc")


class Panel(NamedTuple):
    """A picture, the words above it, and the colour of its frame, if it has one."""

    title: str
    picture: Image.Image
    frame: tuple[int, int, int] | None = None


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 of values in [0, 1], what is outside cut off: ever lighter, from dark blue to yellow."""
    place = np.nan_to_num(np.clip(values, 0, 1)) * (len(HEAT) - 1)
    low = np.minimum(place.astype(int), len(HEAT) - 2)
    anchors, share = np.array(HEAT, float), (place - low)[..., None]
    return np.rint(anchors[low] * (1 - share) + anchors[low + 1] * share).astype(np.uint8)


def heated(rgb: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Colours (..., 3) uint8 made grey, under the heat of values (...) in [0, 1], the denser the hotter."""
    values = np.nan_to_num(np.clip(values, 0, 1))[..., None]
    grey = rgb @ np.array([0.299, 0.587, 0.114]) * 0.6 + 80
    share = 0.15 + 0.8 * np.sqrt(values)
    return (grey[..., None] * (1 - share) + heat_colours(values[..., 0]) * share).astype(np.uint8)


@dataclass(frozen=True)
class View:
    """A cloud from one side, as large as fits into a picture of `size` (H, W) from the camera's side, or its body from
    this one; about the middle of the whole across, and of the body in depth.

    yaw, pitch: radians. 0, 0 is the camera's side; yaw pi/2 the side to the right of the image, where what is away from
    the camera is to the right; pitch pi/2 is above, where it is up.
    """

    cloud: PointCloud
    yaw: float = 0.0
    pitch: float = 0.0
    size: tuple[int, int] = SIZE

    def project(self, xyz: np.ndarray) -> np.ndarray:
        """Where points (N, 3) of the cloud's frame are in the picture: (N, 3) pixels right and down, and depth."""
        height, width = self.size
        return self._turned(xyz) * self._scale() + [width / 2, height / 2, 0]

    def _turned(self, xyz: np.ndarray) -> np.ndarray:
        low, high, depth = self._box()
        centre = np.array([*(low + high)[:2] / 2, depth])
        cy, sy, cp, sp = math.cos(self.yaw), math.sin(self.yaw), math.cos(self.pitch), math.sin(self.pitch)
        yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        pitch = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        turned: np.ndarray = (xyz - centre) @ (pitch @ yaw).T
        return turned

    def draw(self, heat: np.ndarray | None = None, background: bool = True) -> Image.Image:
        """The points as squares, the nearest on top, below all of them the background, small and faded.

        heat: (N,) in [0, 1], drawn in place of colours.
        """
        height, width = self.size
        body = self._body()
        rgb = self.cloud.rgb if heat is None else heated(self.cloud.rgb, heat)
        rgb = np.where((body | (heat is not None))[:, None], rgb, self.cloud.rgb * 0.25 + 185).astype(np.uint8)
        picture = np.full((height, width, 3), 250, np.uint8)
        if not len(self.cloud):
            return Image.fromarray(picture)
        place = self.project(self.cloud.xyz.astype(np.float64))
        low, high, _ = self._box()
        share = 0.5 if body.all() else 1.0  # of its box that a body fills, and a whole crop
        pitch = self._scale() * math.sqrt(share * float(np.prod((high - low)[:2])) / len(self.cloud))
        sides = np.clip(np.rint([1.3 * pitch, 2 * pitch]), 1, 16).astype(int)  # of a point of background and of body
        parts = []
        for side, chosen in zip(sides.tolist(), (~body & background, body), strict=True):
            x, y = np.floor(place[chosen, :2] - side / 2 + 0.5).clip(-1e6, 1e6).astype(int).T
            dy, dx = np.divmod(np.arange(side * side), side)
            index = np.repeat(np.flatnonzero(chosen), side * side)
            parts.append(((y[:, None] + dy).ravel(), (x[:, None] + dx).ravel(), index))
        row, column, index = (np.concatenate(part) for part in zip(*parts, strict=True))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        row, column, index = row[inside], column[inside], index[inside]
        order = np.lexsort([-place[index, 2], body[index]])  # of several written to one pixel the last stays
        picture[row[order], column[order]] = rgb[index[order]]
        return Image.fromarray(picture)

    def _body(self) -> np.ndarray:
        """(N,) what is not background; all where nothing is known."""
        body = self.cloud.vertex >= 0
        return body if body.any() else ~body

    def _box(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Corners of the cloud, and the depth of the middle of its body."""
        if not len(self.cloud):
            return np.zeros(3), np.zeros(3), 0.0
        xyz = self.cloud.xyz.astype(np.float64)
        of_body = xyz[self._body(), 2]
        return xyz.min(0), xyz.max(0), float(of_body.min() + of_body.max()) / 2

    def _scale(self) -> float:
        low, high, _ = self._box()
        body = self.cloud.xyz[self._body()].astype(np.float64)
        reach = 2.1 * np.abs(self._turned(body)[:, :2]).max(0, initial=0.0)  # with room for the points' squares
        wide, tall = np.maximum(np.maximum((high - low)[:2], reach), 1e-9)
        return float(min(self.size[1] / wide, self.size[0] / tall))


def crop_of(cloud: PointCloud, record: Record) -> np.ndarray:
    """The crop (H, W, 3) uint8 again, from its cloud: each point falls back into its pixel, the first of several.

    A pixel that none falls into takes the colour on its left.
    """
    height, width = record.size
    place = np.floor(record.project(cloud.xyz.astype(np.float64)) + 1e-4)
    inside = ((place >= 0) & (place < [width, height])).all(1)
    pixel = (place[inside, 1] * width + place[inside, 0]).astype(int)
    owner = np.full(height * width, -1)
    owner[pixel[::-1]] = np.flatnonzero(inside)[::-1]
    filled = np.maximum.accumulate(np.where(owner >= 0, np.arange(len(owner)), -1))
    picture = np.full((height * width, 3), 230, np.uint8)
    picture[filled >= 0] = cloud.rgb[owner[filled[filled >= 0]]]
    return picture.reshape(height, width, 3)


def enlarge(pixels: np.ndarray, size: tuple[int, int] = SIZE) -> Image.Image:
    """Pixels (h, w, 3) uint8 as a picture of `size` (H, W), each a rectangle."""
    return Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.NEAREST)


def draw_body(picture: Image.Image, verts: Tensor, faces: Tensor, pixels: np.ndarray) -> Image.Image:
    """A body (V, 3) over a faded picture, lit from the camera. faces: (F, 3); pixels: (V, 2) of its vertices."""
    verts = verts.detach().cpu().float()
    faces = faces.cpu()
    points = torch.cat([torch.from_numpy(pixels).float(), verts[:, 2:]], 1)
    seen = rasterize(points[None], faces, picture.height, picture.width).face[0]
    a, b, c = verts[faces[seen[seen >= 0]]].unbind(1)
    normals = torch.nn.functional.normalize(torch.linalg.cross(b - a, c - a), dim=1)
    light = (normals @ torch.tensor([0.2, -0.3, -0.9])).clamp(0, 1) * 0.75 + 0.25
    out = torch.from_numpy(np.array(picture.convert("RGB"))).float() * 0.4 + 150
    out[seen >= 0] = light[:, None] * torch.tensor(SKIN).float()
    return Image.fromarray(out.clamp(0, 255).byte().numpy())


def draw_points(picture: Image.Image, cloud: PointCloud, record: Record) -> Image.Image:
    """The points of a cloud's body over a faded picture of its crop, near ones light: where no body is known."""
    grey = np.asarray(picture.convert("L").convert("RGB"), float) * 0.4 + 130
    out = Image.fromarray(grey.astype(np.uint8))
    body = cloud.xyz[cloud.vertex >= 0].astype(np.float64)
    if len(body):
        pixels = at_size(record, (picture.height, picture.width)).project(body)
        near, far = body[:, 2].min(), body[:, 2].max()
        colours = heat_colours(1 - (body[:, 2] - near) / max(far - near, 1e-6))
        draw = ImageDraw.Draw(out)
        for k in np.argsort(-body[:, 2], kind="stable").tolist():
            x, y = pixels[k].tolist()
            draw.rectangle((x - 1, y - 1, x + 1, y + 1), fill=tuple(colours[k].tolist()))
    return out


def at_size(record: Record, size: tuple[int, int]) -> Record:
    """The record of the same crop at another size, stretched or not."""
    return replace(record, size=size, aspect=record.aspect or record.size[1] / record.size[0])


def draw_heat(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """Heat (h, w) in [0, 1], stretched over a picture."""
    sharp = Image.fromarray(np.nan_to_num(np.clip(heat, 0, 1)).astype(np.float32))
    smooth = np.asarray(sharp.resize(picture.size, Image.Resampling.BICUBIC))
    return Image.fromarray(heated(np.asarray(picture.convert("RGB")), smooth))


def draw_matches(
    left: Image.Image, right: Image.Image, starts: np.ndarray, ends: np.ndarray, strength: np.ndarray
) -> Image.Image:
    """Two pictures side by side, with lines from places of one to places of the other.

    starts, ends: (M, 2) pixels of each. strength: (M,) in [0, 1], how thick a line is; the strongest lie on top. The
    colour says how high a line begins, from dark above to light below.
    """
    fine = 3  # Pillow draws without smoothing
    gap = GAP
    out = Image.new("RGB", (left.width + gap + right.width, max(left.height, right.height)), PAPER)
    for picture, x in ((left, 0), (right, left.width + gap)):
        out.paste(Image.blend(picture.convert("RGB"), Image.new("RGB", picture.size, PAPER), 0.35), (x, 0))
    lines = out.resize((out.width * fine, out.height * fine), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(lines)
    height = starts[:, 1]
    order = (height - height.min()) / max(float(np.ptp(height)), 1e-9) if len(starts) else height
    colours = heat_colours(order)
    for k in np.argsort(strength, kind="stable").tolist():
        ink, thick = tuple(colours[k].tolist()), round((1 + 2 * float(np.clip(strength[k], 0, 1))) * fine)
        (x, y), (u, v) = (starts[k] * fine).tolist(), ((ends[k] + [left.width + gap, 0]) * fine).tolist()
        draw.line((x, y, u, v), fill=ink, width=thick)
        for a, b in ((x, y), (u, v)):
            draw.ellipse((a - 2 * fine, b - 2 * fine, a + 2 * fine, b + 2 * fine), fill=ink, outline=PAPER, width=fine)
    return lines.resize(out.size, Image.Resampling.LANCZOS)


def draw_text(
    draw: ImageDraw.ImageDraw,
    xy: tuple[float, float],
    text: str,
    width: float,
    *,
    size: int = 15,
    anchor: str = "lm",
    ink: tuple[int, int, int] = INK,
) -> None:
    """One line of any text, cut in its middle to a width in pixels; letters that no font has, and those that are not
    printed, appear as Python writes them, as \\u65e5.
    """
    font, words = _legible(text, size)
    if font.getlength(words) > width:
        shorter = [f"{words[: (kept + 1) // 2]}...{words[len(words) - kept // 2 :]}" for kept in range(len(words))]
        words = shorter[max(bisect_right(shorter, width, key=font.getlength) - 1, 0)]
    draw.text(xy, words, ink, font, anchor=anchor)


def grid(rows: Sequence[Sequence[Panel]], heading: str = "", labels: Sequence[str] = (), size: int = 15) -> Image.Image:
    """Panels in rows, each below its title and in its frame; columns are as wide as their widest panel.

    heading: a line above all. labels: one above each row. size: of the letters, in pixels.
    """
    columns = max(map(len, rows))
    widths = [max(row[k].picture.width for row in rows if k < len(row)) for k in range(columns)]
    heights = [max(panel.picture.height for panel in row) for row in rows]
    top = LINE + 6 if heading else 0
    above = LINE if labels else 0
    tall = sum(above + LINE + height + GAP for height in heights)
    whole = GAP + sum(width + GAP for width in widths), top + GAP // 2 + tall
    out = Image.new("RGB", whole, PAPER)
    draw = ImageDraw.Draw(out)
    if heading:
        draw_text(draw, (GAP, GAP // 2 + LINE / 2), heading, whole[0] - 2 * GAP, size=size + 3)
    y = top + GAP // 2
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        x = GAP
        if labels:
            draw_text(draw, (x, y + LINE / 2), labels[number], whole[0] - 2 * GAP, size=size)
            y += above
        for panel, width in zip(row, widths, strict=False):
            draw_text(draw, (x + width / 2, y + LINE / 2), panel.title, width + GAP - 4, size=size, anchor="mm")
            at = x + (width - panel.picture.width) // 2, y + LINE
            out.paste(panel.picture, at)
            if panel.frame:
                right, below = at[0] + panel.picture.width + 1, at[1] + panel.picture.height + 1
                draw.rectangle((at[0] - 2, at[1] - 2, right, below), outline=panel.frame, width=4)
            x += width + GAP
        y += LINE + height + GAP
    return out


class Item(NamedTuple):
    """A cloud and what is known of it. record: of its crop, None for a file of points. body: verts (V, 3) and faces
    (F, 3) that were fitted to the crop, None where they are not known.
    """

    cloud: PointCloud
    record: Record | None
    name: str
    body: tuple[Tensor, Tensor] | None = None


def panels_of(item: Item, size: tuple[int, int] = SIZE) -> list[Panel]:
    """The crop, the fitted body over it (else the points of the body), and the cloud from the front, side and above."""
    panels = []
    cloud, record = item.cloud, item.record
    if record is not None and record.cam[0] > 0:
        crop = enlarge(crop_of(cloud, record), size)
        if item.body is None:
            over = Panel("points of the body", draw_points(crop, cloud, record))
        else:
            verts, faces = item.body
            pixels = at_size(record, size).project(verts.double().numpy())
            over = Panel("fitted body", draw_body(crop, verts, faces, pixels))
        panels = [Panel("crop", crop), over]
    sides = ("front", FRONT), ("side", SIDE), ("above", ABOVE)
    return panels + [Panel(side, View(cloud, *angles, size=size).draw()) for side, angles in sides]


def facts_of(item: Item) -> str:
    """What is known of a cloud, in a line: its confidence before all."""
    facts = [f"{len(item.cloud):,} points, {int((item.cloud.vertex >= 0).sum()):,} of the body"]
    if item.record is not None:
        upright = " (upright body)" if item.record.fit == "mean" else ""
        confidence = item.record.quality.get("confidence")
        said = "no confidence known" if confidence is None else f"confidence {confidence:.2f}"
        facts.insert(0, f"{said}{upright}")
    return " · ".join(facts)


def inspection(item: Item) -> Image.Image:
    """All there is to see of one cloud: see `panels_of`."""
    picture = grid([panels_of(item)], heading=item.name)
    out = Image.new("RGB", (picture.width, picture.height + LINE), PAPER)
    out.paste(picture)
    draw_text(ImageDraw.Draw(out), (GAP, picture.height + LINE / 2 - GAP / 2), facts_of(item), picture.width - 2 * GAP)
    return out


def contact_sheet(items: Sequence[Item], columns: int = 3, size: tuple[int, int] = (160, 80)) -> Image.Image:
    """Many clouds: of each the panels of `panels_of`, small, and below them its name and confidence."""
    tiles = []
    for item in items:
        pictures = [panel.picture for panel in panels_of(item, size)]
        tile = Image.new("RGB", (5 * (size[1] + 2), size[0] + 2 * 18), PAPER)
        for k, picture in enumerate(pictures):
            tile.paste(picture, (k * (size[1] + 2), 0))
        draw = ImageDraw.Draw(tile)
        for line, text in enumerate((item.name, facts_of(item))):
            draw_text(draw, (0, size[0] + 18 * line + 9), text, tile.width, size=12)
        tiles.append(tile)
    wide, tall = tiles[0].size
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (wide + GAP) + GAP, rows * (tall + GAP) + GAP), PAPER)
    for k, tile in enumerate(tiles):
        row, column = divmod(k, columns)
        sheet.paste(tile, (GAP + column * (wide + GAP), GAP + row * (tall + GAP)))
    return sheet


@cache
def _fonts(size: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, ...]:
    found = [ImageFont.load_default(size)]
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:
            continue
    return tuple(found)


@cache
def _has(size: int, font: int, letter: str) -> bool:
    """Whether a font draws a letter otherwise than one that there is not."""
    none, mask = (_fonts(size)[font].getmask(text) for text in ("\uffff", letter))
    return (mask.size, bytes(mask)) != (none.size, bytes(none))


def _legible(text: str, size: int) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, str]:
    """The first of the fonts that has the most letters of a text, and the text with the others spelt out."""
    words = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    missing = [[letter for letter in set(words) if not _has(size, k, letter)] for k in range(len(_fonts(size)))]
    best = min(range(len(missing)), key=lambda k: len(missing[k]))
    spelt = "".join(ascii(letter)[1:-1] if letter in missing[best] else letter for letter in words)
    return _fonts(size)[best], spelt
