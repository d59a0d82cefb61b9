"""KOALA-V: a Kalman filter whose posterior covariance is one scalar."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import SKIP_NORM, TINY, KalmanOptimizer
from .fused import kernels, packed
from .stages import Stage, decayed_foreach, dot
from .tensors import Bucket


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
        params: parameters or groups; ``lr`` and ``weight_decay`` may differ between groups, the rest is the filter's.
        sigma: initial covariance :math:`s`.
        q: process noise :math:`Q`.
        r: constant measurement noise :math:`R`; None: the running average above.
        alpha_r: :math:`\alpha_r`.
        weight_decay: :math:`\lambda`.
        lr: :math:`\epsilon`; a schedule of learning rates is a schedule of target risks. Float or one-element tensor.
        direction: ``"gradient"`` steps along :math:`g_i` as published, so that decay enters the innovation and the norm
            but does not pull the weights; ``"l2"`` is textbook weight decay, along :math:`h_i`.
        measurement: which reading of ``loss_var`` moves R: ``"second_moment"`` takes mean(l_j^2) as KOALA does,
            ``"squared_mean"`` L^2 (KOALA++'s image runs), ``"variance"`` mean(l_j^2) - L^2 (its language-model runs; 0
            for an already averaged loss), ``"variance_of_mean"`` 0, whatever the losses: R decays to 0, as it did in
            those runs, which fed one averaged loss a batch.
        lower_bound: infimum of the loss; the innovation is :math:`\epsilon (L - b)`, never below 0, and R the second
            moment about b. A loss is not minimised below it.
        fused: True insists on the fused implementation of the device, False on the portable one, None takes the
            fastest there is.
        process_group: over which losses (and the products of sharded tensors) are reduced: None is the default group,
            False never communicates.

    Raises:
        ValueError: a negative hyper-parameter or an unknown choice.

    Where every tensor is skipped the covariance stays, where the published code crashes. The last line is computed as
    :math:`s R / S` at the largest :math:`|h_i|`, which cannot cancel to below zero.

    Reference: Davtyan, Sameni, Cerkezi, Meishvili, Bielski, Favaro. *KOALA: A Kalman Optimization Algorithm with Loss
    Adaptivity*. AAAI 2022, arXiv:2107.03331.
    """

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
        self._check_choice("direction", direction, ("gradient", "l2"))
        defaults = {
            "lr": lr,
            "sigma": sigma,
            "q": q,
            "r": r,
            "alpha_r": alpha_r,
            "weight_decay": weight_decay,
            "direction": direction,
            "measurement": measurement,
            "lower_bound": lower_bound,
        }
        super().__init__(params, defaults, fused=fused, process_group=process_group)

    def _initial_filter(self, hyper):
        return {"R": 1.0 if hyper["r"] is None else hyper["r"], "s": hyper["sigma"]}

    def _predict(self) -> None:
        self._hyper["s"].add_(self._hyper["q"])

    def _measure(self, bucket: Bucket) -> Tensor:
        return MEASURE(self.fused, (bucket.x, bucket.g), decay=bucket.decay)

    def _begin(self, buckets: list[Bucket], tables: list[Tensor | None]) -> None:
        self._largest = torch.zeros_like(self._hyper["s"])  # max_i |h_i|^2

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor) -> None:
        gg, hh, xx = norms(table, bucket.decay)
        s, noise = self._hyper["s"], self._hyper["R"]
        seen = gg >= SKIP_NORM**2
        gain = s / (s * hh + noise).clamp(min=TINY)
        step = gain * bucket.group["lr"] * (loss + 0.5 * bucket.decay * xx)
        step = torch.where(seen, step, 0.0)
        self._largest = torch.maximum(self._largest, torch.where(seen, hh, 0.0).max())
        decay = bucket.decay if self._hyper["direction"] == "l2" else 0.0
        APPLY(self.fused, (bucket.x, bucket.g), step[None], decay=decay)

    def _correct_fused(self, bucket: Bucket, table: Tensor | None, loss: Tensor) -> None:
        hyper = self._hyper
        largest = kernels(bucket.x[0].device).koala_v_correct(
            bucket.x,
            bucket.g,
            packed(hyper["s"], hyper["R"], loss, bucket.group["lr"]),
            table=table,
            decay=bucket.decay,
            l2=hyper["direction"] == "l2",
        )
        self._largest = torch.maximum(self._largest, largest)

    def _conclude(self) -> None:
        # s - s^2 max_i(|h_i|^2 / S_i) = s R / S at the largest |h_i|, without the cancellation
        s, noise = self._hyper["s"], self._hyper["R"]
        s.mul_(noise / (s * self._largest + noise).clamp(min=TINY))


def measure(xs, gs, *, decay: float):
    """|g|^2, g.x and |x|^2; the last two only where weights decay."""
    gg = list(map(dot, gs, gs))
    return (gg, list(map(dot, gs, xs)), list(map(dot, xs, xs))) if decay != 0 else (gg,)


def norms(table: Tensor, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """|g|^2, |h|^2 and |x|^2 of each tensor, from what :func:`measure` found.

    With decay |h|^2 comes from three products instead of a pass that forms h. What cancels between them is lost at the
    precision of |g|^2, which matters only if P |g|^2 is beyond R by that precision's inverse.
    """
    if decay == 0:
        return table[0], table[0], torch.zeros_like(table[0])
    gg, gx, xx = table
    return gg, (gg + 2 * decay * gx + decay**2 * xx).clamp(min=0), xx


def apply(xs, gs, steps, *, decay: float) -> None:
    """x - step (g + decay x)."""
    hs = decayed_foreach(gs, xs, decay)
    torch._foreach_addcmul_(xs, hs, steps, value=-1)


MEASURE = Stage(measure, "koala_measure")
APPLY = Stage(apply)
