"""What every re-identification network ends with: a descriptor, and a classifier of the training ids on top of it."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .norm import BatchNorm


class Output(NamedTuple):
    """What a model returns in training mode: feats (B, D), the descriptor, logits (B, num_classes) or None, and dropped
    (B, D), the descriptor after dropout, which the classifier saw, or None from a model that has none.
    """

    feats: Tensor
    logits: Tensor | None
    dropped: Tensor | None = None


class Head(nn.Module):
    """Linear -> BatchNorm (-> LeakyReLU) = descriptor; dropout -> classifier = logits of the training ids.

    Args:
        c_in: channels of the pooled input.
        dim: D, length of the descriptor.
        num_classes: training ids; 0 for no classifier.
        dropout: probability, in front of the classifier.
        bias: of the linear layer; BatchNorm takes it away again, but it is among the published parameters.
        slope: of the LeakyReLU below 0; 1 for none.

    Initialised as the published OG-Net: linear Kaiming normal by fan-out, norm N(1, 0.02), classifier N(0, 1e-6),
    biases 0. The published code drops out in place, so that a metric loss sees the dropped descriptor; here it may see
    either. In one of several processes the norm is over the clouds of all.

    Source: layumi/person-reid-3d, ``model_efficient.py``.
    """

    def __init__(
        self, c_in: int, dim: int, num_classes: int, dropout: float, *, bias: bool = False, slope: float = 1.0
    ) -> None:
        super().__init__()
        self.slope = slope
        self.linear = nn.Linear(c_in, dim, bias=bias)
        self.norm = BatchNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(dim, num_classes) if num_classes else None
        nn.init.kaiming_normal_(self.linear.weight, mode="fan_out")
        if bias:
            nn.init.zeros_(self.linear.bias)
        nn.init.normal_(self.norm.weight, 1.0, 0.02)
        if self.classifier is not None:
            nn.init.normal_(self.classifier.weight, 0.0, 1e-6)
            nn.init.zeros_(self.classifier.bias)

    def forward(self, pooled: Tensor) -> Tensor | Output:
        """pooled (B, c_in) -> in eval mode feats (B, D), in training mode Output."""
        feats = F.leaky_relu(self.norm(self.linear(pooled)), self.slope)
        if not self.training:
            return feats
        dropped = self.dropout(feats)
        return Output(feats, self.classifier(dropped) if self.classifier is not None else None, dropped)
