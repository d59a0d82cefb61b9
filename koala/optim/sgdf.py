"""SGDF: the gradient recalibrated by a linear filter, coordinate by coordinate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import KalmanOptimizer
from .gains import gates
from .layout import Bucket, inverse, memory_order
from .portable import blocks, operation_dtype, select
from .registry import register

LONGEST = 1e18  # the square of a longer gradient, times B, is no float32; its tensor is passed over
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Muon's quintic iteration


@register(
    "sgdf",
    "SGD along a gradient that is mixed with its running mean by the gain of a linear filter, weight by weight",
    "Yao et al., Dynamic Momentum Recalibration in Online Gradient Learning, CVPR 2026, arXiv 2603.06120",
)
class SGDF(KalmanOptimizer):
    r"""SGDF: stochastic gradient descent with a filtered gradient.

    Two estimates of the gradient, its bias-corrected running mean :math:`\hat m` and the fresh :math:`g`, are mixed
    with the gain of a linear (Wiener, Kalman) filter: the variance of the mean over that variance plus the squared
    innovation. The mix is the gradient of plain SGD, so rates live on SGD's scale and not on Adam's. Elementwise,
    with :math:`g` including weight decay:

    .. math::
        \begin{aligned}
            m &\leftarrow \beta_1 m + (1 - \beta_1) g, \quad \hat m = m / (1 - \beta_1^t) \\
            s &\leftarrow \beta_2 s + (1 - \beta_2) (g - m)^2, \quad
                B = \frac{(1 + \beta_1)(1 - \beta_2^t)}{(1 - \beta_1)(1 - \beta_1^{2t})} \\
            r &= g - \hat m, \quad K = \frac{s}{s + B (r^2 + \epsilon)} \\
            x &\leftarrow x - \eta (\hat m + K^\gamma r)
        \end{aligned}

    :math:`t` counts the steps of each tensor in which it had a gradient. Time is linear, memory Adam's. It has no use
    for the loss, so ``step()`` and ``update()`` may be called without one.

    Args:
        params: parameters or groups; ``lr`` and ``weight_decay`` may differ between groups.
        lr: :math:`\eta > 0`. Float or one-element tensor.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). :math:`\beta_1 = 0` is SGD.
        eps: :math:`\epsilon > 0`.
        gamma: :math:`\gamma > 0`. 1 is the filter as derived; 1/2, a larger gain, is what every released run uses.
        weight_decay: :math:`\lambda`, added to :math:`g` as :math:`\lambda x`.
        weight_decouple: the weights shrink by :math:`1 - \eta \lambda` before the step, and :math:`g` is free of decay.
        use_sign: step along the sign of the mix.
        use_muon: orthogonalise the mix of tensors of two or more dimensions (of four: flattened to the first by the
            rest) by Muon's Newton-Schulz iteration in bfloat16; there ``use_sign`` does not act. Needs whole tensors.
        ns_steps: iterations of it, at least 2.
        eps_reading: ``"paper"`` as above; ``"released"`` for :math:`K = s / (s + B r^2 + \epsilon)`, as in the class
            at the root of the authors' repository, whose :math:`\epsilon` is weaker by the factor :math:`B`.
        {fused}
        process_group: over which ranks agree on sharded weights; None is the default group, False never communicates.

    Raises:
        ValueError: a hyper-parameter out of its range.
        NotImplementedError: ``use_muon`` with sharded weights.

    Unlike in the released class, weight decay is not left behind in ``.grad``, and a tensor whose gradient is not
    finite is passed over.

    Reference: Yao, Yu, Chang, Li, Zhang, Li. *Dynamic Momentum Recalibration in Online Gradient Learning*. CVPR 2026,
    arXiv:2603.06120, Algorithm 1.
    """

    kernel = "sgdf"
    buffers = ("m", "s")
    scalars = ("t",)
    filter_state = ("skipped",)
    products = (("g", "g"), ("h", "h"))
    constant_names = ("betas", "eps", "gamma", "eps_reading", "weight_decouple", "use_sign")
    choices = {"eps_reading": ("paper", "released")}  # noqa: RUF012
    needs_loss = False

    def __init__(
        self,
        params,
        lr: float | Tensor = 0.5,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        gamma: float = 0.5,
        weight_decay: float = 0.0,
        weight_decouple: bool = False,
        use_sign: bool = False,
        use_muon: bool = False,
        ns_steps: int = 5,
        eps_reading: str = "paper",
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": tuple(betas), "eps": eps, "gamma": gamma, "weight_decay": weight_decay,
            "weight_decouple": weight_decouple, "use_sign": use_sign, "use_muon": use_muon, "ns_steps": ns_steps,
            "eps_reading": eps_reading,
        }  # fmt: skip
        super().__init__(params, defaults, fused=fused, process_group=process_group)
        for name, value, valid, text in (
            ("lr", lr, isinstance(lr, Tensor) or lr > 0, "positive"),
            ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)"),
            ("eps", eps, eps > 0, "positive"),
            ("gamma", gamma, gamma > 0, "positive"),
            ("ns_steps", ns_steps, ns_steps >= 2, "at least 2"),
        ):
            if not valid:
                raise ValueError(f"SGDF: {name} must be {text}, got {value}")

    def _initial_filter(self):
        return {"skipped": 0.0}

    def gains(self, rows, lr, decay, scalars, state, sums):
        """Coefficients: gate, lr, weight decay, 1 / (1 - beta1^t) and B of each tensor."""
        beta1, beta2 = self.hyper["betas"]
        gate, broken = gates(torch.where(rows <= LONGEST**2, rows, torch.inf), shortest=0.0)
        t = scalars[0] + gate.to(scalars.dtype)
        power1, power2 = (torch.full_like(t, beta).pow(t) for beta in (beta1, beta2))
        B = (1 + beta1) * (1 - power2) / ((1 - beta1) * (1 - power1**2))
        return torch.stack((gate.to(lr), lr, decay, 1 / (1 - power1), B)), t[None], state + broken.to(state.dtype)

    def apply(self, bucket: Bucket, coefficients: Tensor, decays: list[float]) -> None:
        """The step of the bucket's tensors, which is not linear.

        Raises:
            NotImplementedError: ``use_muon`` with sharded weights.
        """
        hyper = self.hyper
        if hyper["use_muon"] and bucket.sharded:
            raise NotImplementedError("SGDF(use_muon=True) needs whole tensors, and these are sharded: use DDP")
        gates = (coefficients[0] > 0).long().split(1)
        columns = coefficients[1:].to(operation_dtype(bucket.dtype)).T
        matrices = {i for i, w in enumerate(bucket.weights) if w.dim() >= 2} if hyper["use_muon"] else set()
        for i, block in blocks(bucket, uncut=matrices):
            if "g" not in block:
                continue
            x, g, m, s = (block[name].to(columns.dtype) for name in ("x", "g", "m", "s"))
            lr, decay, debias, B = columns[i]
            if hyper["weight_decouple"]:
                x = x - lr * decay * x
            else:
                g = g + decay * x
            u, m, s = recalibrated(g, m, s, debias, B, hyper)
            if i in matrices:
                u = orthogonalised(u, bucket.weights[i], hyper["ns_steps"])
            elif hyper["use_sign"]:
                u = u.sign()
            for name, new in (("x", x - lr * u), ("m", m), ("s", s)):
                select(gates[i], new, block[name], block[name])


def recalibrated(
    g: Tensor, m: Tensor, s: Tensor, debias: Tensor, B: Tensor, hyper: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """The recalibrated gradient, and the new m and s."""
    beta1, beta2 = hyper["betas"]
    m = torch.lerp(m, g, 1 - beta1)
    s = torch.lerp(s, (g - m).square(), 1 - beta2)
    mean = m * debias
    r = g - mean
    if hyper["eps_reading"] == "paper":
        gain = s / (s + B * (r.square() + hyper["eps"]))
    else:
        gain = s / (s + B * r.square() + hyper["eps"])
    return torch.addcmul(mean, gain.pow(hyper["gamma"]), r), m, s


def orthogonalised(u: Tensor, like: Tensor, steps: int) -> Tensor:
    """Muon's Newton-Schulz iteration: singular values of about 1, and a factor for tall matrices.

    Args:
        u: 1-D, in the memory order of ``like``.
        like: the weights that ``u`` moves, of two or more dimensions. Four are flattened to (first, rest); the last
            two of any other number are the matrices.
        steps: of the iteration, in bfloat16.
    """
    order = memory_order(like)
    shaped = u.view([like.shape[d] for d in order]).permute(inverse(order))
    matrix = (shaped.flatten(1) if like.dim() == 4 else shaped).bfloat16()
    tall = matrix.shape[-2] > matrix.shape[-1]
    X = matrix.mT if tall else matrix
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    X = (X.mT if tall else X).reshape(like.shape).to(u) * math.sqrt(max(1, like.shape[-2] / like.shape[-1]))
    return X.permute(order).reshape(-1)
