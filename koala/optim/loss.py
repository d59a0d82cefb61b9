"""What the filter measures: the sufficient statistics of losses, and which losses belong to the coming step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def precision(device: torch.device) -> torch.dtype:
    """Of scalars and sums on a device: float64 where it has it, float32 on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


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

        A scalar counts as one sample, which is all that an averaged loss gives: its second moment
        is then the square of that mean.
        """
        losses = losses.detach().reshape(-1).to(precision(losses.device))
        count = losses.new_full((), losses.numel())
        return cls(torch.stack((count, losses.sum(), losses.square().sum())))

    @classmethod
    def from_mean(cls, loss: Tensor | float, second_moment: Tensor | float | None = None, *, device=None) -> LossStats:
        """One sample: its loss L and mean(l_j^2), which without further knowledge is L^2.

        Args:
            loss: number or one-element tensor.
            second_moment: the same.
            device: where numbers go; a tensor stays on its own.

        Raises:
            ValueError: either has more than one element.
        """
        tensors = [value for value in (loss, second_moment) if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else torch.device(device or "cpu")
        values = []
        for name, value in (("loss", loss), ("loss_var", second_moment)):
            if value is None:
                value = values[0].square()
            if not isinstance(value, Tensor):  # filled on the device: a copy to it would wait for it
                value = torch.full((), value, dtype=precision(device), device=device)
            if value.numel() != 1:
                raise ValueError(f"{name} must be a scalar, got shape {tuple(value.shape)}")
            values.append(value.detach().to(device, precision(device)).reshape(()))
        return cls(torch.stack((torch.ones_like(values[0]), *values)))

    def __add__(self, other: LossStats) -> LossStats:
        return LossStats(self.sums + other.sums.to(self.sums.device))

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


class LossBuffer:
    """The losses that belong to the coming step. A loss lives exactly as long as its gradient.

    It counts when backward passes through it, so that validation and a batch that was given up never do, and goes with
    the update that used it or with ``zero_grad``. An optimizer has one buffer all its life: wrappers that copy an
    optimizer's ``__dict__`` share it.
    """

    def __init__(self) -> None:
        self._stats: LossStats | None = None

    def observe(self, losses: Tensor | LossStats) -> Tensor:
        """Enter losses (any shape), and return their mean with its graph.

        What has no graph, as :class:`LossStats`, counts at once, where gradients are recorded.
        """
        if isinstance(losses, LossStats):
            if torch.is_grad_enabled():
                self._add(losses)
            return losses.mean
        if losses.requires_grad and torch.is_grad_enabled():
            pending = [LossStats.from_losses(losses)]

            def passed(_gradient: Tensor) -> None:
                if pending:  # a graph that is kept may be passed through again
                    self._add(pending.pop())

            losses.register_hook(passed)
        elif torch.is_grad_enabled():
            self._add(LossStats.from_losses(losses))
        return losses.mean()

    def _add(self, stats: LossStats) -> None:
        self._stats = stats if self._stats is None else self._stats + stats

    @property
    def empty(self) -> bool:
        """Whether nothing was observed since it was last taken or cleared."""
        return self._stats is None

    def take(self) -> LossStats | None:
        """What is in it, if anything; it is empty then."""
        stats, self._stats = self._stats, None
        return stats

    def clear(self) -> None:
        """Drops what was observed."""
        self._stats = None
