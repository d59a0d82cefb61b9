"""KOALA-M: a Kalman filter over weights and velocities; its posterior covariance is one 2x2 matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends
from .base import KalmanOptimizer
from .gains import NOISE, gates, largest, noise, tiny


class MomentumKOALA(KalmanOptimizer):
    r"""KOALA-M: a Kalman filter whose hidden state is the weights and their velocities, measured by the loss.

    With :math:`F = \begin{pmatrix} 1 & 1 \\ 0 & a \end{pmatrix}`, velocities :math:`p_i` and running averages
    :math:`\bar x_i` of the weights (both initially zero), and one covariance :math:`P` for all tensors:

    .. math::
        \begin{aligned}
            q_x &\leftarrow 0.9 \, q_x + 0.1 \, |\bar x - x| / n       && \text{(predict; over all tensors)} \\
            x_i &\leftarrow x_i + p_i, \quad p_i \leftarrow a p_i, \quad
                P \leftarrow F P F^T + \mathrm{diag}(q_x, q_v) \\
            R &\leftarrow \alpha_r R + (1 - \alpha_r) \tfrac1n \textstyle\sum_j l_j^2       && (R_0 = 1) \\
            h_i &= g_i + \lambda x_i, \quad S_i = P_{11} |h_i|^2 + R, \quad L_i = L + \tfrac\lambda2 |x_i|^2 \\
            x_i &\leftarrow x_i - \epsilon \frac{P_{11}}{S_i} L_i h_i, \quad
                p_i \leftarrow p_i - \epsilon \frac{P_{21}}{S_i} L_i h_i                   && \text{(update)} \\
            \bar x_i &\leftarrow 0.9 \, \bar x_i + 0.1 \, x_i \\
            P &\leftarrow P - P \begin{pmatrix} m & 0 \\ 0 & 0 \end{pmatrix} P^T, \quad m = \max_i |h_i|^2 / S_i
        \end{aligned}

    A tensor without a gradient, or with :math:`|g_i| < 10^{-9}`, is skipped in the update. Two buffers per weight.

    Args:
        params: parameters or groups; ``lr`` and ``weight_decay`` may differ between groups, the rest is the filter's.
        lr: :math:`\epsilon`; a schedule of learning rates is a schedule of target risks. Float or one-element tensor.
        sw: initial :math:`P_{11}`.
        sc: initial :math:`P_{12} = P_{21}`.
        sv: initial :math:`P_{22}`.
        a: decay of the velocities.
        qw: initial :math:`q_x`, or :math:`q_x` itself when it does not adapt.
        qv: :math:`q_v`.
        r: constant measurement noise :math:`R`; None: the running average above.
        alpha_r: :math:`\alpha_r`.
        weight_decay: :math:`\lambda`.
        adaptive_q: the first line above (the paper's "adapt. Q"); False keeps :math:`q_x` fixed.
        target: an absolute target :math:`u > 0` (the target risk is :math:`L - u`): the innovation is :math:`u`
            in place of :math:`\epsilon L_i`, and ``lr`` is not used. The paper's GANs have ``target=4, a=0.5``.
        measurement: which reading of the losses moves R: ``"second_moment"`` takes mean(l_j^2), as above;
            ``"squared_mean"`` L^2, as in KOALA++'s image runs; ``"variance"`` mean(l_j^2) - L^2;
            ``"variance_of_mean"`` 0, whatever the losses, so that R decays to 0, as in KOALA++'s language-model runs,
            which took the variance of one averaged loss.
        lower_bound: infimum of the loss; the innovation is :math:`\epsilon (L - b)`, never below 0, and R the second
            moment about b. A loss is not minimised below it.
        fused: True insists on the fused implementation of the device, False on the portable one, None takes the
            fastest there is.
        process_group: over which losses (and the products of sharded tensors) are reduced: None is the default group,
            False never communicates.

    Raises:
        ValueError: a negative hyper-parameter, an unknown choice, or an initial P that is no covariance.

    :math:`q_x` follows the published code; the paper prints :math:`|\bar x - x|^2 / n`. P is kept as three float64
    scalars and its last line computed without cancellation, so it stays symmetric and positive semi-definite. A
    drift that is no number (of an infinite weight) leaves :math:`q_x`. The buffer of velocities holds :math:`p_i` as it
    is after the update: the factor :math:`a` of the prediction is applied in the next update, which saves a pass over
    memory, and so is the prediction of P, which saves a communication.

    Reference: Davtyan, Sameni, Cerkezi, Meishvili, Bielski, Favaro. *KOALA: A Kalman Optimization Algorithm with Loss
    Adaptivity*. AAAI 2022, arXiv:2107.03331.
    """

    buffers = ("velocity", "average")
    filter_state = ("R", "P11", "P12", "P22", "qx", "drift", "go", "skipped")
    products = (("g", "g"), ("h", "h"), ("x", "x"))
    moves = {"average": ("average", "x", "h"), "velocity": ("velocity", "h"), "x": ("h",)}  # noqa: RUF012
    decays_anyway = "velocity"
    constant_names = (*NOISE, "a", "qv", "adaptive_q", "target", "numel")
    signed = ("sc", "lower_bound")

    def __init__(
        self,
        params,
        lr: float | Tensor = 1.0,
        *,
        sw: float = 0.1,
        sc: float = 0.0,
        sv: float = 0.1,
        a: float = 0.9,
        qw: float = 0.01,
        qv: float = 0.01,
        r: float | None = None,
        alpha_r: float = 0.9,
        weight_decay: float = 0.0,
        adaptive_q: bool = True,
        target: float | None = None,
        measurement: str = "second_moment",
        lower_bound: float = 0.0,
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "sw": sw, "sc": sc, "sv": sv, "a": a, "qw": qw, "qv": qv, "r": r, "alpha_r": alpha_r,
            "weight_decay": weight_decay, "adaptive_q": adaptive_q, "target": target, "measurement": measurement,
            "lower_bound": lower_bound,
        }  # fmt: skip
        super().__init__(params, defaults, fused=fused, process_group=process_group)
        if sc**2 > sw * sv:
            raise ValueError(f"MomentumKOALA: [[sw, sc], [sc, sv]] must be a covariance, got sw={sw}, sc={sc}, sv={sv}")
        if target is not None and not target > 0:
            raise ValueError(f"MomentumKOALA: target must be positive, got {target}")

    def _initial_filter(self):
        hyper = self.defaults
        covariance = {"P11": hyper["sw"], "P12": hyper["sc"], "P22": hyper["sv"], "qx": hyper["qw"], "drift": 0.0}
        return {"R": 1.0 if hyper["r"] is None else hyper["r"], **covariance, "go": 1.0, "skipped": 0.0}

    def _predict(self, go: Tensor) -> None:
        layout = self._current_layout()
        # q_x and P follow in gains: under sharding the drift is known only once the ranks have summed it
        layout.gather()
        backends.choose(self, layout).predict(self, layout)
        layout.write_back()

    def _gain(self):
        return self.hyper["P11"] / self.hyper["R"]  # P11 / S before the update, by its posterior P11 R / S

    def gains(self, rows, lr, decay, scalars, state, sums):
        hyper, a = self.hyper, self.hyper["a"]
        _, gg, hh, xx = rows
        R, P11, P12, P22, qx, drift, go, skipped = state
        loss, R, whole = noise(hyper, sums, R)
        gate, broken = gates(rows, whole)

        if hyper["adaptive_q"]:
            adapted = 0.9 * qx + 0.1 / self.known.layout.numel * drift.sqrt()
            qx = torch.where(drift.isfinite(), adapted, qx)  # an infinite weight spoils its own tensor, not the filter
        P11, P12, P22 = P11 + 2 * P12 + P22 + qx, a * (P12 + P22), a * a * P22 + hyper["qv"]

        S = (P11 * hh + R).clamp(min=tiny(rows))
        innovation = lr * (loss + 0.5 * decay * xx) if hyper["target"] is None else hyper["target"]
        step = torch.where(gate, innovation / S, 0.0)
        on = gate.to(step.dtype)
        rate, kept = 0.1 * on, torch.where(whole, torch.full_like(step, a), 1.0)
        # the average goes a tenth of the way to the new weights, x - step P11 h
        coefficients = (on, on - rate, rate, -rate * step * P11, kept, -step * P12, -step * P11)

        # P - P [[m, 0], [0, 0]] P^T with 1 - m P11 = R / S at the largest |h_i|, without the cancellation
        shrink = R / (P11 * largest(gate, hh) + R).clamp(min=tiny(rows))
        P22 = (P22 - P12.square() * (1 - shrink) / P11.clamp(min=tiny(rows))).clamp(min=0)
        new = torch.stack((R, P11 * shrink, P12 * shrink, P22, qx, drift, go, skipped))
        *covariance, _, _ = torch.where(whole, new, state)
        return torch.stack(coefficients), scalars, torch.stack((*covariance, whole.to(go.dtype), skipped + broken))
