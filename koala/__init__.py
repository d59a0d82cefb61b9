"""KOALA: Kalman optimization of neural networks with loss adaptivity. Needs torch and nothing else."""

from .optim import (
    SGDF,
    SOFIM,
    KalmanOptimizer,
    KOALAPlusPlus,
    LossStats,
    MomentumKOALA,
    VanillaKOALA,
    create_optimizer,
    list_optimizers,
)

__version__ = "0.1.0"
__all__ = [
    "SGDF",
    "SOFIM",
    "KOALAPlusPlus",
    "KalmanOptimizer",
    "LossStats",
    "MomentumKOALA",
    "VanillaKOALA",
    "create_optimizer",
    "list_optimizers",
]
