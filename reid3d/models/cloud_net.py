"""What networks of coloured point clouds have in common: what they take, in which precision, and how they begin."""

from __future__ import annotations

from collections.abc import Callable
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


def initialise(network: nn.Module, fan_out: Callable[[str], bool]) -> None:
    """The published initialisation: linear layers Kaiming normal, by fan-out where ``fan_out`` of their name is true,
    as the published code's linear layers are, else by fan-in, as its convolutions are; biases 0, norms N(1, 0.02).
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, mode="fan_out" if fan_out(name) else "fan_in")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight, 1.0, 0.02)


def flat_rows(idx: Tensor, n: int) -> Tensor:
    """Indices (B, M, k) into clouds of n points -> rows (B*M, k) of all their points one below the other."""
    return (idx + n * torch.arange(len(idx), device=idx.device).view(-1, 1, 1)).flatten(0, 1)
