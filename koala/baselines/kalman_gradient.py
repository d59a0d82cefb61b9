"""Kalman gradient descent (Vuckovic, 2018, arXiv 1810.12273)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from koala.baselines.closure import evaluated
from koala.baselines.state import CopiedState


class KalmanGradientDescent(CopiedState):
    """Gradient descent along a filtered gradient::

        P- = P + q ;  k = P- / (P- + r) ;  P <- (1 - k) P-
        G <- G + k (g - G) ;  w <- w - lr G

    The paper's filter estimates weights and gradient together, [w; G] with the transition [[1, -lr], [0, 1]], but only
    the gradient is observed, and only it is used. Its part of the filter then is this scalar one, the same for every
    weight (tests/baselines/test_relatives.py). With the defaults k falls to 0.068: momentum SGD with an average whose
    beta is 0.932, after a short warm-up.

    Args:
        params: parameters or groups.
        lr: learning rate.
        q, r, p0: process noise, measurement noise and variance at the beginning; their ratios count.
        weight_decay: times the weights, added to the gradient; not the paper's.

    Raises:
        ValueError: a hyper-parameter out of range.
    """

    def __init__(
        self, params, lr: float = 0.1, *, q: float = 0.01, r: float = 2.0, p0: float = 0.01, weight_decay: float = 0.0
    ) -> None:
        defaults = {"lr": lr, "q": q, "r": r, "p0": p0, "weight_decay": weight_decay}
        for name, value in defaults.items():
            if not value >= 0 or (name == "r" and value == 0):
                raise ValueError(f"KalmanGradientDescent: {name} must not be negative, and r not 0, got {value}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Evaluates `closure`, if there is one, and takes a step along the filtered gradients."""
        loss = evaluated(closure)
        for group in self.param_groups:
            ahead = group.get("P", group["p0"]) + group["q"]
            gain = ahead / (ahead + group["r"])
            group["P"] = (1 - gain) * ahead
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"])
                G = self.state[p].setdefault("G", g.clone())
                G.lerp_(g, gain)
                p.add_(G, alpha=-group["lr"])
        return loss
