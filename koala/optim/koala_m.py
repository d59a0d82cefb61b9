"""KOALA-M: a Kalman filter over weights and velocities; its posterior covariance is one 2x2 matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import SKIP_NORM, TINY, KalmanOptimizer
from .fused import kernels, packed
from .koala_v import MEASURE, norms
from .stages import Stage, decayed_foreach, dot, fresh_foreach
from .tensors import Bucket, local, make_buckets


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
        sw, sc, sv: initial :math:`P_{11}, P_{12}, P_{22}`.
        a: decay of the velocities.
        qw: initial :math:`q_x`, or :math:`q_x` itself when it does not adapt.
        qv: :math:`q_v`.
        r: constant measurement noise :math:`R`; None: the running average above.
        alpha_r: :math:`\alpha_r`.
        weight_decay: :math:`\lambda`.
        lr: :math:`\epsilon`; a schedule of learning rates is a schedule of target risks. Float or one-element tensor.
        adaptive_q: the first line above (the paper's "adapt. Q"); False keeps :math:`q_x` fixed.
        target: an absolute target :math:`u > 0` (the target risk is :math:`L - u`): the innovation is :math:`u`
            in place of :math:`\epsilon L_i`, and ``lr`` is not used. The paper's GANs have ``target=4, a=0.5``.
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
        ValueError: a negative hyper-parameter, an unknown choice, or an initial P that is no covariance.

    :math:`q_x` follows the published code; the paper prints :math:`|\bar x - x|^2 / n`. P is kept as three float64
    scalars and its last line computed without cancellation, so it stays symmetric and positive semi-definite. The
    buffer of velocities holds :math:`p_i` as it is after the update: the factor :math:`a` of the prediction is applied
    in the next update, which saves a pass over memory, and so is the prediction of P, which saves a communication.

    Reference: Davtyan, Sameni, Cerkezi, Meishvili, Bielski, Favaro. *KOALA: A Kalman Optimization Algorithm with Loss
    Adaptivity*. AAAI 2022, arXiv:2107.03331.
    """

    buffers = ("velocity", "average")
    partial_sums = ("drift",)
    signed = ("sc",)

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
            "lr": lr,
            "sw": sw,
            "sc": sc,
            "sv": sv,
            "a": a,
            "qw": qw,
            "qv": qv,
            "r": r,
            "alpha_r": alpha_r,
            "weight_decay": weight_decay,
            "adaptive_q": adaptive_q,
            "target": target,
            "measurement": measurement,
            "lower_bound": lower_bound,
        }
        super().__init__(params, defaults, fused=fused, process_group=process_group)
        if sc**2 > sw * sv:
            raise ValueError(f"MomentumKOALA: [[sw, sc], [sc, sv]] must be a covariance, got sw={sw}, sc={sc}, sv={sv}")
        if target is not None and not target > 0:
            raise ValueError(f"MomentumKOALA: target must be positive, got {target}")

    def _initial_filter(self, hyper):
        noise = 1.0 if hyper["r"] is None else hyper["r"]
        return {"R": noise, "P11": hyper["sw"], "P12": hyper["sc"], "P22": hyper["sv"], "qx": hyper["qw"], "drift": 0.0}

    def _predict(self) -> None:
        # q_x and P follow in _begin: under sharding the drift is known only once the ranks have summed it
        drift = self._hyper["drift"].zero_()
        for bucket in make_buckets(self, with_gradient=False):
            tensors = (bucket.x, bucket.state["velocity"], bucket.state["average"])
            table = PREDICT(self.fused, tensors)
            drift += (table.to(drift.device) * self._shares(bucket)).sum()
            bucket.write_back()
        for p in self._params():
            if not self.state.get(p):  # no gradient so far: its average is zero and it has no velocity
                drift += local(p.detach()).double().square().sum().to(drift.device) * self._share(p)

    def _begin(self, buckets: list[Bucket], tables: list[Tensor | None]) -> None:
        hyper = self._hyper
        a, P11, P12, P22 = hyper["a"], hyper["P11"], hyper["P12"], hyper["P22"]
        if hyper["adaptive_q"]:
            n = sum(p.numel() for p in self._params())
            hyper["qx"].mul_(0.9).add_(hyper["drift"].sqrt(), alpha=0.1 / n)
        P11.add_(P12, alpha=2).add_(P22).add_(hyper["qx"])
        P12.add_(P22).mul_(a)
        P22.mul_(a * a).add_(hyper["qv"])
        self._largest = torch.zeros_like(P11)  # max_i |h_i|^2
        corrected = {id(p) for bucket in buckets for p in bucket.params}
        for p in self._params():
            if id(p) not in corrected and self.state.get(p):
                self.state[p]["velocity"].mul_(a)

    def _measure(self, bucket: Bucket) -> Tensor:
        return MEASURE(self.fused, (bucket.x, bucket.g), decay=bucket.decay)

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor) -> None:
        hyper = self._hyper
        gg, hh, xx = norms(table, bucket.decay)
        seen = gg >= SKIP_NORM**2
        S = (hyper["P11"] * hh + hyper["R"]).clamp(min=TINY)
        if hyper["target"] is None:
            innovation = bucket.group["lr"] * (loss + 0.5 * bucket.decay * xx)
        else:
            innovation = torch.full_like(hh, hyper["target"])
        step = torch.where(seen, innovation / S, 0.0)
        rate = 0.1 * seen.double()
        scalars = torch.stack((step * hyper["P11"], step * hyper["P12"], rate))
        self._largest = torch.maximum(self._largest, torch.where(seen, hh, 0.0).max())
        tensors = (bucket.x, bucket.g, bucket.state["velocity"], bucket.state["average"])
        APPLY(self.fused, tensors, scalars, decay=bucket.decay, a=hyper["a"])

    def _correct_fused(self, bucket: Bucket, table: Tensor | None, loss: Tensor) -> None:
        hyper = self._hyper
        largest = kernels(bucket.x[0].device).koala_m_correct(
            bucket.x,
            bucket.g,
            bucket.state["velocity"],
            bucket.state["average"],
            packed(hyper["P11"], hyper["P12"], hyper["R"], loss, bucket.group["lr"]),
            table=table,
            decay=bucket.decay,
            a=hyper["a"],
            target=hyper["target"],
        )
        self._largest = torch.maximum(self._largest, largest)

    def _conclude(self) -> None:
        # P - P [[m, 0], [0, 0]] P^T with 1 - m P11 = R / S at the largest |h_i|, without the cancellation
        P11, P12, P22, noise = (self._hyper[key] for key in ("P11", "P12", "P22", "R"))
        shrink = noise / (P11 * self._largest + noise).clamp(min=TINY)
        P22.sub_(P12.square() * (1 - shrink) / P11.clamp(min=TINY)).clamp_(min=0)
        P11.mul_(shrink)
        P12.mul_(shrink)


def predict(xs, velocities, averages):
    """|average - x|^2 before the weights move by their velocity. (The velocity decays in ``apply``: one pass less.)"""
    gaps = fresh_foreach("sub", averages, xs)
    torch._foreach_add_(xs, velocities)
    return (list(map(dot, gaps, gaps)),)


def apply(xs, gs, velocities, averages, steps_x, steps_v, rates, *, decay: float, a: float) -> None:
    """Weights and velocity step along h, the velocity after its decay; the average follows the weights."""
    hs = decayed_foreach(gs, xs, decay)
    torch._foreach_addcmul_(xs, hs, steps_x, value=-1)
    torch._foreach_mul_(velocities, a)
    torch._foreach_addcmul_(velocities, hs, steps_v, value=-1)
    torch._foreach_lerp_(averages, xs, rates)


PREDICT = Stage(predict, "koala_m_predict")
APPLY = Stage(apply)
