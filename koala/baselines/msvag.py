"""M-SVAG (Balles and Hennig, ICML 2018, arXiv 1705.07774) with weight decay, as SGDF's tables ran it."""

import pytorch_optimizer

from koala.baselines.closure import evaluated
from koala.baselines.state import CopiedState


class MSVAG(CopiedState, pytorch_optimizer.MSVAG):
    """Momentum SGD damped, weight by weight, by the estimated variance of the gradient::

        h = g + weight_decay x
        m <- beta m + (1 - beta) h ;  v <- beta v + (1 - beta) h^2 ;  both corrected by 1 - beta^t
        rho = (1 - beta) (1 + beta^t) / ((1 + beta) (1 - beta^t)) ;  s = (v - m^2) / (1 - rho)
        x <- x - lr m^2 / (m^2 + rho s) m

    pytorch-optimizer's class has no weight decay.

    Args:
        params: parameters.
        lr, beta, weight_decay: as above.
    """

    def __init__(self, params, lr: float = 0.1, *, beta: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, beta=beta)
        for group in self.param_groups:
            group.setdefault("weight_decay", weight_decay)
        self.defaults["weight_decay"] = weight_decay

    def step(self, closure=None):
        """The library's step on the decayed gradients; those of the parameters are left as they were."""
        loss = evaluated(closure)
        raw = [(p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        try:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad = p.grad.add(p.detach(), alpha=group["weight_decay"])
            super().step()
        finally:
            for p, gradient in raw:
                p.grad = gradient
        return loss
