"""KOALA++: tracks the product of gradient and covariance, tensor by tensor, and so sees directions."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SKIP_NORM, TINY, KalmanOptimizer
from .stages import Stage, decayed, decayed_foreach, dot
from .tensors import Bucket


class KOALAPlusPlus(KalmanOptimizer):
    buffers = ("v", "H")
    scalars = ("S", "HH", "vH")

    def __init__(
        self,
        params,
        sigma: float = 1,
        q: float = 1,
        r: float | None = None,
        alpha_r: float = 0.9,
        weight_decay: float = 0,
        lr: float | Tensor = 1,
        is_symmetric: bool = True,
        *,
        measurement: str = "second_moment",
        implementation: str | None = None,
    ) -> None:
        defaults = dict(
            sigma=sigma, q=q, r=r, alpha_r=alpha_r, weight_decay=weight_decay, lr=lr, is_symmetric=is_symmetric,
            measurement=measurement, implementation=implementation,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _initial_filter(self, hyper):
        return {"R": 1.0 if hyper["r"] is None else hyper["r"]}

    def _measure(self, bucket: Bucket) -> Tensor:
        tensors = (bucket.x, bucket.g, bucket.state["v"], bucket.state["H"])
        return MEASURE(self._hyper["implementation"], tensors, decay=bucket.decay)

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor) -> None:
        # A trailing underscore is the previous step's: HH_ = H.H', H_H_ = H'.H', and so on.
        hyper = self._hyper
        sigma, q, noise = hyper["sigma"], hyper["q"], hyper["R"]
        gg, HH, HH_, Hv_, xx = table
        S_, H_H_, v_H_ = previous = [torch.stack(bucket.state[name]) for name in self.scalars]
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
        scalars = [torch.where(seen, s, 0.0) for s in (on_v, on_H_, on_H, step)] + [seen.double()]
        scalars[0] = torch.where(seen, on_v, 1.0)
        tensors = (bucket.x, bucket.g, bucket.state["v"], bucket.state["H"])
        scalars = [s.to(bucket.dtype).unbind() for s in scalars]
        APPLY(hyper["implementation"], tensors, scalars, decay=bucket.decay, q=q)


def measure(x, g, v, H_, *, decay: float) -> tuple[Tensor, ...]:
    """|g|^2, H.H, H.H', H.v', |x|^2 (the last only with decay)."""
    gg = dot(g, g)
    if decay == 0:
        return gg, gg, dot(g, H_), dot(g, v), torch.zeros_like(gg)
    H = decayed(g, x, decay)
    return gg, dot(H, H), dot(H, H_), dot(H, v), dot(x, x)


def measure_foreach(xs, gs, vs, H_s, *, decay: float):
    gg = list(map(dot, gs, gs))
    if decay == 0:
        return gg, gg, list(map(dot, gs, H_s)), list(map(dot, gs, vs)), list(map(torch.zeros_like, gg))
    Hs = decayed_foreach(gs, xs, decay)
    pairs = ((Hs, Hs), (Hs, H_s), (Hs, vs), (xs, xs))
    return gg, *(list(map(dot, left, right)) for left, right in pairs)


def apply(x, g, v, H_, on_v, on_H_, on_H, step, seen, *, decay: float, q: float) -> None:
    H = decayed(g, x, decay)
    v.mul_(on_v).addcmul_(H_, on_H_).addcmul_(H, on_H)
    H_.lerp_(H, seen)
    x.addcmul_(v, step, value=-1).addcmul_(H, step, value=-q)


def apply_foreach(xs, gs, vs, H_s, on_v, on_H_, on_H, steps, seen, *, decay: float, q: float) -> None:
    Hs = decayed_foreach(gs, xs, decay)
    torch._foreach_mul_(vs, on_v)
    torch._foreach_addcmul_(vs, H_s, on_H_)
    torch._foreach_addcmul_(vs, Hs, on_H)
    torch._foreach_lerp_(H_s, Hs, seen)
    torch._foreach_addcmul_(xs, vs, steps, value=-1)
    torch._foreach_addcmul_(xs, Hs, steps, value=-q)


MEASURE = Stage(measure, measure_foreach)
APPLY = Stage(apply, apply_foreach)
