"""Step sizes from the loss, as KOALA's: ALI-G, MoMo and MoMo-Adam. With R -> 0 KOALA-V's step is the Polyak step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from koala.baselines.closure import evaluated
from koala.baselines.state import OneGroup


class PolyakOptimizer(OneGroup):
    """One step size tau for all weights, from the loss and from dot products over all weights.

    Raises:
        ValueError: a hyper-parameter out of range, or more than one parameter group.
    """

    def __init__(self, params, defaults: dict) -> None:
        for name, value in defaults.items():
            if name != "lower_bound" and not all(x >= 0 for x in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{type(self).__name__}: {name} must not be negative, got {value}")
        super().__init__(params, {**defaults, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Evaluates `closure`, which returns the mean loss, and moves the weights."""
        loss = evaluated(closure)
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        if params:
            group["steps"] += 1
            value = torch.as_tensor(loss, device=params[0].device).detach().double().reshape(())
            self._move(group, params, [p.grad for p in params], value)
        return loss

    def _move(self, group: dict, params: list[Tensor], grads: list[Tensor], loss: Tensor) -> None:
        raise NotImplementedError

    def _buffers(self, name: str, params: list[Tensor]) -> list[Tensor]:
        """State of the size of the weights, 0 at first."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]


def dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Inner product of two lists of tensors, 0-dim float64."""
    return torch.stack([(a * b).sum(dtype=torch.float64) for a, b in zip(left, right, strict=True)]).sum()


class ALIG(PolyakOptimizer):
    """ALI-G (Berrada, Zisserman, Kumar, ICML 2020, arXiv 1906.05661)::

        tau = min(lr, f / (|g|^2 + eps))    of f + weight_decay / 2 |w|^2 and its gradient
        b <- momentum b - tau g ;  w <- w - tau g + momentum b

    It takes the smallest loss to be 0. The paper regularises by a projection, which is not here.

    Args:
        params: parameters, one group.
        lr: largest step size.
        momentum, weight_decay, eps: as above.
    """

    def __init__(
        self, params, lr: float = 0.1, *, momentum: float = 0.9, weight_decay: float = 0.0, eps: float = 1e-5
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps})

    def _move(self, group, params, grads, loss):
        decay = group["weight_decay"]
        if decay:
            grads = [g.add(p, alpha=decay) for g, p in zip(grads, params, strict=True)]
            loss = loss + 0.5 * decay * dot(params, params)
        tau = (loss / (dot(grads, grads) + group["eps"])).clamp(max=group["lr"])
        for p, g, b in zip(params, grads, self._buffers("momentum", params), strict=True):
            step = tau.to(p) * g
            b.mul_(group["momentum"]).sub_(step)
            p.sub_(step).add_(b, alpha=group["momentum"])


class MoMo(PolyakOptimizer):
    """MoMo (Schaipp, Ohana, Eickenberg, Defazio, Gower, ICML 2024, arXiv 2305.07583)::

        d <- beta d + (1 - beta) g ;  F <- beta F + (1 - beta) f ;  c <- beta c + (1 - beta) <g, w>
        tau = min(lr, max(0, (1 + lr weight_decay) (F - lower_bound - c) + <d, w>) / |d|^2)
        w <- (w - tau d) / (1 + lr weight_decay)

    The averages begin with the first step's values. The model of the loss is the mean of its last linearisations.

    Args:
        params: parameters, one group.
        lr: largest step size.
        beta, weight_decay: as above.
        lower_bound: of the loss.
    """

    def __init__(
        self, params, lr: float = 1.0, *, beta: float = 0.9, weight_decay: float = 0.0, lower_bound: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay, "lower_bound": lower_bound})

    def _move(self, group, params, grads, loss):
        lr, decay = group["lr"], 1 + group["lr"] * group["weight_decay"]
        beta = group["beta"] if group["steps"] > 1 else 0.0
        directions = self._buffers("d", params)
        for d, g in zip(directions, grads, strict=True):
            d.mul_(beta).add_(g, alpha=1 - beta)
        F, c = averages(group, beta, loss, dot(grads, params))
        above = (decay * (F - group["lower_bound"] - c) + dot(directions, params)).clamp(min=0)
        tau = (above / dot(directions, directions)).nan_to_num(0.0).clamp(max=lr)
        for p, d in zip(params, directions, strict=True):
            p.sub_(tau.to(p) * d).div_(decay)


class MoMoAdam(PolyakOptimizer):
    """MoMo-Adam (the same paper): Adam's direction, with a step size that the loss may cut::

        m, v: Adam's averages ;  D = sqrt(v / (1 - beta2^t)) + eps ;  F, c: MoMo's, all from 0 ;  rho = 1 - beta1^t
        tau = min(lr / rho, max(0, (1 + lr weight_decay) (F - rho lower_bound - c) + <m, w>) / sum m^2 / D)
        w <- (w - tau m / D) / (1 + lr weight_decay)

    Args:
        params: parameters, one group.
        lr: largest step size.
        betas, eps, weight_decay: as above.
        lower_bound: of the loss.
    """

    def __init__(
        self, params, lr: float = 1e-2, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, lower_bound: float = 0.0,
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "lower_bound": lower_bound}
        super().__init__(params, defaults)

    def _move(self, group, params, grads, loss):
        (beta1, beta2), lr, decay = group["betas"], group["lr"], 1 + group["lr"] * group["weight_decay"]
        rho, correction = 1 - beta1 ** group["steps"], 1 - beta2 ** group["steps"]
        means, scaled = self._buffers("m", params), []
        for m, v, g in zip(means, self._buffers("v", params), grads, strict=True):
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            scaled.append(m / ((v / correction).sqrt() + group["eps"]))
        F, c = averages(group, beta1, loss, dot(grads, params))
        above = (decay * (F - rho * group["lower_bound"] - c) + dot(means, params)).clamp(min=0)
        tau = (above / dot(means, scaled)).nan_to_num(0.0).clamp(max=lr / rho)
        for p, direction in zip(params, scaled, strict=True):
            p.sub_(tau.to(p) * direction).div_(decay)


def averages(group: dict, beta: float, loss: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """Running averages of the loss and of <g, w>, kept in the group, from 0."""
    for name, value in (("mean_loss", loss), ("mean_product", product)):
        group[name] = beta * group.get(name, 0.0) + (1 - beta) * value
    return group["mean_loss"], group["mean_product"]
