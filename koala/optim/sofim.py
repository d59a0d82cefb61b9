"""SOFIM: natural gradient with a regularised rank-one Fisher matrix, inverted in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import KalmanOptimizer
from .stages import Stage, decayed, decayed_foreach, dot, fresh, fresh_foreach
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
        implementation: ``"forloop"``, ``"foreach"`` (default) or ``"compiled"`` (:mod:`koala.optim.stages`).

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
        beta: float = 0.9,
        rho: float = 0.5,
        weight_decay: float = 0,
        *,
        precondition: str = "momentum",
        implementation: str | None = None,
    ) -> None:
        self._check_choice("precondition", precondition, ("momentum", "gradient"))
        defaults = {
            "lr": lr, "beta": beta, "rho": rho, "weight_decay": weight_decay, "precondition": precondition,
            "implementation": implementation,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _initial_filter(self, hyper):
        return {"t": 0.0}

    def _measure(self, bucket: Bucket) -> Tensor:
        hyper = self._hyper
        tensors = (bucket.x, bucket.g, bucket.state["momentum"])
        with_gradient = hyper["precondition"] == "gradient"
        constants = {"decay": bucket.decay, "beta": hyper["beta"], "with_gradient": with_gradient}
        return MEASURE(hyper["implementation"], tensors, **constants)

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
        hyper, lr, n = self._hyper, bucket.group["lr"], len(bucket.x)
        scalars = [[(on * lr).to(bucket.x[0])] * n for on in (self._on_M, self._on_g)]
        tensors = (bucket.x, bucket.g, bucket.state["momentum"])
        with_gradient = hyper["precondition"] == "gradient"
        constants = {"decay": bucket.decay, "beta": hyper["beta"], "with_gradient": with_gradient}
        APPLY(hyper["implementation"], tensors, scalars, **constants)


def measure(x, g, M, *, decay: float, beta: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """M.M of the new first moment and, if it is asked for, M.h. The moment itself moves in ``apply``.

    Writing it here would save reading g again, but no compiler fuses a write with a reduction.
    """
    h = decayed(g, x, decay)
    M = fresh(torch.lerp, M, h, weight=1 - beta, slot=1)
    MM = dot(M, M)
    return MM, dot(M, h) if with_gradient else torch.zeros_like(MM)


def measure_foreach(xs, gs, Ms, *, decay: float, beta: float, with_gradient: bool):
    hs = decayed_foreach(gs, xs, decay)
    Ms = fresh_foreach("lerp", Ms, hs, weight=1 - beta, slot=1)
    MM = list(map(dot, Ms, Ms))
    return MM, list(map(dot, Ms, hs)) if with_gradient else list(map(torch.zeros_like, MM))


def apply(x, g, M, on_M, on_g, *, decay: float, beta: float, with_gradient: bool) -> None:
    h = decayed(g, x, decay)
    M.lerp_(h, 1 - beta)
    x.addcmul_(M, on_M, value=-1)
    if with_gradient:
        x.addcmul_(h, on_g, value=-1)


def apply_foreach(xs, gs, Ms, on_M, on_g, *, decay: float, beta: float, with_gradient: bool) -> None:
    hs = decayed_foreach(gs, xs, decay)
    torch._foreach_lerp_(Ms, hs, 1 - beta)
    torch._foreach_addcmul_(xs, Ms, on_M, value=-1)
    if with_gradient:
        torch._foreach_addcmul_(xs, hs, on_g, value=-1)


MEASURE = Stage(measure, measure_foreach)
APPLY = Stage(apply, apply_foreach)
