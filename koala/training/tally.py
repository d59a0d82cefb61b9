"""What the losses of some samples come to: sums by name, which add up over batches, passes and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from koala.optim import LossStats
from koala.training.ranks import Ranks

LOSSES = 3  # the sums of `LossStats`: how many losses, their sum, the sum of their squares


@dataclass(frozen=True)
class Tally:
    """Sums over samples in one tensor on the device. Only `on_host` waits for the device.

    Args:
        sums: float64 [3 + len(names)]: those of `LossStats`, then one for each of `names`.
        names: what a task counts beside the losses, such as `top1_error`.
    """

    sums: Tensor
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, losses: Tensor, count: Tensor | None = None, **others: Tensor) -> Tally:
        """The tally of samples with these `losses`.

        Args:
            losses: any shape; 0 where nothing is scored.
            count: 0-dim, how many are scored; default: all.
            others: 0-dim sums by name.
        """
        losses = losses.detach().double()
        count = losses.new_full((), losses.numel()) if count is None else count.double()
        others = {name: value.double() for name, value in others.items()}
        return cls(torch.stack([count, losses.sum(), losses.square().sum(), *others.values()]), tuple(others))

    @classmethod
    def zero(cls, names: tuple[str, ...], device: torch.device) -> Tally:
        """The tally of no sample."""
        return cls(torch.zeros(LOSSES + len(names), dtype=torch.float64, device=device), names)

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.sums + other.sums, self.names)

    def __sub__(self, other: Tally) -> Tally:
        return Tally(self.sums - other.sums, self.names)

    def __getitem__(self, name: str) -> Tensor:
        """The sum of `name`, 0-dim."""
        return self.sums[LOSSES + self.names.index(name)]

    def over(self, ranks: Ranks) -> Tally:
        """The tally of all ranks' samples (a collective)."""
        return Tally(ranks.sum(self.sums.clone()), self.names)

    def on_host(self) -> Tally:
        """The same tally on the CPU."""
        return Tally(self.sums.cpu(), self.names)

    @property
    def losses(self) -> LossStats:
        """The sums of the losses alone, which a filter measures."""
        return LossStats(self.sums[:LOSSES])
