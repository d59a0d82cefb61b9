"""KOALA: Kalman optimization of neural networks with loss adaptivity. Needs torch and nothing else."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .optim import (
        SGDF,
        SOFIM,
        DiagonalEKF,
        KalmanOptimizer,
        KOALAPlusPlus,
        LayerwiseEKF,
        LossStats,
        MomentumKOALA,
        OutputFilter,
        VanillaKOALA,
        create_optimizer,
        list_optimizers,
    )

__version__ = "0.2.0.dev0"
__all__ = [
    "SGDF",
    "SOFIM",
    "DiagonalEKF",
    "KOALAPlusPlus",
    "KalmanOptimizer",
    "LayerwiseEKF",
    "LossStats",
    "MomentumKOALA",
    "OutputFilter",
    "VanillaKOALA",
    "create_optimizer",
    "list_optimizers",
]


def __getattr__(name: str):  # imported when used: tables are read and rendered without torch
    if name not in (*__all__, "optim"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    optim = importlib.import_module(".optim", __name__)
    return optim if name == "optim" else getattr(optim, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "optim"})
