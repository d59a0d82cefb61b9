"""The extended Kalman filter on a network's weights, dense and in its shortest form: float64 and a few hundred weights.

The truth that :class:`koala.DiagonalEKF` and :class:`koala.LayerwiseEKF` are tested against: each is this filter with a
covariance that is projected on its structure after every step (``fully_decoupled``, ``variational``, ``blocks``).

A network h(w) is observed as y = h(w) + noise of covariance R. With H = dh/dw [M, n], one row per output of each
sample::

    predict   w <- gamma w,  P <- (1 + alpha)(gamma^2 P + q I) / lambda
    update    S = H P H^T + R,  K = P H^T S^-1,  w <- w + K (y - h(w)),  P <- (I - K H) P (I - K H)^T + K R K^T
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def jacobian(outputs: Tensor, weights: list[Tensor]) -> Tensor:
    """One backward pass per entry of ``outputs``: [M, n]."""
    rows = []
    for output in outputs.reshape(-1):
        grads = torch.autograd.grad(output, weights, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([(torch.zeros_like(w) if g is None else g).reshape(-1)
                               for w, g in zip(weights, grads, strict=True)]))  # fmt: skip
    return torch.stack(rows)


def fully_decoupled(P: Tensor) -> Tensor:
    """The diagonal of the covariance."""
    return P.diag().diag()


def variational(P: Tensor) -> Tensor:
    """The diagonal of the precision, inverted."""
    return P.inverse().diag().reciprocal().diag()


def blocks(*sizes: int) -> Callable[[Tensor], Tensor]:
    """The diagonal blocks of the covariance, of these sizes."""
    mask = torch.block_diag(*[torch.ones(size, size, dtype=torch.float64) for size in sizes])
    return lambda P: P * mask


class EKF:
    """The dense filter.

    Args:
        weights: float64 tensors with gradient, changed in place.
        P: covariance [n, n] at the beginning.
        project: what becomes of P after each step.
        lam, nu: P is divided by lambda at each prediction, and 1 - lambda falls by the factor nu at each update.
        noise_scale: factor of R.

    The others are :class:`koala.DiagonalEKF`'s.
    """

    def __init__(
        self, weights: list[Tensor], P: Tensor, *, q=0.0, gamma=1.0, alpha=0.0, r=0.0, beta=None, r0=1.0, jitter=1e-3,
        likelihood="categorical", robust=None, noise="isotropic", residual="posterior", lam=1.0, nu=1.0,
        noise_scale=1.0, project=lambda P: P,
    ) -> None:  # fmt: skip
        self.weights, self.P, self.project = weights, P.clone(), project
        self.q, self.gamma, self.alpha, self.lam, self.nu = q, gamma, alpha, lam, nu
        self.r, self.beta, self.jitter, self.noise_scale = r, beta, jitter, noise_scale
        self.likelihood, self.robust, self.noise, self.residual = likelihood, robust, noise, residual
        self.r0, self.R, self.t = r0, None, 0  # R where it is followed

    def predict(self) -> None:
        for w in self.weights:
            w.data *= self.gamma
        eye = torch.eye(len(self.P), dtype=self.P.dtype)
        self.P = (1 + self.alpha) * (self.gamma**2 * self.P + self.q * eye) / self.lam

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """``outputs`` [B, C] with their graph; ``targets`` [B, C] (gaussian) or class indices [B] (categorical)."""
        B, C = outputs.shape
        observed = outputs if self.likelihood == "gaussian" else outputs.softmax(1)
        y = targets if self.likelihood == "gaussian" else torch.eye(C, dtype=torch.float64)[targets]
        e, H = (y - observed).detach(), jacobian(observed, self.weights)
        R = torch.block_diag(*[self.noise_of(e_b, h_b) for e_b, h_b in zip(e, observed.detach(), strict=True)])

        spread = H @ self.P @ H.T
        K = self.P @ H.T @ (spread + R).inverse()
        step = K @ e.reshape(-1)
        keep = torch.eye(len(self.P), dtype=torch.float64) - K @ H
        self.P = self.project(keep @ self.P @ keep.T + K @ R @ K.T)
        for w, part in zip(self.weights, step.split([w.numel() for w in self.weights]), strict=True):
            w.data += part.view_as(w)

        self.lam = self.nu * self.lam + 1 - self.nu
        if self.r is None:
            if self.residual == "posterior":  # of the linearised network
                e = e - (H @ step).view(B, C)
            self.follow(e, torch.stack([spread[b * C : b * C + C, b * C : b * C + C] for b in range(B)]))

    def noise_of(self, e: Tensor, observed: Tensor) -> Tensor:
        """R of one sample, [C, C]."""
        eye = torch.eye(len(e), dtype=torch.float64)
        if self.r is None:
            self.R = self.r0 * eye if self.R is None else self.R
            R = self.R + self.jitter * eye
        elif self.likelihood == "gaussian":
            R = self.r * eye
        else:
            R = observed.diag() - torch.outer(observed, observed) + (self.jitter + self.r) * eye
        if self.robust is not None:
            R = R * (self.robust**2 + e @ e) / self.robust**2
        return R * self.noise_scale

    def follow(self, e: Tensor, spread: Tensor) -> None:
        """R of the next step, from residuals [B, C] and H P H^T of each sample."""
        C = e.shape[1]
        reading = {
            "residual": torch.einsum("bi,bj->ij", e, e) / len(e),
            "innovation": torch.einsum("bi,bj->ij", e, e) / len(e) + spread.mean(0),
            "isotropic": e.square().mean() * torch.eye(C, dtype=torch.float64),
        }[self.noise]
        self.t += 1
        keep = 1 - 1 / self.t if self.beta is None else self.beta
        self.R = keep * self.R + (1 - keep) * reading
