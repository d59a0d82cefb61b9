"""KOALA++: tracks the product of gradient and covariance, tensor by tensor, and so sees directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import SKIP_NORM, TINY, KalmanOptimizer
from .fused import kernels, packed
from .stages import Stage, decayed_foreach, dot
from .tensors import Bucket


class KOALAPlusPlus(KalmanOptimizer):
    r"""KOALA++: tracks the product :math:`v_k = H_k P_{k-1}` of gradient and covariance, and so sees directions.

    The covariance itself is never formed: of those that agree with the previous product, the symmetric one of
    least norm stands for it. Per tensor, flattened, with :math:`H = g + \lambda x` and primes for the previous step (at
    the first, :math:`H' = H` and :math:`v' = \sigma H`):

    .. math::
        \begin{aligned}
            R &\leftarrow \alpha_r R + (1 - \alpha_r) \tfrac1n \textstyle\sum_j l_j^2       && (R_0 = 1) \\
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
        params: parameters or groups; ``lr`` and ``weight_decay`` may differ between groups, the rest is the filter's.
        sigma: initial covariance.
        q: process noise :math:`Q`.
        r: constant measurement noise :math:`R`; None: the running average above.
        alpha_r: :math:`\alpha_r`.
        weight_decay: :math:`\lambda`.
        lr: :math:`\epsilon`. Float or one-element tensor.
        is_symmetric: False drops :math:`w`: the covariance of least norm need then not be symmetric.
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

    Two passes over memory: all dot products first, from which :math:`v \cdot H`, and with it S, follows; then the step.

    Reference: Xia, Davtyan, Favaro. *KOALA++: Efficient Kalman-Based Optimization of Neural Networks with
    Gradient-Covariance Products*. NeurIPS 2025, arXiv:2506.04432.
    """

    buffers = ("v", "H")
    scalars = ("S", "HH", "vH")

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
            "lr": lr,
            "sigma": sigma,
            "q": q,
            "r": r,
            "alpha_r": alpha_r,
            "weight_decay": weight_decay,
            "is_symmetric": is_symmetric,
            "measurement": measurement,
            "lower_bound": lower_bound,
        }
        super().__init__(params, defaults, fused=fused, process_group=process_group)

    def _initial_filter(self, hyper):
        return {"R": 1.0 if hyper["r"] is None else hyper["r"]}

    def _measure(self, bucket: Bucket) -> Tensor:
        tensors = (bucket.x, bucket.g, bucket.state["v"], bucket.state["H"])
        return MEASURE(self.fused, tensors, decay=bucket.decay)

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor) -> None:
        # A trailing underscore is the previous step's: HH_ = H.H', H_H_ = H'.H', and so on.
        hyper = self._hyper
        sigma, q, noise = hyper["sigma"], hyper["q"], hyper["R"]
        gg, HH, HH_, Hv_, xx = table
        S_, H_H_, v_H_ = previous = [torch.stack(bucket.state[name]).to(table.device) for name in self.scalars]
        seen, first = gg >= SKIP_NORM**2, H_H_ == 0
        # The first step has H' = H and v' = sigma H.
        H_H_, HH_ = torch.where(first, HH, H_H_), torch.where(first, HH, HH_)
        Hv_, v_H_ = torch.where(first, sigma * HH, Hv_), torch.where(first, sigma * HH, v_H_)
        S_ = torch.where(first, (sigma + q) * HH + noise, S_)

        alpha = HH_ / H_H_.clamp(min=TINY)
        lam = (Hv_ + q * HH_) / S_.clamp(min=TINY)
        w = (Hv_ - v_H_ * alpha) / H_H_.clamp(min=TINY) if hyper["is_symmetric"] else torch.zeros_like(alpha)
        on_v, on_H_, on_H = alpha - lam, w - q * lam, torch.full_like(alpha, q)  # v = on_v v' + on_H_ H' + on_H H
        vH = on_v * Hv_ + on_H_ * HH_ + on_H * HH
        S = (vH + q * HH + noise).clamp(min=TINY)
        step = bucket.group["lr"] * (loss + 0.5 * bucket.decay * xx) / S

        on_H = torch.where(first, on_v * sigma + on_H_ + on_H, on_H)  # its v' and H' are not in the buffers
        for name, new, old in zip(self.scalars, (S, HH, vH), previous, strict=True):
            torch._foreach_copy_(bucket.state[name], torch.where(seen, new, old).unbind())
        scalars = torch.where(seen, torch.stack((on_v, on_H_, on_H, step, torch.ones_like(step))), 0.0)
        scalars[0] = torch.where(seen, on_v, 1.0)
        tensors = (bucket.x, bucket.g, bucket.state["v"], bucket.state["H"])
        APPLY(self.fused, tensors, scalars, decay=bucket.decay, q=q)

    def _correct_fused(self, bucket: Bucket, table: Tensor | None, loss: Tensor) -> None:
        hyper, state = self._hyper, bucket.state
        kernels(bucket.x[0].device).koala_plus_plus_correct(
            bucket.x,
            bucket.g,
            *(state[name] for name in self.buffers + self.scalars),
            packed(hyper["R"], loss, bucket.group["lr"]),
            table=table,
            decay=bucket.decay,
            sigma=hyper["sigma"],
            q=hyper["q"],
            is_symmetric=hyper["is_symmetric"],
        )


def measure(xs, gs, vs, H_s, *, decay: float):
    """|g|^2, H.H, H.H', H.v', |x|^2 (the last only with decay)."""
    gg = list(map(dot, gs, gs))
    if decay == 0:
        return gg, gg, list(map(dot, gs, H_s)), list(map(dot, gs, vs)), list(map(torch.zeros_like, gg))
    Hs = decayed_foreach(gs, xs, decay)
    pairs = ((Hs, Hs), (Hs, H_s), (Hs, vs), (xs, xs))
    return gg, *(list(map(dot, left, right)) for left, right in pairs)


def apply(xs, gs, vs, H_s, on_v, on_H_, on_H, steps, seen, *, decay: float, q: float) -> None:
    """v moves, H becomes the previous one, and the weights step along v + q H."""
    Hs = decayed_foreach(gs, xs, decay)
    torch._foreach_mul_(vs, on_v)
    torch._foreach_addcmul_(vs, H_s, on_H_)
    torch._foreach_addcmul_(vs, Hs, on_H)
    torch._foreach_lerp_(H_s, Hs, seen)
    torch._foreach_addcmul_(xs, vs, steps, value=-1)
    torch._foreach_addcmul_(xs, Hs, steps, value=-q)


MEASURE = Stage(measure, "koala_plus_plus_measure")
APPLY = Stage(apply)
