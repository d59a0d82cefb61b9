"""KOALA-M: a Kalman filter over weights and velocities; its posterior covariance is one 2x2 matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SKIP_NORM, KalmanOptimizer
from .tensors import Bucket, dot, flat_buffer, flat_weights, is_sharded, local

_TINY = torch.finfo(torch.float64).tiny


class MomentumKOALA(KalmanOptimizer):
    buffers = ("velocity", "average")

    def __init__(
        self,
        params,
        sw: float = 0.1,
        sc: float = 0,
        sv: float = 0.1,
        a: float = 0.9,
        qw: float = 0.01,
        qv: float = 0.01,
        r: float | None = None,
        alpha_r: float = 0.9,
        weight_decay: float = 0,
        lr: float | Tensor = 1,
        *,
        adaptive_q: bool = True,
        target: float | None = None,
        measurement: str = "second_moment",
        implementation: str | None = None,
    ) -> None:
        defaults = dict(
            sw=sw, sc=sc, sv=sv, a=a, qw=qw, qv=qv, r=r, alpha_r=alpha_r, weight_decay=weight_decay, lr=lr,
            adaptive_q=adaptive_q, target=target, measurement=measurement, implementation=implementation,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _initial_filter(self, hyper):
        noise = 1.0 if hyper["r"] is None else hyper["r"]
        return {"R": noise, "P11": hyper["sw"], "P12": hyper["sc"], "P22": hyper["sv"], "qx": hyper["qw"], "drift": 0.0}

    def _predict(self) -> None:
        drift = torch.zeros_like(self._hyper["drift"])
        for p in self._params():
            state = self.state.get(p)
            x, order, copy = flat_weights(p)
            if not state:  # never had a gradient: its average is zero and it has no velocity
                drift += dot(x, x)
                continue
            velocity = flat_buffer(state, "velocity", local(p), order)
            average = flat_buffer(state, "average", local(p), order)
            gap = average - x
            drift += dot(gap, gap)
            x.add_(velocity)
            if copy is not None:
                copy.copy_(x.view_as(copy))
        self._hyper["drift"].copy_(drift)

    def _begin(self, tables) -> None:
        hyper = self._hyper
        if hyper["adaptive_q"]:
            n = sum(p.numel() for p in self._params())
            hyper["qx"].mul_(0.9).add_(hyper["drift"].sqrt(), alpha=0.1 / n)
        a, P11, P12, P22 = hyper["a"], hyper["P11"], hyper["P12"], hyper["P22"]
        P11.add_(P12, alpha=2).add_(P22).add_(hyper["qx"])
        P12.add_(P22).mul_(a)
        P22.mul_(a * a).add_(hyper["qv"])
        self._largest = torch.zeros_like(P11)
        for p in self._params():
            if p.grad is None and not is_sharded(p) and self.state.get(p):
                self.state[p]["velocity"].mul_(a)

    def _measure(self, bucket: Bucket) -> Tensor:
        return _single_tensor_measure(bucket.x, bucket.g, bucket.decay)

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor) -> None:
        hyper = self._hyper
        gg, hh, xx = table
        seen = gg >= SKIP_NORM**2
        S = (hyper["P11"] * hh + hyper["R"]).clamp(min=_TINY)
        if hyper["target"] is None:
            innovation = bucket.group["lr"] * (loss + 0.5 * bucket.decay * xx)
        else:
            innovation = torch.full_like(hh, hyper["target"])
        step = torch.where(seen, innovation / S, 0.0)
        coefficients = torch.stack((step * hyper["P11"], step * hyper["P12"], torch.where(seen, 0.1, 0.0)))
        self._largest = torch.maximum(self._largest, torch.where(seen, hh, 0.0).max())
        coefficients = coefficients.to(bucket.x[0].dtype)
        _single_tensor_apply(
            bucket.x, bucket.g, bucket.state["velocity"], bucket.state["average"], coefficients.unbind(1),
            decay=bucket.decay, a=hyper["a"],
        )  # fmt: skip

    def _conclude(self) -> None:
        P11, P12, P22, noise = (self._hyper[key] for key in ("P11", "P12", "P22", "R"))
        shrink = noise / (P11 * self._largest + noise).clamp(min=_TINY)
        P22.sub_(P12.square() * (1 - shrink) / P11.clamp(min=_TINY)).clamp_(min=0)
        P11.mul_(shrink)
        P12.mul_(shrink)


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


def _single_tensor_apply(xs, gs, velocities, averages, coefficients, *, decay: float, a: float) -> None:
    for x, g, velocity, average, c in zip(xs, gs, velocities, averages, coefficients, strict=True):
        step_x, step_v, rate = c
        h = g.add(x, alpha=decay) if decay != 0 else g
        x.addcmul_(h, step_x, value=-1)
        velocity.mul_(a).addcmul_(h, step_v, value=-1)
        average.lerp_(x, rate)
