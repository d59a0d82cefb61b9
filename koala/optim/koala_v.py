"""KOALA-V: a Kalman filter whose posterior covariance is one scalar."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SKIP_NORM, KalmanOptimizer
from .tensors import Bucket, dot


class VanillaKOALA(KalmanOptimizer):
    buffers = ()

    def __init__(
        self,
        params,
        sigma: float = 1,
        q: float = 1,
        r: float | None = None,
        alpha_r: float = 0.9,
        weight_decay: float = 0,
        lr: float | Tensor = 1,
        *,
        direction: str = "gradient",
        measurement: str = "second_moment",
        implementation: str | None = None,
    ) -> None:
        self._check_choice("direction", direction, ("gradient", "l2"))
        defaults = dict(
            sigma=sigma, q=q, r=r, alpha_r=alpha_r, weight_decay=weight_decay, lr=lr,
            direction=direction, measurement=measurement, implementation=implementation,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _initial_filter(self, hyper):
        return {"R": 1.0 if hyper["r"] is None else hyper["r"], "s": hyper["sigma"]}

    def _predict(self) -> None:
        self._hyper["s"].add_(self._hyper["q"])

    def _begin(self, tables) -> None:
        self._largest = torch.zeros_like(self._hyper["s"])

    def _measure(self, bucket: Bucket) -> Tensor:
        function = _single_tensor_measure
        return function(bucket.x, bucket.g, bucket.decay)

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor) -> None:
        gg, hh, xx = table
        s, noise = self._hyper["s"], self._hyper["R"]
        seen = gg >= SKIP_NORM**2
        gain = s / (s * hh + noise).clamp(min=torch.finfo(torch.float64).tiny)
        step = gain * bucket.group["lr"] * (loss + 0.5 * bucket.decay * xx)
        step = torch.where(seen, step, 0.0).to(bucket.x[0].dtype)
        self._largest = torch.maximum(self._largest, torch.where(seen, hh, 0.0).max())
        decay = bucket.decay if self._hyper["direction"] == "l2" else 0.0
        function = _single_tensor_apply
        function(bucket.x, bucket.g, step.unbind(), decay)

    def _conclude(self) -> None:
        s, noise = self._hyper["s"], self._hyper["R"]
        s.mul_(noise / (s * self._largest + noise).clamp(min=torch.finfo(torch.float64).tiny))


def _single_tensor_measure(xs, gs, decay: float) -> Tensor:
    rows = []
    for x, g in zip(xs, gs, strict=True):
        gg = dot(g, g)
        if decay == 0:
            rows.append((gg, gg, torch.zeros_like(gg)))
        else:
            h = g.add(x, alpha=decay)
            rows.append((gg, dot(h, h), dot(x, x)))
    return torch.stack([torch.stack(column) for column in zip(*rows, strict=True)])


def _single_tensor_apply(xs, gs, steps, decay: float) -> None:
    for x, g, step in zip(xs, gs, steps, strict=True):
        if decay != 0:
            x.addcmul_(x, step, value=-decay)
        x.addcmul_(g, step, value=-1)
