"""The extended Kalman filter on the weights of a network, with a diagonal covariance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .loss import precision
from .output_filter import OutputFilter, trainable
from .registry import register


@register(
    "diagonal-ekf",
    "extended Kalman filter that measures the outputs, with one variance per weight",
    "Puskorius and Feldkamp, 1994; Chang, Murphy and Jones, 2022",
)
class DiagonalEKF(OutputFilter):
    r"""Extended Kalman filter that measures the network's outputs and keeps one variance per weight.

    The weights w are a hidden state with covariance diag(p). A batch of B samples with C outputs each observes
    :math:`y = h(w) + \text{noise}`, the noise of covariance R, one block [C, C] a sample. With the Jacobian
    :math:`H = \partial h / \partial w`, [B C, n], a step is

    .. math::
        w &\leftarrow \gamma w, \qquad p \leftarrow (1 + \alpha)(\gamma^2 p + q) \\
        S &= H \operatorname{diag}(p) H^\top + R, \qquad K = \operatorname{diag}(p) H^\top S^{-1} \\
        w &\leftarrow w + K (y - h(w)) \\
        p &\leftarrow p \circ (1 - \operatorname{diag}(K H)) \quad \text{or} \quad
        1 / p \leftarrow 1 / p + \operatorname{diag}(H^\top R^{-1} H)

    There is no learning rate: p is the step size of each weight. In float64 a step equals that of the dense filter
    (``koala/optim/reference_ekf.py``) which starts from diag(p) and keeps the diagonal of its covariance (the first
    form, "fully decoupled") or of its precision (the second, "variational"). The literature calls either "diagonal
    EKF".

    Args:
        params: float32 or float64 parameters, or groups of them, which may differ in p0, q, gamma and alpha.
        p0: variance of a weight at the beginning; the most important choice. Two numbers: drawn uniformly between them.
        q: process noise, added to p.
        gamma: decay of the weights to 0 between two steps.
        alpha: inflation of p. In float32 an alpha below 6e-8 is 0.
        r: noise of an output. R = r I (gaussian), or :math:`\operatorname{diag}(\pi) - \pi \pi^\top + (jitter + r) I`
            with the network's probabilities :math:`\pi` (categorical). None: R is estimated, see ``noise``.
        beta: of the moving average of R, :math:`R \leftarrow \beta R + (1 - \beta) \tilde R`. None: the mean
            of all steps.
        likelihood: "categorical": outputs are logits, targets class indices, h the softmax. "gaussian": h the outputs.
        covariance: "fully_decoupled" or "variational".
        robust: soft threshold c of outliers (WoLF): R of a sample is divided by :math:`c^2 / (c^2 + |e|^2)`.
        noise: :math:`\tilde R` of a step, with e the residual and means over the batch: "residual" :math:`e e^\top`,
            "innovation" :math:`e e^\top + H \operatorname{diag}(p) H^\top`, "isotropic" :math:`|e|^2 / C \; I`.
        residual: e of that: "prior" is before the step, "posterior" after the step of the linearised network.
        r0: R = r0 I at the beginning, where it is estimated.
        jitter: added to the diagonal of R where that may be singular: of probabilities, or estimated.
        chunk_size: rows of the Jacobian in one vectorised backward pass.

    Raises:
        ValueError: a hyper-parameter out of range or an unknown choice.

    Memory: one float per weight; during a step B C more, for H, and as much again, tensor by tensor.

    The defaults are the tuned ones of probml/rebayes for a small convolutional network on Fashion-MNIST, without their
    alpha of 2.4e-8, which float32 rounds off. The estimated noise is theirs with ``noise="isotropic"`` and
    ``beta=None``, but for the linearised residual.

    References: Puskorius and Feldkamp, *Neurocontrol of nonlinear dynamical systems with Kalman filter trained
    recurrent networks*, 1994. Chang, Murphy, Jones, *On diagonal approximations to the extended Kalman filter for
    online training of Bayesian neural networks*, 2022. Duran-Martin et al., *Outlier-robust Kalman Filtering through
    Generalised Bayes*, ICML 2024, arXiv:2405.05646.
    """

    buffers = ("p",)
    group_keys = ("p0", "q", "gamma", "alpha")

    def __init__(
        self,
        params,
        p0: float | tuple[float, float] = 0.1046,
        *,
        q: float = 0.0,
        gamma: float = 1.0,
        alpha: float = 0.0,
        r: float | None = 0.0,
        beta: float | None = None,
        likelihood: str = "categorical",
        covariance: str = "fully_decoupled",
        robust: float | None = None,
        noise: str = "isotropic",
        residual: str = "posterior",
        r0: float = 1.0,
        jitter: float = 1e-3,
        chunk_size: int = 64,
    ) -> None:
        defaults = {
            "p0": p0, "q": q, "gamma": gamma, "alpha": alpha, "r": r, "beta": beta, "likelihood": likelihood,
            "covariance": covariance, "robust": robust, "noise": noise, "residual": residual, "r0": r0,
            "jitter": jitter, "chunk_size": chunk_size,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _check_values(self, values: dict[str, Any]) -> None:
        super()._check_values(values)
        if "p0" in values:
            low, high = _bounds(values["p0"])
            if not 0 < low <= high:
                raise ValueError(f"{self._name}: p0 must be a number above 0, or two that rise, got {values['p0']}")

    def _make_state(self, group: dict[str, Any]) -> None:
        low, high = _bounds(group["p0"])
        for p in group["params"]:
            if trainable(p) and p not in self.state:
                variance = torch.full_like(p, low, requires_grad=False, memory_format=torch.preserve_format)
                self.state[p]["p"] = variance.uniform_(low, high) if high > low else variance

    def _expected(self, group: dict[str, Any], params: list[Tensor], held: list[int]) -> Iterator[tuple[int, str, Any]]:
        return ((i, "p", params[i].shape) for i in held if i < len(params))

    def _predict(self) -> None:
        for group in self.param_groups:
            growth, gamma, q = 1 + group["alpha"], group["gamma"], group["q"]
            for p in (p for p in group["params"] if p.requires_grad and p in self.state):
                self.state[p]["p"].mul_(growth * gamma**2).add_(growth * q)
                if gamma != 1:
                    p.mul_(gamma)

    def _spread(self, rows: list[Tensor | None]) -> Tensor:
        total = 0
        for p, H in zip(self._trained(), rows, strict=True):
            if H is not None:
                H *= self.state[p]["p"].sqrt().reshape(-1)  # from here on H diag(p)^1/2
                total = total + (H @ H.mT).to(precision(p.device))
        return total

    def _correct(self, rows: list[Tensor | None], factor: Tensor, white: Tensor, noise: Tensor) -> None:
        variational = self.hyper["covariance"] == "variational"
        noise_factor = torch.linalg.cholesky(noise) if variational else None
        for p, H in zip(self._trained(), rows, strict=True):
            if H is None:
                continue
            variance = self.state[p]["p"]
            V = torch.linalg.solve_triangular(factor.to(H), H, upper=False)
            p.add_(variance.sqrt() * (V.mT @ white.to(H)).view_as(p))
            if variational:
                each = H.view(*noise.shape[:2], -1)
                gained = torch.linalg.solve_triangular(noise_factor.to(H), each, upper=False).square().sum((0, 1))
                variance.div_((1 + gained).view_as(p))
            else:  # diag(K H) is below 1, but for rounding
                lost = (1 - V.square().sum(0)).clamp(min=torch.finfo(H.dtype).eps)
                variance.mul_(lost.view_as(p))

    def _mean_variance(self) -> Tensor:
        variances = [self.state[p]["p"] for p in self._trained()]
        count = self.hyper["nis"].new_tensor(sum(variance.numel() for variance in variances))
        return sum(variance.sum(dtype=count.dtype).to(count.device) for variance in variances) / count


def _bounds(p0: float | tuple[float, float]) -> tuple[float, float]:
    return tuple(p0) if isinstance(p0, (tuple, list)) else (p0, p0)
