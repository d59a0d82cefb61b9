"""SOFIM: natural gradient with a regularised rank-one Fisher matrix, inverted in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import KalmanOptimizer
from .fused import kernels, packed
from .stages import Stage, decayed_foreach, dot
from .tensors import Bucket


class SOFIM(KalmanOptimizer):
    r"""SOFIM: natural gradient with a rank-one Fisher matrix from the first moment, inverted in closed form.

    Over the flat vector of all weights that have a gradient, with :math:`g` including weight decay:

    .. math::
        \begin{aligned}
            M &\leftarrow \beta M + (1 - \beta) g, \quad m = M / (1 - \beta^t) \\
            F &= m m^T + \rho I \\
            x &\leftarrow x - \eta F^{-1} m = x - \eta \frac{m}{\rho + |m|^2}
        \end{aligned}

    One global norm; memory and time of SGD with momentum. It has no use for the loss, so ``step()`` and ``update()``
    may be called without one.

    Args:
        params: parameters or groups; ``lr`` and ``weight_decay`` may differ between groups.
        lr: :math:`\eta`. Float or one-element tensor.
        beta: :math:`\beta`.
        rho: :math:`\rho`.
        weight_decay: ordinary L2, added to :math:`g`.
        precondition: ``"momentum"`` as above, or ``"gradient"``, a reading in which :math:`F^{-1}` is applied to
            the raw gradient: :math:`x \leftarrow x - \eta (g / \rho - m \, (m \cdot g) / (\rho^2 + \rho |m|^2))`.
        fused: True insists on the fused implementation of the device, False on the portable one, None takes the
            fastest there is.
        process_group: over which losses (and the products of sharded tensors) are reduced: None is the default group,
            False never communicates.

    Raises:
        ValueError: a negative hyper-parameter or an unknown choice.

    The paper's grids of ``lr`` and ``rho`` are not known to us; the defaults are values of a co-author's later work.

    Reference: Sen, Qin, Gayathri C, Raghu Kishore N, Chen, Raman. *SOFIM: Stochastic Optimization Using Regularized
    Fisher Information Matrix*. arXiv:2403.02833.
    """

    buffers = ("momentum",)
    needs_loss = False
    needs_all_tensors = True

    def __init__(
        self,
        params,
        lr: float | Tensor = 0.1,
        *,
        beta: float = 0.9,
        rho: float = 0.5,
        weight_decay: float = 0.0,
        precondition: str = "momentum",
        fused: bool | None = None,
        process_group: Any = None,
    ) -> None:
        self._check_choice("precondition", precondition, ("momentum", "gradient"))
        defaults = {"lr": lr, "beta": beta, "rho": rho, "weight_decay": weight_decay, "precondition": precondition}
        super().__init__(params, defaults, fused=fused, process_group=process_group)

    def _initial_filter(self, hyper):
        return {"t": 0.0}

    def _measure(self, bucket: Bucket) -> Tensor:
        hyper = self._hyper
        tensors = (bucket.x, bucket.g, bucket.state["momentum"])
        with_gradient = hyper["precondition"] == "gradient"
        constants = {"decay": bucket.decay, "beta": hyper["beta"], "with_gradient": with_gradient}
        return MEASURE(self.fused, tensors, **constants)

    def _begin(self, buckets: list[Bucket], tables: list[Tensor | None]) -> None:
        hyper, rho = self._hyper, self._hyper["rho"]
        hyper["t"].add_(1)
        correction = 1 - hyper["beta"] ** hyper["t"]  # m = M / correction
        MM, Mg = sum(table.sum(dim=1) for table in tables) if tables else hyper["t"].new_zeros(2)
        mm, mg = MM / correction**2, Mg / correction
        if hyper["precondition"] == "momentum":
            self._on_M, self._on_g = 1 / ((rho + mm) * correction), torch.zeros_like(mm)
        else:
            self._on_M, self._on_g = -mg / ((rho**2 + rho * mm) * correction), torch.ones_like(mm) / rho

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor | None) -> None:
        scalars = (torch.stack((self._on_M, self._on_g)) * bucket.group["lr"])[:, None].expand(2, len(bucket.x))
        tensors = (bucket.x, bucket.g, bucket.state["momentum"])
        with_gradient = self._hyper["precondition"] == "gradient"
        APPLY(self.fused, tensors, scalars, decay=bucket.decay, with_gradient=with_gradient)

    def _correct_fused(self, bucket: Bucket, table: Tensor | None, loss: Tensor | None) -> None:
        lr = bucket.group["lr"]
        kernels(bucket.x[0].device).sofim_correct(
            bucket.x,
            bucket.g,
            bucket.state["momentum"],
            packed(self._on_M * lr, self._on_g * lr),
            decay=bucket.decay,
            with_gradient=self._hyper["precondition"] == "gradient",
        )


def measure(xs, gs, Ms, *, decay: float, beta: float, with_gradient: bool):
    """The first moment moves; M.M of the new one and, if it is asked for, M.h."""
    hs = decayed_foreach(gs, xs, decay)
    torch._foreach_lerp_(Ms, hs, 1 - beta)
    MM = list(map(dot, Ms, Ms))
    return MM, list(map(dot, Ms, hs)) if with_gradient else list(map(torch.zeros_like, MM))


def apply(xs, gs, Ms, on_M, on_g, *, decay: float, with_gradient: bool) -> None:
    """x - on_M M - on_g h."""
    hs = decayed_foreach(gs, xs, decay) if with_gradient else []
    torch._foreach_addcmul_(xs, Ms, on_M, value=-1)
    if with_gradient:
        torch._foreach_addcmul_(xs, hs, on_g, value=-1)


MEASURE = Stage(measure, "sofim_measure")
APPLY = Stage(apply)
