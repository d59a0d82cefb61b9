"""KOALA++: tracks the product of gradient and covariance, tensor by tensor, and so sees directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import KalmanOptimizer
from .gains import MEASUREMENTS, NOISE, gates, noise, nonzero, tiny
from .registry import register


@register(
    "koala++",
    "Kalman filter that tracks the product of gradient and covariance, tensor by tensor",
    "Xia et al., KOALA++, NeurIPS 2025, arXiv 2506.04432",
)
class KOALAPlusPlus(KalmanOptimizer):
    r"""KOALA++: tracks the product :math:`v_k = H_k P_{k-1}` of gradient and covariance, and so sees directions.

    The covariance itself is never formed: of those that agree with the previous product, the symmetric one of
    least norm stands for it. Per tensor, flattened, with :math:`H = g + \lambda x` and primes for the previous step (at
    the first, :math:`H' = H` and :math:`v' = \sigma H`):

    .. math::
        \begin{aligned}
            R &\leftarrow \alpha_r R + (1 - \alpha_r) L^2                                  && (R_0 = 1) \\
            \alpha &= \frac{H \cdot H'}{H' \cdot H'}, \quad
                \ell = \frac{H \cdot v' + Q \, H \cdot H'}{S'}, \quad
                w = \frac{H \cdot v'}{H' \cdot H'} - \frac{(H' \cdot v') (H \cdot H')}{(H' \cdot H')^2} \\
            v &= (\alpha - \ell) v' + Q (H - \ell H') + w H' \\
            S &= v \cdot H + Q \, H \cdot H + R \\
            x &\leftarrow x - \epsilon \frac{L + \frac\lambda2 |x|^2}{S} (v + Q H)
        \end{aligned}

    ``predict()`` does nothing. A tensor without a gradient, or with :math:`|g| < 10^{-9}`, is skipped and keeps
    :math:`v', H', S'`. Two buffers per weight.

    Args:
        {params}
        lr: :math:`\epsilon`. Float or one-element tensor.
        sigma: initial covariance.
        q: process noise :math:`Q`.
        {r}
        {alpha_r}
        {weight_decay}
        is_symmetric: False drops :math:`w`: the covariance of least norm need then not be symmetric.
        {measurement}
        {lower_bound}
        {fused}
        {process_group}

    Raises:
        ValueError: a negative hyper-parameter or an unknown choice.

    The symmetric covariance of least norm need not be positive semi-definite. Where :math:`Q` is much smaller than
    ``sigma``, S may be negative after a turn of the gradient, and the step, as published, then ascends.

    Two passes over memory: all dot products first, from which :math:`v \cdot H`, and with it S, follows; then the step.
    The defaults of ``sigma`` and ``q`` are the paper's of convolutional networks; the released class has 1 for both.

    Reference: Xia, Davtyan, Favaro. *KOALA++: Efficient Kalman-Based Optimization of Neural Networks with
    Gradient-Covariance Products*. NeurIPS 2025, arXiv:2506.04432.
    """

    kernel = "koala_plus_plus"
    buffers = ("v", "H")
    scalars = ("S", "HH", "vH")
    filter_state = ("R", "skipped")
    products = (("g", "g"), ("h", "h"), ("x", "x"), ("h", "v"), ("h", "H"))
    moves = {"x": ("v", "H", "h"), "v": ("v", "H", "h"), "H": ("h",)}  # noqa: RUF012
    constant_names = (*NOISE, "sigma", "q", "is_symmetric")
    choices = {"measurement": MEASUREMENTS}  # noqa: RUF012
    fractions = ("alpha_r",)

    def __init__(
        self,
        params,
        lr: float | Tensor = 1.0,
        *,
        sigma: float = 0.1,
        q: float = 0.1,
        r: float | None = None,
        alpha_r: float = 0.9,
        weight_decay: float = 0.0,
        is_symmetric: bool = True,
        measurement: str = "squared_mean",
        lower_bound: float = 0.0,
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "sigma": sigma, "q": q, "r": r, "alpha_r": alpha_r, "weight_decay": weight_decay,
            "is_symmetric": is_symmetric, "measurement": measurement, "lower_bound": lower_bound,
        }  # fmt: skip
        super().__init__(params, defaults, fused=fused, process_group=process_group)

    def _initial_filter(self):
        return {"R": 1.0 if self.defaults["r"] is None else self.defaults["r"], "skipped": 0.0}

    def _gain(self):
        states = [state for state in self.state.values() if "S" in state]
        if not states:
            return torch.zeros_like(self.hyper["R"])
        S, HH, vH = (torch.stack([state[name].to(self.hyper["R"]) for state in states]) for name in self.scalars)
        gain = (vH + self.hyper["q"] * HH) / nonzero(S)  # K . H with K = (v + Q H) / S
        return torch.where(HH > 0, gain, 0.0).gather(0, HH.argmax(0, keepdim=True)).squeeze(0)

    def gains(self, rows, lr, decay, scalars, state, sums):
        # A trailing underscore is the previous step's: HH_ = H.H', H_H_ = H'.H', and so on.
        sigma, q = self.hyper["sigma"], self.hyper["q"]
        _, gg, HH, xx, Hv_, HH_ = rows
        S_, H_H_, v_H_ = scalars
        old_R, skipped = state
        loss, R, valid = noise(self.hyper, sums, old_R)
        gate, broken = gates(rows, valid)

        first = H_H_ == 0  # the first step has H' = H and v' = sigma H
        H_H_, HH_ = torch.where(first, HH, H_H_), torch.where(first, HH, HH_)
        Hv_, v_H_ = torch.where(first, sigma * HH, Hv_), torch.where(first, sigma * HH, v_H_)
        S_ = torch.where(first, (sigma + q) * HH + R, S_)

        alpha = HH_ / H_H_.clamp(min=tiny(rows))
        lam = (Hv_ + q * HH_) / nonzero(S_)
        w = (Hv_ - v_H_ * alpha) / H_H_.clamp(min=tiny(rows)) if self.hyper["is_symmetric"] else torch.zeros_like(alpha)
        on_v, on_H_ = alpha - lam, w - q * lam  # v = on_v v' + on_H_ H' + q H
        vH = on_v * Hv_ + on_H_ * HH_ + q * HH
        S = nonzero(vH + q * HH + R)
        on_H = torch.where(first, on_v * sigma + on_H_, 0.0) + q  # its v' and H' are not in the buffers

        step = lr * (loss + 0.5 * decay * xx) / S
        moves = torch.stack((-step * on_v, -step * on_H_, -step * (on_H + q), on_v, on_H_, on_H, torch.ones_like(step)))
        moves = torch.where(gate, moves, 0.0)
        scalars = torch.where(gate, torch.stack((S, HH, vH)), scalars)
        new = torch.stack((torch.where(valid, R, old_R), skipped + broken))
        return torch.cat((gate.to(moves.dtype).unsqueeze(0), moves)), scalars, new
