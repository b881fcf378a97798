"""What networks on coloured point clouds have in common: what they take, in which precision, and how a linear layer and
the batch normalisation of its output become one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .head import Output
from .ognet import FoldedNorm

EMBEDDING = 512  # numbers in a descriptor


class CloudNet(nn.Module):
    """A network of clouds of at least ``min_points`` points; a subclass says in ``describe`` what it makes of them."""

    inputs = "cloud"
    min_points = 1

    def forward(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        """Describe B clouds of N points each. Autocast is left out: neighbours and statistics need whole float32.

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
        if torch.is_autocast_enabled(xyz.device.type):
            dtype = torch.promote_types(xyz.dtype, torch.float32)
            with torch.autocast(xyz.device.type, enabled=False):
                return self.describe(xyz.to(dtype), rgb.to(dtype))
        return self.describe(xyz, rgb)

    def describe(self, xyz: Tensor, rgb: Tensor) -> Tensor | Output:
        """As ``forward``, of clouds that were checked."""
        raise NotImplementedError


def normalise(
    norm: FoldedNorm, weight: Tensor, offset: Tensor | float, moments: tuple[Tensor, Tensor] | None, count: int
) -> tuple[Tensor, Tensor]:
    """The batch normalisation of weight @ z + offset, as another weight and offset; from the mean and covariance of
    ``count`` vectors z, or the running statistics.
    """
    if moments is None:
        scale, shift = norm.fold()
    else:
        mean, cov = moments
        scale, shift = norm.fold(weight @ mean + offset, (weight @ cov * weight).sum(1), count)
    return scale.unsqueeze(1) * weight, scale * offset + shift
