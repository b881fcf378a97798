"""RGB-to-vertex mapping: a crop and its fitted body become a coloured point cloud, in one of four modes.

A body vertex is seen when its normal is turned towards the camera and it lies in the crop, no more than 1.3 pixels (2
cm at 128 x 64) behind the triangle z-buffer at its pixel's centre. The body's points come first, then the background:
pixels on the plane parallel to the image at the mean depth of the body.

- "paper": the nearest seen vertex of a pixel takes the pixel's colour; every pixel that coloured none is background.
  H*W points.
- "dense": every seen vertex takes the colour of its pixel; the pixels that see no face are background. The number of
  points depends on the body and hardly on the resolution.
- "surface": every pixel that sees a face lies where its ray meets that face, the others are background. H*W points, no
  holes at any resolution.
- "official": what the published converter does, bit for bit, faults and all: vertices are rounded to pixels and clamped
  into the crop, the nearest of a pixel takes its colour though a face may hide it, and then those go that are 5 cm
  deeper than the pixel below or to the right of them. H*W points.

Source: Zheng et al., "Parameter-Efficient Person Re-identification in the 3D Space", 2022, section III-A, and the
converter published with it (github.com/layumi/hmr). Its z-buffer of points colours hidden vertices where the mesh is
coarser than the pixels; the exact one of the first three modes does not.
"""

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from reid3d.cloud import PointCloud
from reid3d.ops import Fragments, rasterize
from reid3d.ops.rasterize import barycentric

from .camera import pixels_a_metre, project, unproject

Mode = Literal["paper", "dense", "surface", "official"]
MODES: tuple[Mode, ...] = get_args(Mode)
DEPTH_TOLERANCE = 1.3  # pixels: from a pixel's centre to its corner the surface may fall that much
OFFICIAL_STEP = 0.05  # metres


def map_crops(
    images: Tensor, verts: Tensor, cam: Tensor, faces: Tensor, mode: Mode = "paper", aspect: Tensor | None = None
) -> list[PointCloud]:
    """The coloured point clouds of crops.

    Args:
        images: (B,H,W,3) uint8 RGB.
        verts: (B,V,3) fitted bodies, metres, camera frame (x right, y down, z away).
        cam: (B,3) weak perspective [s, tx, ty], see camera.py.
        faces: (F,3) of the body.
        mode: see above.
        aspect: (B,) width/height of the crops before they were resampled to H x W; None for W/H. "official" knows no
            other.

    Returns:
        B clouds. `vertex` names a body point's vertex, in "surface" the corner of its face that is nearest on the
        screen, and is -1 for the background. Body points are in the order of their vertices, in "surface" row by row;
        the background is row by row.

    Raises:
        TypeError: images are not uint8. ValueError: images are not (B,H,W,3), or mode is none.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (B, H, W, 3), got {tuple(images.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "official":
        arrays = (array.cpu().numpy() for array in (images, verts.float(), cam.float()))
        return [official_cloud(*crop) for crop in zip(*arrays, strict=True)]
    count, height, width = images.shape[:3]
    sizes = (height, width, aspect)
    points = project(verts, cam, *sizes)
    seen = rasterize(points, faces, height, width)
    empty = (seen.face < 0).flatten()
    if mode == "surface":
        chosen = (~empty).nonzero()[:, 0]  # of all pixels
        vertex, place = surface_points(points, seen, faces)
        crop = chosen // (height * width)
        xyz = unproject(place[:, None], cam[crop], height, width, None if aspect is None else aspect[crop])[:, 0]
    else:
        pixel = _pixel(points, height, width)
        tolerance = DEPTH_TOLERANCE / pixels_a_metre(cam, *sizes).amin(1)
        visible = visible_vertices(pixel, verts, seen, faces, tolerance)
        if mode == "paper":
            visible &= _is_nearest(verts[..., 2], pixel, visible, height * width)
        row = visible.flatten().nonzero()[:, 0]  # of all vertices
        crop, vertex = row // verts.shape[1], row % verts.shape[1]
        chosen = pixel.flatten()[row] + crop * (height * width)
        xyz = verts.flatten(0, 1).index_select(0, row)
        if mode == "paper":
            empty = torch.ones_like(empty).index_fill_(0, chosen, False)
    rest = empty.nonzero()[:, 0]
    plane = background(cam, verts[..., 2].mean(1), *sizes).flatten(0, 2)
    colours = images.flatten(0, 2)
    columns = [  # body and background of each
        (xyz.float(), plane.float().index_select(0, rest)),
        (colours.index_select(0, chosen), colours.index_select(0, rest)),
        (vertex.int(), torch.full_like(rest, -1, dtype=torch.int32)),
    ]
    parts = [[half.cpu().numpy() for half in column] for column in columns]
    ends = [torch.bincount(crops, minlength=count).cumsum(0).tolist() for crops in (crop, rest // (height * width))]
    spans = [list(zip([0, *end], end, strict=False)) for end in ends]
    return [
        PointCloud(*(np.concatenate([body[a:b], behind[c:d]]) for body, behind in parts))
        for (a, b), (c, d) in zip(*spans, strict=True)
    ]


def background(cam: Tensor, depth: Tensor, height: int, width: int, aspect: Tensor | None = None) -> Tensor:
    """Points (B,H,W,3) on planes at depth (B,), one behind each pixel's centre."""
    scale = pixels_a_metre(cam, height, width, aspect)
    plane = cam.new_empty(len(cam), height, width, 3)
    for axis, size in ((0, width), (1, height)):
        from_centre = torch.arange(size, device=cam.device) + 0.5 - size / 2
        row = from_centre / scale[:, axis, None] - cam[:, 1 + axis, None]
        plane[..., axis] = row[:, None, :] if axis == 0 else row[:, :, None]
    plane[..., 2] = depth[:, None, None]
    return plane


def _pixel(points: Tensor, height: int, width: int) -> Tensor:
    """The pixel (B,V), row by row, in which points (B,V,3) lie; -1 outside the crop."""
    column, row = points[..., 0].floor(), points[..., 1].floor()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return torch.where(inside, row * width + column, -1.0).long()


def visible_vertices(pixel: Tensor, verts: Tensor, seen: Fragments, faces: Tensor, tolerance: Tensor) -> Tensor:
    """Which vertices the camera sees: (B,V) bool.

    Args:
        pixel: (B,V) of the vertices, row by row, -1 outside the crop.
        verts: (B,V,3) metres, camera frame.
        seen: what the pixels see of them.
        faces: (F,3).
        tolerance: (B,) how far behind the surface at its pixel's centre a vertex may lie, metres.
    """
    # Where the pixel's centre sees no face the buffer is infinite: the vertex is on the rim, the pixel mostly street.
    surface = seen.depth.flatten(1).gather(1, pixel.clamp(min=0))
    near = surface.isfinite() & (verts[..., 2] <= surface + tolerance[:, None])
    return near & (pixel >= 0) & (_turned_away(verts, faces) < 0)


def _turned_away(verts: Tensor, faces: Tensor) -> Tensor:
    """z (B,V) of the vertices' area-weighted normals, not of unit length: negative where they face the camera."""
    x, y = verts[..., 0].T.contiguous(), verts[..., 1].T.contiguous()  # rows of B: gathered and added as a whole
    a, b, c = faces.unbind(1)
    z = (x[b] - x[a]) * (y[c] - y[a]) - (x[c] - x[a]) * (y[b] - y[a])
    total = torch.zeros_like(x)
    for corner in (a, b, c):
        total.index_add_(0, corner, z)
    return total.T


def _is_nearest(depth: Tensor, pixel: Tensor, visible: Tensor, pixels: int) -> Tensor:
    """Whether each visible vertex (B,V) is the nearest of its pixel; of equals the lower."""
    # One reduction finds the least depth and vertex: the depth's bits, made to sort like the number, over the index.
    bits = (depth.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 has other bits
    index = torch.arange(depth.shape[1], device=depth.device)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32 | index
    pixel = torch.where(visible, pixel, pixels)
    best = torch.full((len(depth), pixels + 1), torch.iinfo(torch.int64).max, device=depth.device)
    best.scatter_reduce_(1, pixel, key, "amin")
    return best.gather(1, pixel) == key


def surface_points(points: Tensor, seen: Fragments, faces: Tensor) -> tuple[Tensor, Tensor]:
    """Of every pixel that sees a face, crop by crop and row by row, (P,) the nearest corner and (P,3) what is there.

    The latter is the pixel's centre and depth, as in points (B,V,3).
    """
    crop, row, column = (seen.face >= 0).nonzero(as_tuple=True)
    corners = faces[seen.face[crop, row, column]]
    centre = torch.stack([column, row], -1) + 0.5
    nearest = barycentric(points[crop[:, None], corners], centre).argmax(1, keepdim=True)
    depth = seen.depth[crop, row, column, None]
    return corners.gather(1, nearest)[:, 0], torch.cat([centre, depth], 1)


def official_cloud(image: np.ndarray, verts: np.ndarray, cam: np.ndarray) -> PointCloud:
    """The cloud of the published converter from image (H,W,3) uint8, verts (V,3) float32 and cam (3,) float32.

    In its arithmetic: Python 2 rounds halves away from zero; vertices are projected in float32, rounded from float64,
    compared in float64; the background is unprojected in float64 and moved in float32.
    """
    height, width = image.shape[:2]
    side = max(height, width)
    flat = ((verts[:, :2] + cam[1:]) * cam[0]).astype(np.float64)
    column, row = _round_python2((flat + 1) * 0.5 * side).T
    if height < width:
        row = _round_python2(row - width / 2 + height / 2)
    else:
        column = _round_python2(column - height / 2 + width / 2)
    pixel = (row.clip(0, height - 1) * width + column.clip(0, width - 1)).astype(np.int64)
    nearest_last = np.lexsort([-np.arange(len(verts)), -verts[:, 2]])  # of vertices at the same depth the first stays
    owner = np.full(height * width, -1)
    owner[pixel[nearest_last]] = nearest_last
    depth = np.where(owner >= 0, verts[owner, 2].astype(np.float64), np.inf).reshape(height, width)
    # The code sweeps ten times; a centre is never erased before its turn, so that one look at the whole is the same.
    centre = depth[1:-1, 1:-1] + OFFICIAL_STEP
    erased = np.zeros((height, width), bool)
    erased[:-2, 1:-1] |= depth[:-2, 1:-1] > centre
    erased[1:-1, :-2] |= depth[1:-1, :-2] > centre
    owner[erased.ravel()] = -1
    vertex = np.sort(owner[owner >= 0])
    empty = np.flatnonzero(owner < 0)
    y, x = np.divmod(empty, width)
    from_corner = np.stack([x, y], 1).astype(np.float64)
    from_corner[:, int(height < width)] += abs(height - width) / 2  # of the square that the crop was padded to
    plane = ((from_corner / side * 2 - 1) / float(cam[0])).astype(np.float32) - cam[1:]
    z = np.full((len(empty), 1), verts[:, 2].mean())
    colours = image.reshape(-1, 3)
    return PointCloud(
        xyz=np.concatenate([verts[vertex], np.concatenate([plane, z], 1)]).astype(np.float32),
        rgb=np.concatenate([colours[pixel[vertex]], colours[empty]]),
        vertex=np.concatenate([vertex, np.full(len(empty), -1)]).astype(np.int32),
    )


def _round_python2(values: np.ndarray) -> np.ndarray:
    whole = np.floor(np.abs(values))
    return np.copysign(whole + (np.abs(values) - whole >= 0.5), values)
