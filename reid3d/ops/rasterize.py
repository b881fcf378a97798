"""An exact z-buffer: which triangle of a mesh every pixel sees, and how deep."""

from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import check_int, check_rows

MAX_SIDE = 32768  # pixels


class Fragments(NamedTuple):
    """What each pixel sees: depth (B,H,W) float32, +inf where nothing; face (B,H,W) int64, -1 where nothing."""

    depth: Tensor
    face: Tensor


def rasterize(points: Tensor, faces: Tensor, height: int, width: int) -> Fragments:
    """The nearest front face behind the centre of every pixel.

    A face is in front if its corners turn counter-clockwise as one looks at the image, which is how the corners of a
    mesh turn that are counter-clockwise seen from outside. A centre on an edge belongs to the faces of both sides; of
    faces at the same depth the lower index wins. Depth is interpolated linearly on the screen. A face with a corner
    that is not finite is not seen. The pixel in row i and column j has its centre at x = j + 0.5, y = i + 0.5.

    Args:
        points: (B,V,3) floating point, of any dtype read as float32: position x, y in pixels and depth z, smaller is
            nearer; may lie outside the image.
        faces: (F,3) int64 indices of points, shared by the batch.
        height, width: of the image, 1 to 32768.

    Returns:
        depth and face of every pixel. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape or size out of range. RuntimeError: a face that
            names no point.

    Source: Pineda, "A Parallel Algorithm for Polygon Rasterization", SIGGRAPH 1988; the z-buffer of Catmull, 1974.
    """
    check_rows("points", points, dims=3)
    if not isinstance(faces, Tensor) or faces.dtype != torch.int64:
        raise TypeError(f"faces must be an int64 tensor, got {getattr(faces, 'dtype', type(faces).__name__)}")
    if faces.dim() != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces must have shape (F, 3), got {tuple(faces.shape)}")
    if faces.device != points.device:
        raise ValueError(f"faces must be on the device of points, {points.device}, got {faces.device}")
    height = check_int("height", height, 1, MAX_SIDE, "the longest side of an image")
    width = check_int("width", width, 1, MAX_SIDE, "the longest side of an image")
    return Fragments(*torch.ops.reid3d.rasterize(points.detach().float(), faces, height, width))


def _area(o: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Twice the signed area of triangles on the screen; negative where they turn counter-clockwise, y down."""
    return (a[..., 0] - o[..., 0]) * (b[..., 1] - o[..., 1]) - (b[..., 0] - o[..., 0]) * (a[..., 1] - o[..., 1])


def _opposite(corners: Tensor, pixel: Tensor) -> Tensor:
    """`_area` (P,3) of the triangles of positions pixel (P,2) and the edge opposite to each of corners (P,3,>=2).

    Each from its own edge, not the third as the rest: faces that share an edge then leave no crack along it.
    """
    a, b, c = corners.unbind(1)
    return torch.stack([_area(pixel, b, c), _area(pixel, c, a), _area(pixel, a, b)], -1)


def barycentric(corners: Tensor, pixel: Tensor) -> Tensor:
    """Barycentric coordinates (P,3) on the screen of positions pixel (P,2) in triangles corners (P,3,>=2)."""
    return _opposite(corners, pixel) * (1 / _area(*corners.unbind(1)))[:, None]


def rasterize_reference(points: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """`rasterize` in plain torch, for float32."""
    last = points.shape[1] - 1
    torch._assert_async(((faces >= 0) & (faces <= last)).all(), f"faces must hold indices between 0 and {last}")
    batch, count = len(points), len(faces)
    corners = points.index_select(1, faces.flatten()).view(batch * count, 3, 3)
    a, b, c = corners.unbind(1)
    area = _area(a, b, c)
    seen = (area < 0) & area.isfinite() & corners.isfinite().all(2).all(1)
    face = seen.nonzero()[:, 0]
    # Pixel centres inside each face's bounding box: columns x0..x1 and rows y0..y1.
    xy = corners[face, :, :2]
    low, high = (xy.amin(1) - 0.5).ceil(), (xy.amax(1) - 0.5).floor()
    x0, y0 = low[:, 0].clamp(0, width).long(), low[:, 1].clamp(0, height).long()
    x1, y1 = high[:, 0].clamp(-1, width - 1).long(), high[:, 1].clamp(-1, height - 1).long()
    columns = (x1 - x0 + 1).clamp(min=0)
    size = columns * (y1 - y0 + 1).clamp(min=0)
    # Ragged expansion: one row for each (face, pixel of its box).
    row = torch.repeat_interleave(torch.arange(len(face), device=points.device), size)
    step = torch.arange(len(row), device=points.device) - torch.repeat_interleave(size.cumsum(0) - size, size)
    px, py, face = x0[row] + step % columns[row], y0[row] + step // columns[row], face[row]
    centre = torch.stack([px, py], -1) + 0.5
    opposite = _opposite(corners[face], centre)
    inside = (opposite <= 0).all(-1)
    face, pixel = face[inside], (face // max(count, 1) * (height * width) + py * width + px)[inside]
    u, v, w = (opposite[inside] * (1 / area[face])[:, None]).unbind(-1)
    z = corners[face][..., 2]
    z = u * z[:, 0] + v * z[:, 1] + w * z[:, 2]
    depth = points.new_full((batch * height * width,), torch.inf).scatter_reduce_(0, pixel, z, "amin")
    nearest = torch.where(z == depth[pixel], face % max(count, 1), count)
    index = torch.full_like(depth, count, dtype=torch.int64).scatter_reduce_(0, pixel, nearest, "amin")
    shape = (batch, height, width)
    return depth.view(shape), torch.where(index < count, index, -1).view(shape)


torch.library.define(
    "reid3d::rasterize",
    "(Tensor points, Tensor faces, int height, int width) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.impl("reid3d::rasterize", "CompositeExplicitAutograd", rasterize_reference)


@torch.library.register_fake("reid3d::rasterize")
def _fake(points: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    shape = (points.shape[0], height, width)
    return points.new_empty(shape), points.new_empty(shape, dtype=torch.int64)
