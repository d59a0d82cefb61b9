"""The filters in their shortest form: lists of float64 tensors, Python numbers, one tensor after the other.

This is the file to read first, and the truth that every fast path is tested against. There are no groups, devices or
ranks here, and nothing is fast. Each class takes the weights, which it changes in place, and is used like the
optimizers: ``predict()``, then ``update(gradients, loss, loss_var)`` with the gradients at the predicted weights.
Symbols are those of the optimizers' docstrings; a trailing underscore is the previous step's.
"""

from __future__ import annotations

from math import isfinite, sqrt

import torch
from torch import Tensor

SKIP_NORM = 1e-9  # a tensor whose gradient is shorter than this is left alone


def usable(g: Tensor | None, shortest: float = SKIP_NORM) -> bool:
    """Whether a tensor takes part: it has a gradient, which is finite and not shorter than `shortest`."""
    return g is not None and isfinite(float(g.norm())) and float(g.norm()) >= shortest


def dot(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape, a number without a graph."""
    return float((a * b).sum())


class Noise:
    """The measurement noise R, and the innovation, of a loss that cannot fall below `lower_bound`."""

    def __init__(self, r: float | None, alpha_r: float, measurement: str, lower_bound: float) -> None:
        self.constant, self.alpha_r, self.measurement, self.lower_bound = r, alpha_r, measurement, lower_bound
        self.R = 1.0 if r is None else r

    def observe(self, loss: float, loss_var: float) -> float | None:
        """R moves by mean(l_j) and mean(l_j^2); the loss above its bound. None where they are not finite."""
        b = self.lower_bound
        reading = {
            "second_moment": loss_var - 2 * b * loss + b**2,  # mean((l_j - b)^2)
            "squared_mean": (loss - b) ** 2,
            "variance": max(loss_var - loss**2, 0.0),
            "variance_of_mean": 0.0,  # of one number, the loss of the batch
        }[self.measurement]
        R = self.constant if self.constant is not None else self.alpha_r * self.R + (1 - self.alpha_r) * reading
        if not (isfinite(loss) and isfinite(loss_var) and isfinite(R)):
            return None
        self.R = R
        return max(loss - b, 0.0)


class VanillaKOALA:
    """KOALA-V: one scalar covariance s for all tensors."""

    def __init__(
        self, x: list[Tensor], lr=1.0, *, sigma=0.1, q=1.0, r=None, alpha_r=0.9, weight_decay=0.0, direction="gradient",
        measurement="second_moment", lower_bound=0.0,
    ) -> None:  # fmt: skip
        self.x, self.lr, self.q, self.decay, self.direction = x, lr, q, weight_decay, direction
        self.noise = Noise(r, alpha_r, measurement, lower_bound)
        self.s = sigma
        self.predicted = False

    def predict(self) -> None:
        if not self.predicted:
            self.s += self.q
        self.predicted = True

    def update(self, gradients: list[Tensor | None], loss: float, loss_var: float) -> None:
        loss = self.noise.observe(loss, loss_var)
        if loss is None:
            return
        self.predicted = False
        largest = R = self.noise.R  # largest S
        for x, g in zip(self.x, gradients, strict=True):
            if not usable(g):
                continue
            h = g + self.decay * x
            S = self.s * dot(h, h) + R
            L = loss + 0.5 * self.decay * dot(x, x)
            x -= self.lr * self.s / S * L * (g if self.direction == "gradient" else h)
            largest = max(largest, S)
        self.gain = self.s / largest  # of the tensor with the largest h
        self.s *= R / largest  # s - s^2 max |h|^2 / S, without the cancellation


class MomentumKOALA:
    """KOALA-M: weights and velocities; one 2x2 covariance P for all tensors."""

    def __init__(
        self, x: list[Tensor], lr=1.0, *, sw=0.1, sc=0.0, sv=0.1, a=0.9, qw=0.01, qv=0.01, r=None, alpha_r=0.9,
        weight_decay=0.0, adaptive_q=True, target=None, measurement="second_moment", lower_bound=0.0,
    ) -> None:  # fmt: skip
        self.x, self.lr, self.a, self.decay, self.target = x, lr, a, weight_decay, target
        self.qx, self.qv, self.adaptive_q = qw, qv, adaptive_q
        self.noise = Noise(r, alpha_r, measurement, lower_bound)
        self.P = torch.tensor([[sw, sc], [sc, sv]], dtype=torch.float64)
        self.velocity = [torch.zeros_like(x) for x in x]
        self.average = [torch.zeros_like(x) for x in x]
        self.predicted = False

    def predict(self) -> None:
        if self.predicted:
            return
        self.predicted = True
        if self.adaptive_q:
            drift = sqrt(sum(dot(a - x, a - x) for a, x in zip(self.average, self.x, strict=True)))
            if isfinite(drift):
                self.qx = 0.9 * self.qx + 0.1 * drift / sum(x.numel() for x in self.x)
        for x, velocity in zip(self.x, self.velocity, strict=True):
            x += velocity
            velocity *= self.a
        F = torch.tensor([[1.0, 1.0], [0.0, self.a]], dtype=torch.float64)
        self.P = F @ self.P @ F.T + torch.diag(torch.tensor([self.qx, self.qv], dtype=torch.float64))

    def update(self, gradients: list[Tensor | None], loss: float, loss_var: float) -> None:
        loss = self.noise.observe(loss, loss_var)
        if loss is None:
            return
        self.predicted = False
        (P11, _), (P21, _) = self.P.tolist()
        largest, self.gain = 0.0, P11 / self.noise.R
        for x, velocity, average, g in zip(self.x, self.velocity, self.average, gradients, strict=True):
            if not usable(g):
                continue
            h = g + self.decay * x
            S = P11 * dot(h, h) + self.noise.R
            innovation = self.target or self.lr * (loss + 0.5 * self.decay * dot(x, x))
            x -= P11 / S * innovation * h
            velocity -= P21 / S * innovation * h
            average += 0.1 * (x - average)
            largest, self.gain = max(largest, dot(h, h) / S), min(self.gain, P11 / S)  # of the largest h
        m = torch.tensor([[largest, 0.0], [0.0, 0.0]], dtype=torch.float64)
        self.P = self.P - self.P @ m @ self.P.T


class KOALAPlusPlus:
    """KOALA++: tracks v = H P, the product of gradient and covariance, of each tensor."""

    def __init__(
        self, x: list[Tensor], lr=1.0, *, sigma=0.1, q=0.1, r=None, alpha_r=0.9, weight_decay=0.0, is_symmetric=True,
        measurement="squared_mean", lower_bound=0.0,
    ) -> None:  # fmt: skip
        self.x, self.lr, self.sigma, self.q, self.decay, self.is_symmetric = x, lr, sigma, q, weight_decay, is_symmetric
        self.noise = Noise(r, alpha_r, measurement, lower_bound)
        self.v: list[Tensor | None] = [None] * len(x)
        self.H: list[Tensor | None] = [None] * len(x)
        self.S: list[float | None] = [None] * len(x)

    def predict(self) -> None:
        pass

    def update(self, gradients: list[Tensor | None], loss: float, loss_var: float) -> None:
        loss = self.noise.observe(loss, loss_var)
        if loss is None:
            return
        R, Q = self.noise.R, self.q
        for i, (x, g) in enumerate(zip(self.x, gradients, strict=True)):
            if not usable(g):
                continue
            H = g + self.decay * x
            v_, H_, S_ = self.v[i], self.H[i], self.S[i]
            if H_ is None:
                v_, H_ = self.sigma * H, H
                S_ = dot(v_, H_) + Q * dot(H_, H_) + R
            x2 = dot(H_, H_)
            alpha, lam = dot(H, H_) / x2, (dot(H, v_) + Q * dot(H, H_)) / S_
            w = dot(H, v_) / x2 - dot(H_, v_) * dot(H, H_) / x2**2 if self.is_symmetric else 0.0
            v = (alpha - lam) * v_ + Q * (H - lam * H_) + w * H_
            S = dot(v, H) + Q * dot(H, H) + R
            L = loss + 0.5 * self.decay * dot(x, x)
            x -= self.lr * L / S * (v + Q * H)
            self.v[i], self.H[i], self.S[i] = v, H, S
        HH, i = max(((dot(H, H), i) for i, H in enumerate(self.H) if H is not None), default=(0.0, 0))
        self.gain = dot(self.v[i] + Q * self.H[i], self.H[i]) / (self.S[i] * HH) if HH else 0.0  # along the largest H


class SOFIM:
    """SOFIM: one rank-one Fisher matrix over the flat vector of all weights that have a gradient."""

    def __init__(
        self, x: list[Tensor], lr=0.1, *, beta=0.9, rho=0.5, weight_decay=0.0, precondition="momentum"
    ) -> None:
        self.x, self.lr, self.beta, self.rho, self.decay, self.precondition = (
            x,
            lr,
            beta,
            rho,
            weight_decay,
            precondition,
        )
        self.M = [torch.zeros_like(x) for x in x]
        self.t = 0

    def predict(self) -> None:
        pass

    def update(self, gradients: list[Tensor | None], loss: float | None = None, loss_var: float | None = None) -> None:
        self.t += 1
        seen = [(x, M, g + self.decay * x) for x, M, g in zip(self.x, self.M, gradients, strict=True) if usable(g, 0.0)]
        for _, M, h in seen:
            M.mul_(self.beta).add_(h, alpha=1 - self.beta)
        ms = [M / (1 - self.beta**self.t) for _, M, _ in seen]
        mm = sum(dot(m, m) for m in ms)
        mg = sum(dot(m, h) for m, (_, _, h) in zip(ms, seen, strict=True))
        for (x, _, h), m in zip(seen, ms, strict=True):
            if self.precondition == "momentum":
                x -= self.lr * m / (self.rho + mm)
            else:
                x -= self.lr * (h / self.rho - m * mg / (self.rho**2 + self.rho * mm))


class SGDF:
    """SGDF: each gradient is mixed, weight by weight, with its running mean by the gain of a linear filter."""

    def __init__(
        self, x: list[Tensor], lr=0.5, *, betas=(0.9, 0.999), eps=1e-8, gamma=0.5, weight_decay=0.0,
        weight_decouple=False, use_sign=False, use_muon=False, ns_steps=5, eps_reading="paper",
    ) -> None:  # fmt: skip
        self.x, self.lr, self.betas, self.eps, self.gamma = x, lr, betas, eps, gamma
        self.decay, self.weight_decouple, self.eps_reading = weight_decay, weight_decouple, eps_reading
        self.use_sign, self.use_muon, self.ns_steps = use_sign, use_muon, ns_steps
        self.m = [torch.zeros_like(x) for x in x]
        self.s = [torch.zeros_like(x) for x in x]
        self.t = [0] * len(x)

    def predict(self) -> None:
        pass

    def update(self, gradients: list[Tensor | None], loss: float | None = None, loss_var: float | None = None) -> None:
        beta1, beta2 = self.betas
        for i, (x, g, m, s) in enumerate(zip(self.x, gradients, self.m, self.s, strict=True)):
            if not usable(g, 0.0):
                continue
            self.t[i] += 1
            t = self.t[i]
            if self.weight_decouple:
                x *= 1 - self.lr * self.decay
            else:
                g = g + self.decay * x
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            s.mul_(beta2).add_((g - m) ** 2, alpha=1 - beta2)
            mean = m / (1 - beta1**t)
            B = (1 + beta1) * (1 - beta2**t) / ((1 - beta1) * (1 - beta1 ** (2 * t)))
            r = g - mean
            noise = B * (r**2 + self.eps) if self.eps_reading == "paper" else B * r**2 + self.eps
            u = mean + (s / (s + noise)) ** self.gamma * r
            if self.use_muon and x.dim() >= 2:
                u = self.orthogonalised(u)
            elif self.use_sign:
                u = u.sign()
            x -= self.lr * u

    def orthogonalised(self, u: Tensor) -> Tensor:
        matrix = (u.flatten(1) if u.dim() == 4 else u).bfloat16()
        if tall := matrix.shape[-2] > matrix.shape[-1]:
            matrix = matrix.mT
        matrix = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(self.ns_steps):
            A = matrix @ matrix.mT
            matrix = 3.4445 * matrix + (-4.775 * A + 2.0315 * (A @ A)) @ matrix
        matrix = matrix.mT if tall else matrix
        return matrix.reshape(u.shape).to(u) * sqrt(max(1, u.shape[-2] / u.shape[-1]))
