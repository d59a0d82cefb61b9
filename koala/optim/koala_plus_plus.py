"""KOALA++: tracks the product of gradient and covariance, tensor by tensor, and so sees directions."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SKIP_NORM, KalmanOptimizer
from .tensors import Bucket, dot

_TINY = torch.finfo(torch.float64).tiny


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
        return _single_tensor_measure(bucket.x, bucket.g, bucket.state["v"], bucket.state["H"], bucket.decay)

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor) -> None:
        hyper = self._hyper
        sigma, q, noise = hyper["sigma"], hyper["q"], hyper["R"]
        gg, HH, HH_, Hv_, xx = table  # a trailing underscore is the previous step's
        S_, H_H_, v_H_ = previous = [torch.stack(bucket.state[name]) for name in self.scalars]
        seen, first = gg >= SKIP_NORM**2, H_H_ == 0
        # first step: v' = sigma H and H' = H
        H_H_, HH_ = torch.where(first, HH, H_H_), torch.where(first, HH, HH_)
        Hv_, v_H_ = torch.where(first, sigma * HH, Hv_), torch.where(first, sigma * HH, v_H_)
        S_ = torch.where(first, (sigma + q) * HH + noise, S_).clamp(min=_TINY)
        alpha = HH_ / H_H_.clamp(min=_TINY)
        lam = (Hv_ + q * HH_) / S_
        w = (Hv_ - v_H_ * alpha) / H_H_.clamp(min=_TINY) if hyper["is_symmetric"] else torch.zeros_like(alpha)
        # v = on_v v' + on_H_ H' + on_H H
        on_v, on_H_, on_H = alpha - lam, w - q * lam, torch.full_like(alpha, q)
        vH = on_v * Hv_ + on_H_ * HH_ + on_H * HH
        S = (vH + q * HH + noise).clamp(min=_TINY)
        step = bucket.group["lr"] * (loss + 0.5 * bucket.decay * xx) / S
        on_H = torch.where(first, on_v * sigma + on_H_ + on_H, on_H)
        for name, new, old in zip(self.scalars, (S, HH, vH), previous, strict=True):
            torch._foreach_copy_(bucket.state[name], torch.where(seen, new, old).unbind())
        keep = torch.zeros_like(alpha)
        coefficients = torch.stack((
            torch.where(seen, on_v, 1.0), torch.where(seen, on_H_, keep), torch.where(seen, on_H, keep),
            torch.where(seen, step, keep), seen.double(),
        )).to(bucket.x[0].dtype)  # fmt: skip
        _single_tensor_apply(bucket.x, bucket.g, bucket.state["v"], bucket.state["H"], coefficients.unbind(1), bucket.decay, q)


def _single_tensor_measure(xs, gs, vs, Hs, decay: float) -> Tensor:
    rows = []
    for x, g, v, H_ in zip(xs, gs, vs, Hs, strict=True):
        H = g.add(x, alpha=decay) if decay != 0 else g
        gg = dot(g, g)
        HH, xx = (dot(H, H), dot(x, x)) if decay != 0 else (gg, torch.zeros_like(gg))
        rows.append((gg, HH, dot(H, H_), dot(H, v), xx))
    return torch.stack([torch.stack(column) for column in zip(*rows, strict=True)])


def _single_tensor_apply(xs, gs, vs, Hs, coefficients, decay: float, q: float) -> None:
    for x, g, v, H_, c in zip(xs, gs, vs, Hs, coefficients, strict=True):
        on_v, on_H_, on_H, step, seen = c
        H = g.add(x, alpha=decay) if decay != 0 else g
        v.mul_(on_v).addcmul_(H_, on_H_).addcmul_(H, on_H)
        H_.lerp_(H, seen)
        x.addcmul_(v, step, value=-1).addcmul_(H, step, value=-q)
