"""An exact triangle z-buffer in plain torch: batched, on any device, no dependency."""

from typing import NamedTuple

import torch
from torch import Tensor


class Fragments(NamedTuple):
    """What each pixel sees: face (B,H,W) int64, -1 where nothing; depth (B,H,W), +inf where nothing."""

    face: Tensor
    depth: Tensor


def _cross(o: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return (a[..., 0] - o[..., 0]) * (b[..., 1] - o[..., 1]) - (b[..., 0] - o[..., 0]) * (a[..., 1] - o[..., 1])


def rasterize(points: Tensor, faces: Tensor, height: int, width: int) -> Fragments:
    """The nearest front face behind each pixel centre.

    A face is in front if its corners turn counter-clockwise as one looks at the image, which is how the corners of a
    mesh turn that are counter-clockwise seen from outside. A centre on an edge belongs to both faces; of faces at the
    same depth the lower index wins. Depth is interpolated linearly on the screen.

    Args:
        points: (B,V,3) pixel position x, y and depth z, smaller is nearer; may lie outside the image.
        faces: (F,3) int64, shared by the batch.
    """
    batch, count = len(points), len(faces)
    corners = points.index_select(1, faces.flatten()).view(batch * count, 3, 3)
    xy = corners[..., :2]
    # Pixel centres inside each face's bounding box: columns x0..x1 and rows y0..y1.
    low, high = (xy.amin(1) - 0.5).ceil(), (xy.amax(1) - 0.5).floor()
    x0, y0 = low[:, 0].clamp(0, width).long(), low[:, 1].clamp(0, height).long()
    x1, y1 = high[:, 0].clamp(-1, width - 1).long(), high[:, 1].clamp(-1, height - 1).long()
    area = _cross(xy[:, 0], xy[:, 1], xy[:, 2])
    cols = (x1 - x0 + 1).clamp(min=0)
    boxes = cols * (y1 - y0 + 1).clamp(min=0) * (area < 0)
    hit = boxes.nonzero()[:, 0]
    # Ragged expansion: one row for each (face, pixel of its box).
    size = boxes[hit]
    face = torch.repeat_interleave(hit, size)
    step = torch.arange(len(face), device=points.device) - torch.repeat_interleave(size.cumsum(0) - size, size)
    px, py = x0[face] + step % cols[face], y0[face] + step // cols[face]
    bary = barycentric(corners[face], torch.stack([px, py], -1) + 0.5)
    inside = (bary >= 0).all(-1)
    face, px, py = face[inside], px[inside], py[inside]
    depth = (bary[inside] * corners[face][..., 2]).sum(-1).float()
    # One atomic-free reduction finds nearest depth and lowest face together: the depth's bits, made to sort like the
    # number also when negative, above the face index. (+0.0 turns -0.0 into 0.0, which has other bits.)
    bits = (depth + 0.0).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | (face % count)
    empty = torch.iinfo(torch.int64).max
    buffer = torch.full((batch * height * width,), empty, dtype=torch.int64, device=points.device)
    buffer.scatter_reduce_(0, (face // count) * (height * width) + py * width + px, key, "amin")
    seen = buffer != empty
    bits = (buffer >> 32).int()
    z = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    shape = (batch, height, width)
    return Fragments(
        torch.where(seen, buffer & 0xFFFFFFFF, -1).view(shape), torch.where(seen, z, torch.inf).view(shape)
    )


def barycentric(corners: Tensor, pixel: Tensor) -> Tensor:
    """Barycentric coordinates (P,3) on the screen of positions pixel (P,2) in triangles corners (P,3,>=2)."""
    a, b, c = corners.unbind(1)
    area = _cross(a, b, c)
    # Each from its own edge, not the third as the rest: faces that share an edge then leave no crack along it.
    return torch.stack([_cross(pixel, b, c), _cross(pixel, c, a), _cross(pixel, a, b)], -1) / area[..., None]
