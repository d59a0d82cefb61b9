"""KOALA: Kalman optimization of neural networks with loss adaptivity. Needs torch and nothing else."""

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

__version__ = "0.1.0"
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
