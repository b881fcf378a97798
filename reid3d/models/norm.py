"""Batch normalisation: folded into what it is applied to, and over the whole batch where several processes train.

Each of these has a part of a batch; statistics and pairs are of the whole. ``nn.SyncBatchNorm`` does so on GPUs alone,
and only for its own layers; here whoever has moments can merge them. Without a process group, or in one of one process,
each function gives back what it got.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def global_moments(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, int | Tensor]:
    """The mean and biased variance of the rows of all processes, from those of this one's ``count`` rows.

    In several, the result is the same in each, its gradient flows into the arguments of all, and count is a tensor.

    Args:
        mean, var: (C,). count: at least 1; may differ by process.
    """
    if _one_process():
        return mean, var, count
    rows = mean.new_full((1,), count)
    sums = _Sum.apply(torch.cat((mean * count, rows)))
    total, all_mean = sums[-1], sums[:-1] / sums[-1]
    # About the mean of all: sums of squares about 0 would cancel.
    return all_mean, _Sum.apply((var + (mean - all_mean).square()) * count) / total, total.detach()


def global_rows(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, below each other in their order, B the same in all; gradients flow back."""
    if _one_process():
        return rows
    before, after = dist.get_rank() * len(rows), (dist.get_world_size() - dist.get_rank() - 1) * len(rows)
    blank = rows.shape[1:]
    return _Sum.apply(torch.cat((rows.new_zeros(before, *blank), rows, rows.new_zeros(after, *blank))))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d of (B, C) over the clouds of all processes."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or _one_process():
            return super().forward(x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(x, 0, correction=0)
        mean, var, count = global_moments(mean, var, len(x))
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return (x - mean) * (self.weight * torch.rsqrt(var + self.eps)) + self.bias


class FoldedNorm(nn.BatchNorm1d):
    """BatchNorm as a (scale, shift) to apply elsewhere; parameters, buffers and their updates are BatchNorm1d's."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def fold(self, mean: Tensor | None = None, var: Tensor | None = None, count: int = 0) -> tuple[Tensor, Tensor]:
        """From the mean and biased variance of ``count`` rows, which move the running ones; from those without.

        ``var`` may be a little below 0, rounded from a sum of terms that cancel: it is 0 then.
        """
        if mean is None or var is None:
            mean, var = self.running_mean, self.running_var
        else:
            mean, var, n = global_moments(mean, var, count)
            var = var.clamp_min(0)
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return scale, self.bias - mean * scale


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


def _one_process() -> bool:
    return not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


class _Sum(torch.autograd.Function):
    """The sum over all processes, forwards of the value and backwards of its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad.contiguous())
