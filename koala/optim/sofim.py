"""SOFIM: natural gradient with a regularised rank-one Fisher matrix, inverted in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import KalmanOptimizer
from .gains import gates
from .registry import register


@register(
    "sofim",
    "natural gradient with a regularised rank-one Fisher matrix from the first moment",
    "Sen et al., SOFIM, arXiv 2403.02833",
)
class SOFIM(KalmanOptimizer):
    r"""SOFIM: natural gradient with a rank-one Fisher matrix from the first moment, inverted in closed form.

    Over the flat vector of all weights that have a gradient, with :math:`g` including weight decay:

    .. math::
        \begin{aligned}
            M &\leftarrow \beta M + (1 - \beta) g, \quad m = M / (1 - \beta^t) \\
            F &= m m^T + \rho I \\
            x &\leftarrow x - \eta F^{-1} m = x - \eta \frac{m}{\rho + |m|^2}
        \end{aligned}

    One global norm; memory and time of SGD with momentum. It has no use for the loss, so ``step()`` and ``update()``
    may be called without one.

    Args:
        params: parameters or groups; ``lr`` and ``weight_decay`` may differ between groups.
        lr: :math:`\eta`. Float or one-element tensor.
        beta: :math:`\beta`.
        rho: :math:`\rho`.
        weight_decay: ordinary L2, added to :math:`g`.
        precondition: ``"momentum"`` as above, or ``"gradient"``, a reading in which :math:`F^{-1}` is applied to
            the raw gradient: :math:`x \leftarrow x - \eta (g / \rho - m \, (m \cdot g) / (\rho^2 + \rho |m|^2))`.
        {fused}
        {process_group}

    Raises:
        ValueError: a negative hyper-parameter, ``beta`` of 1 or more, ``rho`` of 0 or an unknown choice.

    The paper's grids of ``lr`` and ``rho`` are not known to us; the defaults are values of a co-author's later work.

    Reference: Sen, Qin, Gayathri C, Raghu Kishore N, Chen, Raman. *SOFIM: Stochastic Optimization Using Regularized
    Fisher Information Matrix*. arXiv:2403.02833.
    """

    kernel = "sofim"
    buffers = ("momentum",)
    filter_state = ("t", "skipped")
    products = (("g", "g"), ("h", "h"), ("h", "momentum"), ("momentum", "momentum"))
    moves = {"x": ("momentum", "h"), "momentum": ("momentum", "h")}  # noqa: RUF012
    constant_names = ("beta", "rho", "precondition")
    choices = {"precondition": ("momentum", "gradient")}  # noqa: RUF012
    needs_loss = False

    def __init__(
        self,
        params,
        lr: float | Tensor = 0.1,
        *,
        beta: float = 0.9,
        rho: float = 0.5,
        weight_decay: float = 0.0,
        precondition: str = "momentum",
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {"lr": lr, "beta": beta, "rho": rho, "weight_decay": weight_decay, "precondition": precondition}
        super().__init__(params, defaults, fused=fused, process_group=process_group)
        if beta >= 1:
            raise ValueError(f"SOFIM: beta must be below 1, got {beta}")
        if rho == 0:
            raise ValueError("SOFIM: rho must be positive, got 0")

    def _initial_filter(self):
        return {"t": 0.0, "skipped": 0.0}

    def gains(self, rows, lr, decay, scalars, state, sums):
        beta, rho = self.hyper["beta"], self.hyper["rho"]
        _, gg, hh, hM, MM = rows
        t, skipped = state
        t = t + 1
        gate, broken = gates(rows, shortest=0.0)

        # of the new M = beta M + (1 - beta) h, over all tensors that take part
        hM, MM = beta * hM + (1 - beta) * hh, beta**2 * MM + 2 * beta * (1 - beta) * hM + (1 - beta) ** 2 * hh
        hM, MM = torch.where(gate, hM, 0.0).sum(), torch.where(gate, MM, 0.0).sum().clamp(min=0)
        correction = 1 - beta**t  # m = M / correction
        mm, mh = MM / correction**2, hM / correction
        if self.hyper["precondition"] == "momentum":
            on_M, on_h = 1 / ((rho + mm) * correction), torch.zeros_like(mm)
        else:
            on_M, on_h = -mh / ((rho**2 + rho * mm) * correction), torch.ones_like(mm) / rho

        on = gate.to(rows.dtype)
        on_x = -lr * torch.stack((on_M * beta, on_M * (1 - beta) + on_h)).unsqueeze(1) * on
        coefficients = (on, *on_x, on * beta, on * (1 - beta))
        return torch.stack(coefficients), scalars, torch.stack((t, skipped + broken))
