"""KOALA-M: a Kalman filter over weights and velocities; its posterior covariance is one 2x2 matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SKIP_NORM, TINY, KalmanOptimizer
from .koala_v import MEASURE
from .stages import Stage, decayed, decayed_foreach, dot
from .tensors import Bucket, local, make_buckets


class MomentumKOALA(KalmanOptimizer):
    buffers = ("velocity", "average")
    partial_sums = ("drift",)
    signed = ("sc",)

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
            table = PREDICT(self._hyper["implementation"], tensors)
            drift += (table * self._shares(bucket)).sum()
            bucket.write_back()
        for p in self._params():
            if not self.state.get(p):  # no gradient so far: its average is zero and it has no velocity
                drift += local(p.detach()).double().square().sum() * self._share(p)

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
        return MEASURE(self._hyper["implementation"], (bucket.x, bucket.g), decay=bucket.decay)

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor) -> None:
        hyper = self._hyper
        gg, hh, xx = table
        seen = gg >= SKIP_NORM**2
        S = (hyper["P11"] * hh + hyper["R"]).clamp(min=TINY)
        if hyper["target"] is None:
            innovation = bucket.group["lr"] * (loss + 0.5 * bucket.decay * xx)
        else:
            innovation = torch.full_like(hh, hyper["target"])
        step = torch.where(seen, innovation / S, 0.0)
        rate = torch.where(seen, 0.1, 0.0).to(step.dtype)
        self._largest = torch.maximum(self._largest, torch.where(seen, hh, 0.0).max())
        tensors = (bucket.x, bucket.g, bucket.state["velocity"], bucket.state["average"])
        scalars = [s.to(bucket.dtype).unbind() for s in (step * hyper["P11"], step * hyper["P12"], rate)]
        APPLY(hyper["implementation"], tensors, scalars, decay=bucket.decay, a=hyper["a"])

    def _conclude(self) -> None:
        # P - P [[m, 0], [0, 0]] P^T with 1 - m P11 = R / S at the largest |h_i|, without the cancellation
        P11, P12, P22, noise = (self._hyper[key] for key in ("P11", "P12", "P22", "R"))
        shrink = noise / (P11 * self._largest + noise).clamp(min=TINY)
        P22.sub_(P12.square() * (1 - shrink) / P11.clamp(min=TINY)).clamp_(min=0)
        P11.mul_(shrink)
        P12.mul_(shrink)


def predict(x: Tensor, velocity: Tensor, average: Tensor) -> tuple[Tensor]:
    """|average - x|^2 before the weights move by their velocity. (The velocity decays in ``apply``: one pass less.)"""
    gap = average.sub(x)
    x.add_(velocity)
    return (dot(gap, gap),)


def predict_foreach(xs, velocities, averages):
    gaps = torch._foreach_sub(averages, xs)
    torch._foreach_add_(xs, velocities)
    return (list(map(dot, gaps, gaps)),)


def apply(x, g, velocity, average, step_x, step_v, rate, *, decay: float, a: float) -> None:
    h = decayed(g, x, decay)
    x.addcmul_(h, step_x, value=-1)
    velocity.mul_(a).addcmul_(h, step_v, value=-1)
    average.lerp_(x, rate)


def apply_foreach(xs, gs, velocities, averages, steps_x, steps_v, rates, *, decay: float, a: float) -> None:
    hs = decayed_foreach(gs, xs, decay)
    torch._foreach_addcmul_(xs, hs, steps_x, value=-1)
    torch._foreach_mul_(velocities, a)
    torch._foreach_addcmul_(velocities, hs, steps_v, value=-1)
    torch._foreach_lerp_(averages, xs, rates)


PREDICT = Stage(predict, predict_foreach)
APPLY = Stage(apply, apply_foreach)
