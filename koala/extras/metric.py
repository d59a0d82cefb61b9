"""KOALA-V with a metric: a filter whose prior covariance is s M. Ours and experimental; derived in docs/metric.md."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pytorch_optimizer.optimizer.utils import zero_power_via_newton_schulz_5
from torch import Tensor

from koala.baselines.closure import evaluated
from koala.baselines.state import OneGroup
from koala.optim import LossStats

LARGEST_SIDE = 1500  # of a matrix that Newton-Schulz takes: a vocabulary is none
CHOICES = {"metric": ("identity", "adam", "muon"), "step_size": ("filter", "constant")}


class MetricKOALA(OneGroup):
    r"""The weights are the state of a Kalman filter with prior covariance :math:`s M`, measured by the loss.

    With :math:`G = \sum \langle g, M g \rangle` over all tensors, and :math:`u = M m` of the mean gradient :math:`m`,
    bias-corrected, with Nesterov's look-ahead:

    .. math::
        \begin{aligned}
            s &\leftarrow s + Q, \quad R \leftarrow \alpha_r R + (1 - \alpha_r) \tfrac1n \textstyle\sum_j l_j^2
                && (R_0 = 1) \\
            S &= s G + R, \quad \tau = \epsilon \frac{s L}{S} \\
            x &\leftarrow (1 - \tau \lambda) x - \tau u, \quad s \leftarrow s - s^2 \frac{G}{S}
        \end{aligned}

    Args:
        params: parameters, one group.
        lr: :math:`\epsilon`: the target risk is :math:`(1 - \epsilon) L`.
        metric: ``"identity"``; ``"adam"``, the diagonal :math:`1 / (\sqrt{\hat v} + eps)`; or ``"muon"``,
            :math:`M g = 0.2 \sqrt{\max(rows, columns)}` times the polar factor of g by Newton-Schulz, of matrices
            smaller than 1,500 on both sides (a convolution's are its filters), with Adam's metric of other tensors.
        step_size: ``"filter"`` as above; ``"constant"`` is :math:`\tau = \epsilon`, without any filter.
        betas: averaging of the gradient, and of its square in Adam's metric. The look-ahead is
            :math:`m = (\beta_1 \bar g + (1 - \beta_1) g) / (1 - \beta_1^t)`, of the average :math:`\bar g`.
        eps: of Adam's metric.
        sigma, q, alpha_r: first :math:`s`, process noise :math:`Q`, and :math:`\alpha_r`, as in KOALA-V.
        weight_decay: :math:`\lambda`, taken off the weights.

    Raises:
        ValueError: a hyper-parameter out of range, or more than one parameter group.
    """

    def __init__(
        self,
        params,
        lr: float = 0.1,
        *,
        metric: str = "adam",
        step_size: str = "filter",
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        sigma: float = 0.1,
        q: float = 1.0,
        alpha_r: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        name, chosen = type(self).__name__, {"metric": metric, "step_size": step_size}
        numbers = {
            "lr": lr, "eps": eps, "sigma": sigma, "q": q, "alpha_r": alpha_r, "weight_decay": weight_decay
        }  # fmt: skip
        for key, value in chosen.items():
            if value not in CHOICES[key]:
                raise ValueError(f"{name}: {key} must be one of {CHOICES[key]}, got {value!r}")
        for key, value in numbers.items():
            if not value >= 0 or key == "alpha_r" and value > 1:
                valid = "between 0 and 1" if key == "alpha_r" else "not negative"
                raise ValueError(f"{name}: {key} must be {valid}, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{name}: betas must be at least 0 and below 1, got {betas}")
        super().__init__(params, {**chosen, **numbers, "betas": betas, "filter": {}})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | LossStats]) -> Tensor | LossStats:
        """Evaluates `closure`, which returns per-sample losses, their mean, or their :class:`LossStats`, and moves the
        weights."""
        losses = evaluated(closure)
        (group,) = self.param_groups
        weights = [p for p in group["params"] if p.grad is not None]
        if not weights:
            return losses
        directions, products = zip(*(self._direction(p, group) for p in weights), strict=True)
        rate = group["lr"]
        if group["step_size"] == "filter":
            stats = losses if isinstance(losses, LossStats) else LossStats.from_losses(losses)
            rate = rate * update(group, stats.all_reduce(), torch.stack(products).sum())
        for p, u in zip(weights, directions, strict=True):
            tau = torch.as_tensor(rate, device=p.device).to(p)
            p.mul_(1 - tau * group["weight_decay"]).sub_(tau * u)
        return losses

    def diagnostics(self) -> dict[str, Tensor]:
        """The filter's R, s, gain s G / S and rate s L / S of the last step, 0-dim; nothing with a constant step."""
        return dict(self.param_groups[0]["filter"])

    def _direction(self, p: Tensor, group: dict) -> tuple[Tensor, Tensor]:
        """u of one tensor and its part of G, 0-dim float64."""
        g, state, (beta1, beta2) = p.grad, self.state[p], group["betas"]
        t = state["steps"] = state.get("steps", 0) + 1
        if "mean" not in state:
            state["mean"] = torch.zeros_like(p)
        mean = state["mean"].lerp_(g, 1 - beta1)
        ahead = (beta1 * mean + (1 - beta1) * g) / (1 - beta1**t)

        if group["metric"] == "identity":
            M = torch.clone
        elif group["metric"] == "muon" and is_small_matrix(p):
            M = orthogonal
        else:
            if "square" not in state:
                state["square"] = torch.zeros_like(p)
            square = state["square"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            M = (square / (1 - beta2**t)).sqrt().add_(group["eps"]).reciprocal_().mul
        if group["step_size"] == "constant":
            return M(ahead), g.new_zeros((), dtype=torch.float64)
        return M(ahead), (g * M(g)).sum(dtype=torch.float64)


def update(group: dict, stats: LossStats, G: Tensor) -> Tensor:
    """A step of the filter, whose state is in `group`; returns the rate s L / S, 0-dim float64."""
    before = group["filter"] or {"R": torch.ones_like(G), "s": torch.full_like(G, group["sigma"])}
    R = torch.lerp(stats.second_moment, before["R"], group["alpha_r"])
    s = before["s"] + group["q"]
    S = (s * G + R).clamp(min=torch.finfo(G.dtype).tiny)
    rate = s * stats.mean / S
    group["filter"] = {"R": R, "s": s * R / S, "gain": s * G / S, "rate": rate}  # s - s^2 G / S, without cancellation
    return rate


def is_small_matrix(p: Tensor) -> bool:
    """Whether Newton-Schulz takes the tensor, as a matrix of its first dimension by the rest."""
    return p.dim() >= 2 and max(p.shape[0], p[0].numel()) < LARGEST_SIDE


def orthogonal(x: Tensor) -> Tensor:
    """0.2 sqrt(max(rows, columns)) times the polar factor of x by five steps of Newton-Schulz (Jordan et al., 2024):
    entries as large as those of Adam's update (Liu et al., 2025, arXiv 2502.16982, section 2.2)."""
    matrix = x.flatten(1)
    polar = zero_power_via_newton_schulz_5(matrix, dtype=matrix.dtype)
    return (0.2 * math.sqrt(max(matrix.shape)) * polar).view_as(x)
