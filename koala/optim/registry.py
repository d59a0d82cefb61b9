"""The optimizers of this package by name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from .diagonal_ekf import DiagonalEKF
from .koala_m import MomentumKOALA
from .koala_plus_plus import KOALAPlusPlus
from .koala_v import VanillaKOALA
from .layerwise_ekf import LayerwiseEKF
from .output_filter import OutputFilter
from .sgdf import SGDF
from .sofim import SOFIM


@dataclass(frozen=True)
class OptimizerInfo:
    """One optimizer: how it is called, what it is, what it costs.

    Attributes:
        name: what the command line and :func:`create_optimizer` call it.
        cls: its class.
        description: one line.
        paper: where it was published.
        moves_on_predict: ``predict()`` moves the weights, so it must come before the forward pass.
    """

    name: str
    cls: type[Optimizer]
    description: str
    paper: str
    moves_on_predict: bool = False

    @property
    def buffers(self) -> int | None:
        """State buffers the size of the network; None where an argument decides."""
        return None if self.cls.buffers is None else len(self.cls.buffers)

    @property
    def observes(self) -> str:
        """What its update is given: the "loss", the "gradient", or "outputs" with their targets."""
        return "outputs" if issubclass(self.cls, OutputFilter) else "loss" if self.needs_loss else "gradient"

    @property
    def needs_loss(self) -> bool:
        """Its update takes the loss."""
        return self.cls.needs_loss


_KOALA = "Davtyan et al., KOALA, AAAI 2022, arXiv 2107.03331"
_REGISTRY = {
    info.name: info
    for info in (
        OptimizerInfo("koala-v", VanillaKOALA, "Kalman filter over the weights with one scalar covariance", _KOALA),
        OptimizerInfo(
            "koala-m",
            MomentumKOALA,
            "Kalman filter over weights and velocities with one 2x2 covariance",
            _KOALA,
            moves_on_predict=True,
        ),
        OptimizerInfo(
            "koala++",
            KOALAPlusPlus,
            "Kalman filter that tracks the product of gradient and covariance, tensor by tensor",
            "Xia et al., KOALA++, NeurIPS 2025, arXiv 2506.04432",
        ),
        OptimizerInfo(
            "sofim",
            SOFIM,
            "natural gradient with a regularised rank-one Fisher matrix from the first moment",
            "Sen et al., SOFIM, arXiv 2403.02833",
        ),
        OptimizerInfo(
            "sgdf",
            SGDF,
            "SGD along a gradient that is mixed with its running mean by the gain of a linear filter, weight by weight",
            "Yao et al., Dynamic Momentum Recalibration in Online Gradient Learning, CVPR 2026, arXiv 2603.06120",
        ),
        OptimizerInfo(
            "diagonal-ekf",
            DiagonalEKF,
            "extended Kalman filter that observes the outputs, with one variance a weight",
            "Puskorius and Feldkamp, 1994; Chang, Murphy and Jones, 2022",
        ),
        OptimizerInfo(
            "lkf",
            LayerwiseEKF,
            "extended Kalman filter that observes the outputs, with blocks of covariance and a forgetting factor",
            "Hu et al., RLEKF, AAAI 2023, arXiv 2212.06989",
        ),
    )
}


def list_optimizers() -> list[OptimizerInfo]:
    """Every optimizer of this package."""
    return list(_REGISTRY.values())


def create_optimizer(name: str, params, **hyperparameters: Any) -> Optimizer:
    """Make the optimizer called ``name`` over ``params``, with its constructor's keywords.

    Raises:
        ValueError: no optimizer has that name.
        TypeError: a keyword its constructor does not take; the message lists those it does.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no optimizer is called {name!r}; there are {', '.join(_REGISTRY)}")
    valid = [parameter for parameter in inspect.signature(_REGISTRY[name].cls).parameters if parameter != "params"]
    for keyword in hyperparameters:
        if keyword not in valid:
            raise TypeError(f"{name} has no argument {keyword!r}; it has {', '.join(valid)}")
    return _REGISTRY[name].cls(params, **hyperparameters)
