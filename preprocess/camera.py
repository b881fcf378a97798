"""The weak-perspective camera of the fits, in the frame of the clouds: x right, y down, z away, metres.

A camera is [s, tx, ty]: a point (X, Y, Z) falls on the pixel position

    x = (s (X + tx) H + W) / 2        y = (s (Y + ty) H + H) / 2

of a crop of H x W pixels, where the pixel in row i and column j covers [j, j+1) x [i, i+1). So the crop's height spans
2/s metres whatever its width, and one camera serves every resolution of the same crop.
"""

import torch
from torch import Tensor


def project(points: Tensor, cam: Tensor, height: int, width: int) -> Tensor:
    """Pixel position and depth (B,V,3) of points (B,V,3) seen by cam (B,3); the depth is Z, unchanged."""
    scale, shift = cam[:, None, :1] * height / 2, cam[:, None, 1:]
    centre = points.new_tensor([width / 2, height / 2])
    return torch.cat([scale * (points[..., :2] + shift) + centre, points[..., 2:]], -1)


def unproject_pixels(cam: Tensor, depth: Tensor, height: int, width: int) -> Tensor:
    """Points (B,H*W,3), row by row, that lie at depth (B,) behind the pixel centres of the crops seen by cam (B,3)."""
    y, x = torch.meshgrid(
        torch.arange(height, device=cam.device) + 0.5, torch.arange(width, device=cam.device) + 0.5, indexing="ij"
    )
    pixel = torch.stack([x, y], -1).flatten(0, 1) - cam.new_tensor([width / 2, height / 2])
    xy = pixel / (cam[:, None, :1] * height / 2) - cam[:, None, 1:]
    return torch.cat([xy, depth[:, None, None].expand(-1, xy.shape[1], 1)], -1)


def check_images(images: Tensor) -> tuple[int, int]:
    """Height and width of a batch of crops; TypeError or ValueError unless it is (B,H,W,3) uint8."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (B, H, W, 3), got {tuple(images.shape)}")
    return images.shape[1], images.shape[2]
