"""RGB-to-vertex mapping: a crop and its fitted body become one coloured point for every pixel.

A body vertex takes the colour of its pixel when the camera sees it: its normal is turned towards the camera, it lies
within 2 cm of the triangle z-buffer at the pixel's centre, and it is the nearest such vertex of the pixel. Every pixel
that colours no vertex becomes a background point, on the plane parallel to the image at the mean depth of the body.

Source: Zheng et al., "Parameter-Efficient Person Re-identification in the 3D Space", 2022, section III-A. The published
code z-buffers the vertices alone and then peels edges, which colours hidden vertices where the mesh is coarser than the
pixels; the exact triangle z-buffer here does not.
"""

import torch
from torch import Tensor

from reid3d.cloud import PointCloud

from .body import vertex_normals
from .camera import check_images, project, unproject_pixels
from .zbuffer import rasterize

DEPTH_TOLERANCE = 0.02  # metres


def visible_vertices(points: Tensor, verts: Tensor, faces: Tensor, height: int, width: int) -> Tensor:
    """For each pixel the vertex that takes its colour: (B,H*W) int64, -1 where none.

    Args:
        points: (B,V,3) pixel position and depth of the vertices.
        verts: (B,V,3) the same vertices in metres, camera frame.
        faces: (F,3).
    """
    batch, count = points.shape[:2]
    column, row = points[..., 0].floor().long(), points[..., 1].floor().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    surface = rasterize(points, faces, height, width).depth.flatten(1).gather(1, pixel)
    facing = vertex_normals(verts, faces)[..., 2] < 0
    # Where the centre of the pixel sees no face the buffer is empty: the vertex is on the rim, the pixel mostly street.
    seen = inside & facing & surface.isfinite() & (verts[..., 2] <= surface + DEPTH_TOLERANCE)
    # Rank vertices by depth within each body: the lowest rank of a pixel is its nearest vertex, ties to the lower one.
    order = torch.argsort(verts[..., 2], dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(count, device=order.device).expand(batch, -1))
    best = torch.full((batch, height * width), count, device=points.device)
    best.scatter_reduce_(1, pixel, torch.where(seen, rank, count), "amin")
    return torch.where(best < count, order.gather(1, best.clamp(max=count - 1)), -1)


def map_images(images: Tensor, verts: Tensor, cam: Tensor, faces: Tensor) -> list[PointCloud]:
    """Coloured point clouds of crops: the seen vertices in vertex order, then the background row by row.

    Args:
        images: (B,H,W,3) uint8 RGB.
        verts: (B,V,3) fitted bodies, metres, camera frame (x right, y down, z away).
        cam: (B,3) weak perspective [s, tx, ty], see camera.py.
        faces: (F,3) of the body.

    Returns:
        B clouds of exactly H*W points each.

    Raises:
        TypeError: images are not uint8.
        ValueError: images are not (B,H,W,3).
    """
    height, width = check_images(images)
    vertex = visible_vertices(project(verts, cam, height, width), verts, faces, height, width)
    plane = unproject_pixels(cam, verts[..., 2].mean(1), height, width)
    clouds = []
    for colours, body, background, owner in zip(images.flatten(1, 2), verts, plane, vertex, strict=True):
        painted = (owner >= 0).nonzero()[:, 0]
        painted = painted[owner[painted].argsort()]
        unpainted = (owner < 0).nonzero()[:, 0]
        clouds.append(
            PointCloud(
                xyz=torch.cat([body[owner[painted]], background[unpainted]]).float().cpu().numpy(),
                rgb=torch.cat([colours[painted], colours[unpainted]]).cpu().numpy(),
                vertex=torch.cat([owner[painted], owner[unpainted]]).int().cpu().numpy(),
            )
        )
    return clouds
