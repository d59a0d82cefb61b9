"""KOALA-V: a Kalman filter whose posterior covariance is one scalar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import KalmanOptimizer
from .gains import MEASUREMENTS, NOISE, gates, largest, noise, tiny
from .registry import register


@register(
    "koala-v",
    "Kalman filter over the weights with one scalar covariance",
    "Davtyan et al., KOALA, AAAI 2022, arXiv 2107.03331",
)
class VanillaKOALA(KalmanOptimizer):
    r"""KOALA-V: the weights are the hidden state of a Kalman filter with constant dynamics, measured by the loss.

    The posterior covariance is one scalar :math:`s`, the target risk is :math:`(1 - \epsilon) L`, and the gain of the
    filter is the step size, tensor by tensor:

    .. math::
        \begin{aligned}
            s &\leftarrow s + Q                                                      && \text{(predict)} \\
            R &\leftarrow \alpha_r R + (1 - \alpha_r) \tfrac1n \textstyle\sum_j l_j^2       && (R_0 = 1) \\
            h_i &= g_i + \lambda x_i, \quad S_i = s |h_i|^2 + R, \quad L_i = L + \tfrac\lambda2 |x_i|^2 \\
            x_i &\leftarrow x_i - \epsilon \frac{s}{S_i} L_i \, g_i                      && \text{(update)} \\
            s &\leftarrow s - s^2 \max_i \frac{|h_i|^2}{S_i}
        \end{aligned}

    A tensor without a gradient, or with :math:`|g_i| < 10^{-9}`, is skipped. No state per weight.

    Args:
        {params}
        {target_lr}
        sigma: initial covariance :math:`s`.
        q: process noise :math:`Q`.
        {r}
        {alpha_r}
        {weight_decay}
        direction: ``"gradient"`` steps along :math:`g_i` as published, so that decay enters the innovation and the norm
            but does not pull the weights; ``"l2"`` is textbook weight decay, along :math:`h_i`.
        {measurement}
        {lower_bound}
        {fused}
        {process_group}

    Raises:
        ValueError: a negative hyper-parameter or an unknown choice.

    The default of ``sigma`` is that of the paper's runs; the published class has 1. Where every tensor is skipped the
    covariance stays, where the published code crashes. The last line is computed as :math:`s R / S` at the largest
    :math:`|h_i|`, which cannot cancel to below zero.

    Reference: Davtyan, Sameni, Cerkezi, Meishvili, Bielski, Favaro. *KOALA: A Kalman Optimization Algorithm with Loss
    Adaptivity*. AAAI 2022, arXiv:2107.03331.
    """

    kernel = "koala_v"
    filter_state = ("R", "s", "go", "skipped", "gain")
    products = (("g", "g"), ("h", "h"), ("x", "x"))
    moves = {"x": ("h", "x")}  # noqa: RUF012
    constant_names = (*NOISE, "direction")
    choices = {"measurement": MEASUREMENTS, "direction": ("gradient", "l2")}  # noqa: RUF012
    fractions = ("alpha_r",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1.0,
        *,
        sigma: float = 0.1,
        q: float = 1.0,
        r: float | None = None,
        alpha_r: float = 0.9,
        weight_decay: float = 0.0,
        direction: str = "gradient",
        measurement: str = "second_moment",
        lower_bound: float = 0.0,
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "sigma": sigma, "q": q, "r": r, "alpha_r": alpha_r, "weight_decay": weight_decay,
            "direction": direction, "measurement": measurement, "lower_bound": lower_bound,
        }  # fmt: skip
        super().__init__(params, defaults, fused=fused, process_group=process_group)

    def _initial_filter(self):
        noise = self.defaults["r"]
        R = 1.0 if noise is None else noise
        return {"R": R, "s": self.defaults["sigma"], "go": 1.0, "skipped": 0.0, "gain": 0.0}

    def _predict(self, go: Tensor) -> None:
        self.hyper["s"].add_(go, alpha=self.hyper["q"])

    def gains(self, rows, lr, decay, scalars, state, sums):
        _, gg, hh, xx = rows
        R, s, go, skipped, gain = state
        loss, R, valid = noise(self.hyper, sums, R)
        gate, broken = gates(rows, valid)

        S = (s * hh + R).clamp(min=tiny(rows))
        step = torch.where(gate, s / S * lr * (loss + 0.5 * decay * xx), 0.0)
        if self.hyper["direction"] == "gradient":  # along g = h - decay x
            along_x = step * decay
        else:
            along_x = torch.zeros_like(step)

        # s - s^2 max_i(|h_i|^2 / S_i) = s R / S at the largest |h_i|, without the cancellation
        share, floor = s * largest(gate, hh), R.clamp(min=tiny(rows))
        S = share + floor
        R, s, _, _, gain = torch.where(valid, torch.stack((R, s * floor / S, go, skipped, share / S)), state)
        new = torch.stack((R, s, valid.to(s.dtype), skipped + broken, gain))
        return torch.stack((gate.to(step.dtype), -step, along_x)), scalars, new
