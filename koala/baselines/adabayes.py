"""AdaBayes (Aitchison, NeurIPS 2020, arXiv 1807.07540): adaptive rates as variances of a filter."""

from __future__ import annotations

from collections.abc import Callable
from math import exp

import torch

from koala.baselines.closure import evaluated
from koala.baselines.state import CopiedState


class AdaBayes(CopiedState):
    """The rate of a weight is the variance s of its optimum, which drifts since the other weights move, and which the
    gradient of the summed loss, B g, measures::

        S = lr_sgd / B ;  a = exp(-lr^2 / S) ;  m <- beta1 m + (1 - beta1) B g
        s- = a s + (1 - a) S ;  1/s <- 1/s- + (B g)^2                                       fixed_point=False
        1/s = 1/(2 S) + sqrt(1/(4 S^2) + (v / (1 - beta2^t) + 1e-8) / lr^2)                 fixed_point=True
        w <- w - s m / (1 - beta1^t)

    with v the average of (B g)^2 and t the steps in which the weight had a gradient. Weights with small gradients move
    as by SGD at lr_sgd, those with large ones as by Adam at lr.

    Args:
        params: parameters or groups.
        lr: Adam's rate. A schedule of it moves lr_sgd in proportion.
        lr_sgd: SGD's.
        batch_size: B, whose mean the loss is.
        betas, fixed_point: as above.
        weight_decay: w is multiplied by 1 - lr weight_decay before the step; the paper's 5e-5 at its rate of 1e-3.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    def __init__(
        self, params, lr: float = 1e-3, *, batch_size: int, lr_sgd: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.999), fixed_point: bool = False, weight_decay: float = 0.05,
    ) -> None:  # fmt: skip
        for name, value in {"lr": lr, "lr_sgd": lr_sgd, "batch_size": batch_size}.items():
            if not value > 0:
                raise ValueError(f"AdaBayes: {name} must be above 0, got {value}")
        if not weight_decay >= 0:
            raise ValueError(f"AdaBayes: weight_decay must not be negative, got {weight_decay}")
        defaults = {"lr": lr, "sgd_over_lr": lr_sgd / lr, "batch_size": batch_size, "betas": betas}
        super().__init__(params, {**defaults, "fixed_point": fixed_point, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Evaluates `closure`, if there is one, and takes a step on the gradients of its mean loss."""
        loss = evaluated(closure)
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            spread = group["sgd_over_lr"] * lr / group["batch_size"]
            if not spread:  # at the end of a schedule
                continue
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad * group["batch_size"], self.state[p]
                t = state["steps"] = state.get("steps", 0) + 1
                m = state.setdefault("m", torch.zeros_like(p)).lerp_(g, 1 - beta1)
                if group["fixed_point"]:
                    v = state.setdefault("v", torch.zeros_like(p)).lerp_(g * g, 1 - beta2)
                    curvature = (v / (1 - beta2**t) + 1e-8) / lr**2
                    s = 1 / (1 / (2 * spread) + (1 / (4 * spread**2) + curvature).sqrt())
                else:
                    a = exp(-(lr**2) / spread)
                    s = state.setdefault("s", torch.full_like(p, spread))
                    s.mul_(a).add_((1 - a) * spread)
                    s.copy_(1 / (1 / s + g * g))
                p.mul_(1 - lr * group["weight_decay"]).sub_(s * m / (1 - beta1**t))
        return loss
