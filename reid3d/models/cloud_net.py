"""What networks of coloured point clouds have in common: what they take, and in which precision."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .head import Output

EMBEDDING = 512  # numbers in a descriptor


class CloudNet(nn.Module):
    """A network of clouds of at least ``min_points`` points; a subclass says in ``describe`` what it makes of them, and
    by ``autocast`` whether it can do so under autocast: without, it computes in float32 all the same.
    """

    inputs = "cloud"
    autocast = False
    min_points = 1

    def forward(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        """Describe B clouds of N points each.

        Args:
            xyz: (B, N, 3) metres, about the mean of the cloud, N >= min_points.
            rgb: (B, N, 3) in [-0.5, 0.5].

        Returns:
            In eval mode feats (B, 512), not normalised; in training mode, where B >= 2, Output(feats, logits).

        Raises:
            ValueError: a shape out of range.
        """
        if xyz.dim() != 3 or xyz.shape[2] != 3 or xyz.shape != rgb.shape:
            raise ValueError(f"xyz and rgb must both be (B, N, 3), got {tuple(xyz.shape)} and {tuple(rgb.shape)}")
        if xyz.shape[1] < self.min_points:
            raise ValueError(f"xyz must have N >= {self.min_points} points, got {xyz.shape[1]}")
        dtype = torch.promote_types(xyz.dtype, torch.float32)
        with nullcontext() if self.autocast else torch.autocast(xyz.device.type, enabled=False):
            return self.describe(xyz.to(dtype), rgb.to(dtype))

    def describe(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        """As ``forward``, of clouds that were checked."""
        raise NotImplementedError
