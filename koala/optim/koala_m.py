"""KOALA-M: a Kalman filter over weights and velocities; its posterior covariance is one 2x2 matrix."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from .base import KalmanOptimizer
from .distributed import share
from .gains import MEASUREMENTS, NOISE, gates, largest, noise, tiny
from .layout import Layout, addresses, local
from .loss import precision
from .portable import blocks, operation_dtype
from .registry import register


@register(
    "koala-m",
    "Kalman filter over weights and velocities with one 2x2 covariance",
    "Davtyan et al., KOALA, AAAI 2022, arXiv 2107.03331",
)
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
        {params}
        {target_lr}
        sw: initial :math:`P_{11}`.
        sc: initial :math:`P_{12} = P_{21}`.
        sv: initial :math:`P_{22}`.
        a: decay of the velocities.
        qw: initial :math:`q_x`, or :math:`q_x` itself when it does not adapt.
        qv: :math:`q_v`.
        {r}
        {alpha_r}
        {weight_decay}
        adaptive_q: the first line above (the paper's "adapt. Q"); False keeps :math:`q_x` fixed.
        target: an absolute target :math:`u > 0` (the target risk is :math:`L - u`): the innovation is :math:`u`
            in place of :math:`\epsilon L_i`, and ``lr`` is not used. The paper's GANs have ``target=4, a=0.5``.
        {measurement}
        {lower_bound}
        {fused}
        {process_group}

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

    kernel = "koala_m"
    buffers = ("velocity", "average")
    filter_state = ("R", "P11", "P12", "P22", "qx", "drift", "go", "skipped", "gain")
    products = (("g", "g"), ("h", "h"), ("x", "x"))
    moves = {"average": ("average", "x", "h"), "velocity": ("velocity", "h"), "x": ("h",)}  # noqa: RUF012
    decays_anyway = "velocity"
    moves_on_predict = True
    partial_sums = ("drift",)
    constant_names = (*NOISE, "a", "qv", "adaptive_q", "target", "numel")
    choices = {"measurement": MEASUREMENTS}  # noqa: RUF012
    fractions = ("alpha_r",)
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
        return {"R": 1.0 if hyper["r"] is None else hyper["r"], **covariance, "go": 1.0, "skipped": 0.0, "gain": 0.0}

    def _predict(self, go: Tensor) -> None:
        """Weights move by their velocity; the drift between weights and averages before that. q_x and P follow in
        gains: under sharding the drift is known only once the ranks have summed it."""
        layout = self.cache.layout
        total = self.frozen_sum(layout)
        shares = [1.0] * layout.n if layout.shares is None else layout.shares.unbind()
        for bucket in layout.buckets:
            on = go.to(bucket.device, operation_dtype(bucket.dtype))
            for i, block in blocks(bucket):
                gap = block["average"].to(precision(bucket.device)) - block["x"]
                total = total + torch.dot(gap, gap).to(layout.device) * shares[bucket.columns.start + i]
                block["x"].add_(block["velocity"] * on)
        drift = self.hyper["drift"]
        torch.where(go > 0, total, drift, out=drift)

    def frozen_sum(self, layout: Layout) -> Tensor:
        """The drift of parameters that are not trained, summed anew only when one changed. One that never was has the
        average 0."""
        versions = list(map(attrgetter("_version"), layout.frozen)), addresses(layout.frozen)
        cached, total = layout.cache.get("frozen", (None, None))
        if cached == versions:
            return total
        total = torch.zeros((), dtype=layout.dtype, device=layout.device)
        for p in layout.frozen:
            counted = share(p, layout.world) if layout.sharded else 1.0
            pieces = local(p.detach()).reshape(-1).split(1 << 16)  # no float64 copy of the whole
            average = self.state.get(p, {}).get("average")
            averages = [0.0] * len(pieces) if average is None else local(average).reshape(-1).split(1 << 16)
            for piece, mean in zip(pieces, averages, strict=True):
                gap = piece.to(precision(piece.device))
                gap = gap if average is None else gap - mean.to(gap)
                total = total + counted * gap.square().sum().to(layout.device)
        layout.cache["frozen"] = versions, total
        return total

    def gains(self, rows, lr, decay, scalars, state, sums):
        hyper, a = self.hyper, self.hyper["a"]
        _, gg, hh, xx = rows
        R, P11, P12, P22, qx, drift, go, skipped, gain = state
        loss, R, valid = noise(hyper, sums, R)
        gate, broken = gates(rows, valid)

        if hyper["adaptive_q"]:
            adapted = 0.9 * qx + 0.1 / self.cache.layout.numel * drift.sqrt()
            qx = torch.where(drift.isfinite(), adapted, qx)  # an infinite weight spoils its own tensor, not the filter
        P11, P12, P22 = P11 + 2 * P12 + P22 + qx, a * (P12 + P22), a * a * P22 + hyper["qv"]

        S = (P11 * hh + R).clamp(min=tiny(rows))
        innovation = lr * (loss + 0.5 * decay * xx) if hyper["target"] is None else hyper["target"]
        step = torch.where(gate, innovation / S, 0.0)
        on = gate.to(step.dtype)
        rate, kept = 0.1 * on, torch.where(valid, torch.full_like(step, a), 1.0)
        # the average goes a tenth of the way to the new weights, x - step P11 h
        coefficients = (on, on - rate, rate, -rate * step * P11, kept, -step * P12, -step * P11)

        # P - P [[m, 0], [0, 0]] P^T with 1 - m P11 = R / S at the largest |h_i|, without the cancellation
        share, floor = P11 * largest(gate, hh), R.clamp(min=tiny(rows))
        S = share + floor
        shrink = floor / S
        P22 = (P22 - P12.square() * (1 - shrink) / P11.clamp(min=tiny(rows))).clamp(min=0)
        new = torch.stack((R, P11 * shrink, P12 * shrink, P22, qx, drift, go, skipped, share / S))
        *covariance, _, _, gain = torch.where(valid, new, state)
        new = torch.stack((*covariance, valid.to(go.dtype), skipped + broken, gain))
        return torch.stack(coefficients), scalars, new
