"""What a training step measured: the sufficient statistics of its losses, kept on their device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class LossStats:
    """Count, sum and sum of squares of a set of per-sample losses.

    Statistics of two sets merge with ``+``, so one measurement is exact over gradient-accumulation steps and over
    ranks that saw different numbers of samples. Nothing here reads a value back to the host.

    Args:
        sums: float64 tensor of shape ``[3]``: how many losses, their sum, the sum of their squares.
    """

    sums: Tensor

    @classmethod
    def from_losses(cls, losses: Tensor) -> LossStats:
        """Statistics of ``losses`` (any shape, one entry a sample or token; detached).

        A scalar counts as one sample, which is all that is known about an already averaged loss: its second moment
        is then the square of that mean.
        """
        losses = losses.detach().double().reshape(-1)
        count = losses.new_full((), losses.numel())
        return cls(torch.stack((count, losses.sum(), losses.square().sum())))

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(self.sums + other.sums)

    @property
    def count(self) -> Tensor:
        """Number of losses, 0-dim float64."""
        return self.sums[0]

    @property
    def mean(self) -> Tensor:
        """L = mean(l_j), 0-dim float64."""
        return self.sums[1] / self.sums[0]

    @property
    def second_moment(self) -> Tensor:
        """mean(l_j^2), 0-dim float64: KOALA's ``loss_var``."""
        return self.sums[2] / self.sums[0]

    @property
    def variance(self) -> Tensor:
        """mean(l_j^2) - L^2, 0-dim float64, never negative."""
        return (self.second_moment - self.mean.square()).clamp(min=0)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> LossStats:
        """The statistics over every rank of ``group`` (default: all ranks); itself when there is one process."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        sums = self.sums.clone()
        dist.all_reduce(sums, group=group)
        return LossStats(sums)
