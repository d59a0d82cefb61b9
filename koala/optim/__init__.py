"""Kalman-filter optimizers with torch.optim's interface."""

from .base import KalmanOptimizer
from .koala_m import MomentumKOALA
from .koala_plus_plus import KOALAPlusPlus
from .koala_v import VanillaKOALA
from .loss import LossStats
from .registry import OptimizerInfo, create_optimizer, list_optimizers
from .sgdf import SGDF
from .sofim import SOFIM

__all__ = [
    "SGDF",
    "SOFIM",
    "KOALAPlusPlus",
    "KalmanOptimizer",
    "LossStats",
    "MomentumKOALA",
    "OptimizerInfo",
    "VanillaKOALA",
    "create_optimizer",
    "list_optimizers",
]
