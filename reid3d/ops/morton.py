"""The order of points along the Z-curve."""

import torch
from torch import Tensor

from .arguments import check_points


def morton_order(xyz: Tensor) -> Tensor:
    """The points of every cloud in the order of the Z-curve, where what is near in the order is near in space.

    `knn` and `farthest_point_sample` lay a cloud out in this order before they search it. Given here once and passed to
    both as `order`, it is computed once. It never changes a result.

    Args:
        xyz: (B,N,3) floating point. float16 and bfloat16 are read as float32.

    Returns:
        (B,N) int32, a permutation of every cloud's indices. Not differentiable.

    Raises:
        TypeError: an argument of the wrong kind. ValueError: a shape out of range.

    Source: Morton, "A Computer Oriented Geodetic Data Base", IBM 1966; 1024 cells along the longest side of the cloud's
    box, points of one cell in index order.
    """
    return torch.ops.reid3d.morton_order(check_points("xyz", xyz, dims=3))


def check_order(order: Tensor | None, points: Tensor) -> None:
    """order is None or what `morton_order` gives for points (B,N,D)."""
    if order is None:
        return
    if not isinstance(order, Tensor) or order.dtype != torch.int32:
        raise TypeError(f"order must be an int32 tensor, got {getattr(order, 'dtype', type(order).__name__)}")
    if order.device != points.device:
        raise ValueError(f"order must be on the device of the points, {points.device}, got {order.device}")
    if order.shape != points.shape[:2]:
        raise ValueError(f"order must have shape {tuple(points.shape[:2])}, got {tuple(order.shape)}")


def check_permutation(order: Tensor | None) -> None:
    """What the compiled kernels demand of an order, for the plain ones, which do not use it."""
    if order is None or order.numel() == 0:
        return
    n = order.shape[1]
    if (wrong := order[(order < 0) | (order >= n)]).numel() > 0:
        raise RuntimeError(f"order must hold indices between 0 and {n - 1}, got {wrong[0].item()}")
    inorder = order.sort(1).values
    if (twice := inorder[:, 1:][inorder[:, 1:] == inorder[:, :-1]]).numel() > 0:
        raise RuntimeError(f"order must hold every index once, got {twice[0].item()} twice")


def morton_order_reference(xyz: Tensor) -> Tensor:
    """`morton_order` in plain torch, for float32 and float64."""
    if xyz.shape[1] == 0:
        return xyz.new_empty(xyz.shape[:2], dtype=torch.int32)
    lo = xyz.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).amin(1, keepdim=True)
    hi = xyz.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1, keepdim=True)
    longest = (hi - lo).nan_to_num(nan=0.0, posinf=torch.inf).amax(2, keepdim=True).clamp_min(0)
    scale = torch.where(longest > 0, torch.full_like(longest, 1023) / longest, 0.0)  # 1023 / x would round twice
    cell = ((xyz - lo) * scale).nan_to_num(nan=0.0, posinf=1023.0, neginf=0.0).clamp(0, 1023).long()
    key = torch.zeros_like(cell[..., 0])
    for bit in range(10):
        for axis in range(3):
            key |= (cell[..., axis] >> bit & 1) << (3 * bit + axis)
    return key.argsort(dim=1, stable=True).int()


torch.library.define("reid3d::morton_order", "(Tensor xyz) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.impl("reid3d::morton_order", "CompositeExplicitAutograd", morton_order_reference)


@torch.library.register_fake("reid3d::morton_order")
def _fake(xyz: Tensor) -> Tensor:
    return xyz.new_empty(xyz.shape[:2], dtype=torch.int32)
