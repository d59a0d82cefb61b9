"""What the filters' gains have in common: the noise R, the gates, a largest norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SKIP_NORM = 1e-9  # a tensor whose raw gradient is shorter than this is left alone
NOISE = ("r", "alpha_r", "measurement", "lower_bound")  # what noise() reads of the hyper-parameters
MEASUREMENTS = ("second_moment", "squared_mean", "variance", "variance_of_mean")


def noise(hyper: dict[str, Any], sums: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The innovation's loss, R of this step, and whether all of it is finite.

    R_k = alpha_r R_{k-1} + (1 - alpha_r) loss_var, in the chosen reading of loss_var about the lower bound.
    """
    count, total, squares = sums
    mean, second = total / count, squares / count
    bound = hyper["lower_bound"]
    if hyper["r"] is None:
        reading = {
            "second_moment": lambda: (second - 2 * bound * mean + bound**2).clamp(min=0),
            "squared_mean": lambda: (mean - bound).square(),
            "variance": lambda: (second - mean.square()).clamp(min=0),
            "variance_of_mean": lambda: torch.zeros_like(mean),
        }[hyper["measurement"]]()
        R = hyper["alpha_r"] * R + (1 - hyper["alpha_r"]) * reading
    else:
        R = torch.full_like(R, hyper["r"])
    return (mean - bound).clamp(min=0), R, mean.isfinite() & second.isfinite() & R.isfinite()


def gates(rows: Tensor, valid: Tensor | None = None, shortest: float = SKIP_NORM) -> tuple[Tensor, Tensor]:
    """Which tensors take part (their gradient is there, finite and long enough), and whether any was not finite."""
    present, gg, *_ = rows
    finite = rows.isfinite().all(0)
    seen = finite & (present > 0) & (gg >= shortest**2)
    broken = finite.all().logical_not()
    return (seen, broken) if valid is None else (seen & valid, broken | valid.logical_not())


def largest(gate: Tensor, hh: Tensor) -> Tensor:
    """The largest |h|^2 of those that take part, 0 where none does."""
    return torch.where(gate, hh, 0.0).max() if hh.numel() else hh.new_zeros(())


def tiny(t: Tensor) -> float:
    """Keeps 0 / 0 out where noise and covariance both vanish."""
    return torch.finfo(t.dtype).tiny


def nonzero(t: Tensor) -> Tensor:
    """The same for what may be negative."""
    return torch.where(t == 0, tiny(t), t)
