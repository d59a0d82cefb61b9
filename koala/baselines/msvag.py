"""M-SVAG (Balles and Hennig, ICML 2018, arXiv 1705.07774) with weight decay, as SGDF's tables ran it."""

from collections.abc import Callable

import torch

from koala.baselines.closure import evaluated
from koala.baselines.state import CopiedState


class MSVAG(CopiedState):
    """Momentum SGD damped, weight by weight, by the estimated variance of the gradient::

        h = g + weight_decay x
        m <- beta m + (1 - beta) h ;  v <- beta v + (1 - beta) h^2 ;  both corrected by 1 - beta^t
        rho = (1 - beta) (1 + beta^t) / ((1 + beta) (1 - beta^t)), at most 0.9999 ;  s = (v - m^2) / (1 - rho)
        x <- x - lr m^2 / (m^2 + rho s) m                       the factor between 0 and 1, 0 where m is

    pytorch-optimizer's class has no weight decay.

    Args:
        params: parameters.
        lr, beta, weight_decay: as above.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, params, lr: float = 0.1, *, beta: float = 0.9, weight_decay: float = 0.0):
        defaults = {"lr": lr, "beta": beta, "weight_decay": weight_decay}
        for name, value in defaults.items():
            if not value >= 0 or name == "beta" and value >= 1:
                raise ValueError(f"MSVAG: {name} must not be negative, and beta below 1, got {value}")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Evaluates `closure`, if there is one, and takes a step."""
        loss = evaluated(closure)
        for group in self.param_groups:
            beta = group["beta"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                h, state = p.grad.add(p, alpha=group["weight_decay"]), self.state[p]
                m = state.setdefault("m", torch.zeros_like(p)).lerp_(h, 1 - beta)
                v = state.setdefault("v", torch.zeros_like(p)).lerp_(h * h, 1 - beta)
                state["steps"] = state.get("steps", 0) + 1
                left = beta ** state["steps"]
                rho = min((1 - beta) * (1 + left) / ((1 + beta) * (1 - left)), 0.9999)
                mean = m / (1 - left)
                square = mean.square()
                variance = (v / (1 - left) - square) / (1 - rho)
                factor = (square / (square + rho * variance)).nan_to_num(nan=0.0).clamp(0, 1)
                p.addcmul_(factor, mean, value=-group["lr"])
        return loss
