"""SGD on a preconditioned and then clipped gradient: the frame that KOALA++'s tables ran K-FAC and Shampoo in."""

from collections.abc import Callable

import torch
from torch import nn

from koala.baselines.closure import evaluated
from koala.baselines.state import CopiedState


class PreconditionedSGD(CopiedState):
    """SGD with momentum and coupled decay on gradients that :meth:`precondition` changed and whose 2-norm is then
    clipped.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum, weight_decay: as in torch.optim.SGD; the decay is added after clipping.
        clip: largest 2-norm of the whole preconditioned gradient.
        damping: of the preconditioner.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, params, lr: float, *, momentum: float, weight_decay: float, clip: float, damping: float):
        for name, value in (("clip", clip), ("damping", damping)):
            if not value > 0:
                raise ValueError(f"{name}={value}: must be above 0")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        for name, value in defaults.items():
            if not value >= 0:
                raise ValueError(f"{name}={value}: must not be negative")
        super().__init__(params, defaults)
        self.clip, self.damping = clip, damping

    def precondition(self) -> None:
        """Replaces the gradients by preconditioned ones, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Evaluates `closure`, preconditions, clips, and takes SGD's step."""
        loss = evaluated(closure)
        self.precondition()
        nn.utils.clip_grad_norm_((p for group in self.param_groups for p in group["params"]), self.clip)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"])
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                p.add_(buffer.mul_(group["momentum"]).add_(g), alpha=-group["lr"])
        return loss
