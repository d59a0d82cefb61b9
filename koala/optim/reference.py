"""The filters in their shortest form: float64 arithmetic, Python numbers, one tensor after the other, nothing fast.

This is the file to read first, and the truth that every fast path is tested against. Each class is an optimizer with
the arguments, the state and the ``state_dict`` of the one that it is named after, so a doubt is settled by swapping one
word, even in the middle of a run: ``koala.optim.reference.MomentumKOALA(model.parameters(), lr=1.0)``.

Symbols are those of the optimizers' docstrings; a trailing underscore is the previous step's. ``self.hyper`` holds the
hyper-parameters and, as 0-dim tensors, the filter's state. A class defines how to ``correct`` the weights, given the
loss, and what a prediction does before. Losses, groups, saving and loading are the fast optimizers' own.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite, sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import koala_m, koala_plus_plus, koala_v, sgdf, sofim
from .base import KalmanOptimizer
from .loss import LossStats

SKIP_NORM = 1e-9  # a tensor whose gradient is shorter than this is left alone
TINY = 1e-300  # keeps 0 / 0 out


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape."""
    return float((a.double() * b.double()).sum())


class Active(NamedTuple):
    """One tensor that takes part in a step: the parameter p, and what the equations call x, g, h, lr and lambda."""

    p: Tensor
    x: Tensor
    g: Tensor
    h: Tensor
    lr: float
    decay: float
    state: dict[str, Tensor]


class Reference(KalmanOptimizer):
    """What the classes below share: who takes part, and the measurement noise."""

    backend = "reference"

    def correct(self, loss: float) -> None:
        """Move weights and state. ``loss``: the measured one above its lower bound; 0 where it is not needed."""
        raise NotImplementedError

    def _time_update(self) -> None:
        """What a prediction does, unless the last update was skipped."""

    def _measurement_update(self, stats: LossStats | None) -> None:
        self.broken = False  # whether anything was skipped for not being finite
        loss = self.measured(stats) if self.needs_loss else 0.0
        if loss is not None:
            self.correct(loss)
        self.set(skipped=float(self.hyper["skipped"]) + (self.broken or loss is None))
        if "go" in self.filter_state:
            self.set(go=loss is not None)

    def measured(self, stats: LossStats) -> float | None:
        """R moves by mean(l_j) and mean(l_j^2); the loss above its bound. None where they are not finite."""
        if self.world > 1:
            stats = stats.all_reduce(self.process_group)
        hyper, loss, loss_var = self.hyper, float(stats.mean), float(stats.second_moment)
        b, alpha = hyper["lower_bound"], hyper["alpha_r"]
        reading = {
            "second_moment": max(loss_var - 2 * b * loss + b * b, 0.0),  # mean((l_j - b)^2)
            "squared_mean": (loss - b) * (loss - b),
            "variance": max(loss_var - loss * loss, 0.0),
            "variance_of_mean": 0.0,  # of one number, the loss of the batch
        }[hyper["measurement"]]
        R = hyper["r"] if hyper["r"] is not None else alpha * float(hyper["R"]) + (1 - alpha) * reading
        if not (isfinite(loss) and isfinite(loss_var) and isfinite(R)):
            return None
        self.set(R=R)
        return max(loss - b, 0.0)

    def trained(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Every parameter that is not frozen, with its group."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.requires_grad:
                    yield p, group

    def active(self, shortest: float = SKIP_NORM) -> Iterator[Active]:
        """The tensors that have a gradient, if it is finite and not shorter than `shortest`."""
        for p, group in self.trained():
            if p.grad is None:
                continue
            lr, decay = float(group["lr"]), group["weight_decay"]
            x, g = p.double(), p.grad.double()
            h = g + decay * x
            if not isfinite(dot(g, g) + dot(h, h)):
                self.broken = True
            elif sqrt(dot(g, g)) >= shortest:
                yield Active(p, x, g, h, lr, decay, self.state[p])

    def set(self, **values: float) -> None:
        """Filter state, which all groups share."""
        for name, value in values.items():
            self.hyper[name].fill_(value)

    def get(self, *names: str) -> list[float]:
        return [float(self.hyper[name]) for name in names]


class VanillaKOALA(Reference, koala_v.VanillaKOALA):
    """KOALA-V: one scalar covariance s for all tensors."""

    def _time_update(self) -> None:
        s, go = self.get("s", "go")
        self.set(s=s + go * self.hyper["q"])

    def correct(self, loss: float) -> None:
        s, R = self.get("s", "R")
        floor = largest = max(R, TINY)  # largest S
        for p, x, g, h, lr, decay, _ in self.active():
            S = max(s * dot(h, h) + R, TINY)
            L = loss + 0.5 * decay * dot(x, x)
            p.copy_(x - lr * s / S * L * (g if self.hyper["direction"] == "gradient" else h))
            largest = max(largest, S)
        # s - s^2 max |h|^2 / S without the cancellation, and the gain s |h|^2 / S of the same tensor
        self.set(s=s * floor / largest, gain=1 - floor / largest)


class MomentumKOALA(Reference, koala_m.MomentumKOALA):
    """KOALA-M: weights and velocities; one 2x2 covariance P for all tensors.

    Weights move at the prediction. The rest of it (velocity, q_x, P) follows in the update, unless that is skipped.
    """

    def _time_update(self) -> None:
        if not self.hyper["go"]:
            return
        drift = 0.0
        for p in self._params():  # of frozen ones too, whose average is 0 if they never were trained
            average = self.state.get(p, {}).get("average", torch.zeros_like(p))
            drift += dot(average.double() - p.double(), average.double() - p.double())
        self.set(drift=drift)
        for p, _ in self.trained():
            p.copy_(p.double() + self.state[p]["velocity"].double())

    def correct(self, loss: float) -> None:
        hyper, a = self.hyper, self.hyper["a"]
        R, P11, P12, P22, qx, drift = self.get("R", "P11", "P12", "P22", "qx", "drift")
        if hyper["adaptive_q"] and isfinite(drift):
            qx = 0.9 * qx + 0.1 * sqrt(drift) / sum(p.numel() for p in self._params())
        F = torch.tensor([[1.0, 1.0], [0.0, a]], dtype=torch.float64, device="cpu")
        Q = torch.tensor([[qx, 0.0], [0.0, hyper["qv"]]], dtype=torch.float64, device="cpu")
        P = F @ torch.tensor([[P11, P12], [P12, P22]], dtype=torch.float64, device="cpu") @ F.T + Q
        (P11, _), (P21, _) = P.tolist()
        prior = P11
        for p, _ in self.trained():
            self.state[p]["velocity"].mul_(a)
        largest = 0.0
        for p, x, _, h, lr, decay, state in self.active():
            S = max(P11 * dot(h, h) + R, TINY)
            innovation = hyper["target"] or lr * (loss + 0.5 * decay * dot(x, x))
            x = x - P11 / S * innovation * h
            p.copy_(x)
            state["velocity"].copy_(state["velocity"].double() - P21 / S * innovation * h)
            state["average"].copy_(0.9 * state["average"].double() + 0.1 * x)
            largest = max(largest, dot(h, h) / S)
        m = torch.tensor([[largest, 0.0], [0.0, 0.0]], dtype=torch.float64, device="cpu")
        (P11, P12), (_, P22) = (P - P @ m @ P.T).tolist()
        self.set(P11=P11, P12=P12, P22=P22, qx=qx, gain=prior * largest)


class KOALAPlusPlus(Reference, koala_plus_plus.KOALAPlusPlus):
    """KOALA++: tracks v = H P, the product of gradient and covariance, of each tensor."""

    def correct(self, loss: float) -> None:
        R, sigma, Q = float(self.hyper["R"]), self.hyper["sigma"], self.hyper["q"]
        for p, x, _, H, lr, decay, state in self.active():
            v_, H_, S_ = state["v"].double(), state["H"].double(), float(state["S"])
            if state["HH"] == 0:  # the first step
                v_, H_ = sigma * H, H
                S_ = dot(v_, H_) + Q * dot(H_, H_) + R
            x2 = dot(H_, H_)
            alpha, lam = dot(H, H_) / x2, (dot(H, v_) + Q * dot(H, H_)) / S_
            w = dot(H, v_) / x2 - dot(H_, v_) * dot(H, H_) / x2**2 if self.hyper["is_symmetric"] else 0.0
            v = (alpha - lam) * v_ + Q * (H - lam * H_) + w * H_
            S = dot(v, H) + Q * dot(H, H) + R or TINY
            L = loss + 0.5 * decay * dot(x, x)
            p.copy_(x - lr * L / S * (v + Q * H))
            for name, value in (("v", v), ("H", H)):
                state[name].copy_(value)
            for name, value in (("S", S), ("HH", dot(H, H)), ("vH", dot(v, H))):
                state[name].fill_(value)


class SOFIM(Reference, sofim.SOFIM):
    """SOFIM: one rank-one Fisher matrix over the flat vector of all weights that have a gradient."""

    def correct(self, loss: float) -> None:
        beta, rho, t = self.hyper["beta"], self.hyper["rho"], float(self.hyper["t"]) + 1
        self.set(t=t)
        tensors = list(self.active(shortest=0.0))
        for _, _, _, h, _, _, state in tensors:
            state["momentum"].copy_(beta * state["momentum"].double() + (1 - beta) * h)
        ms = [state["momentum"].double() / (1 - beta**t) for *_, state in tensors]
        mm = sum(dot(m, m) for m in ms)
        mg = sum(dot(m, one.h) for m, one in zip(ms, tensors, strict=True))
        for (p, x, _, h, lr, _, _), m in zip(tensors, ms, strict=True):
            if self.hyper["precondition"] == "momentum":
                p.copy_(x - lr * m / (rho + mm))
            else:
                p.copy_(x - lr * (h / rho - m * mg / (rho**2 + rho * mm)))


class SGDF(Reference, sgdf.SGDF):
    """SGDF: each gradient is mixed, weight by weight, with its running mean by the gain of a linear filter."""

    def correct(self, loss: float) -> None:
        hyper, (beta1, beta2) = self.hyper, self.hyper["betas"]
        for p, x, g, h, lr, decay, state in self.active(shortest=0.0):
            if hyper["weight_decouple"]:
                x = (1 - lr * decay) * x
            else:
                g = h
            t = float(state["t"].add_(1))
            m = beta1 * state["m"].double() + (1 - beta1) * g
            s = beta2 * state["s"].double() + (1 - beta2) * (g - m) ** 2
            mean = m / (1 - beta1**t)
            B = (1 + beta1) * (1 - beta2**t) / ((1 - beta1) * (1 - beta1 ** (2 * t)))
            r = g - mean
            noise = B * (r**2 + hyper["eps"]) if hyper["eps_reading"] == "paper" else B * r**2 + hyper["eps"]
            u = mean + (s / (s + noise)) ** hyper["gamma"] * r
            if hyper["use_muon"] and x.dim() >= 2:
                u = self.orthogonalised(u)
            elif hyper["use_sign"]:
                u = u.sign()
            p.copy_(x - lr * u)
            state["m"].copy_(m)
            state["s"].copy_(s)

    def orthogonalised(self, u: Tensor) -> Tensor:
        """Muon's Newton-Schulz iteration."""
        matrix = (u.flatten(1) if u.dim() == 4 else u).bfloat16()
        if tall := matrix.shape[-2] > matrix.shape[-1]:
            matrix = matrix.mT
        matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(self.hyper["ns_steps"]):
            A = matrix @ matrix.mT
            matrix = 3.4445 * matrix + (-4.775 * A + 2.0315 * (A @ A)) @ matrix
        matrix = matrix.mT if tall else matrix
        return matrix.reshape(u.shape).to(u) * sqrt(max(1, u.shape[-2] / u.shape[-1]))
