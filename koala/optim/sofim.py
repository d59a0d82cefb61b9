"""SOFIM: natural gradient with a regularised rank-one Fisher matrix, inverted in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import KalmanOptimizer
from .tensors import Bucket, dot


class SOFIM(KalmanOptimizer):
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
        defaults = dict(
            lr=lr, beta=beta, rho=rho, weight_decay=weight_decay, precondition=precondition,
            implementation=implementation,
        )  # fmt: skip
        super().__init__(params, defaults)

    def _initial_filter(self, hyper):
        return {"t": 0.0}

    def _measure(self, bucket: Bucket) -> Tensor:
        beta = self._hyper["beta"]
        return _single_tensor_measure(bucket.x, bucket.g, bucket.state["momentum"], bucket.decay, beta)

    def _begin(self, tables) -> None:
        self._hyper["t"].add_(1)
        totals = sum(table.sum(dim=1) for table in tables)
        correction = 1 - self._hyper["beta"] ** self._hyper["t"]
        mm, mg = totals[0] / correction**2, totals[1] / correction
        rho = self._hyper["rho"]
        if self._hyper["precondition"] == "momentum":
            self._on_m, self._on_g = 1 / ((rho + mm) * correction), None
        else:
            self._on_m, self._on_g = -mg / (rho**2 + rho * mm) / correction, 1 / rho

    def _correct(self, bucket: Bucket, table: Tensor, loss: Tensor | None) -> None:
        lr, x0 = bucket.group["lr"], bucket.x[0]
        on_m = (self._on_m * lr).to(x0.dtype)
        on_g = None if self._on_g is None else torch.as_tensor(self._on_g * lr, dtype=x0.dtype, device=x0.device)
        _single_tensor_apply(bucket.x, bucket.g, bucket.state["momentum"], on_m, on_g, bucket.decay)


def _single_tensor_measure(xs, gs, ms, decay: float, beta: float) -> Tensor:
    rows = []
    for x, g, m in zip(xs, gs, ms, strict=True):
        h = g.add(x, alpha=decay) if decay != 0 else g
        m.lerp_(h, 1 - beta)
        rows.append((dot(m, m), dot(m, h)))
    return torch.stack([torch.stack(column) for column in zip(*rows, strict=True)])


def _single_tensor_apply(xs, gs, ms, on_m: Tensor, on_g: Tensor | None, decay: float) -> None:
    for x, g, m in zip(xs, gs, ms, strict=True):
        if on_g is not None:
            h = g.add(x, alpha=decay) if decay != 0 else g
            x.addcmul_(h, on_g, value=-1)
        x.addcmul_(m, on_m, value=-1)
