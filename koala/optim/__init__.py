"""Kalman-filter optimizers with torch.optim's interface."""

from . import reference
from .base import KalmanOptimizer
from .diagonal_ekf import DiagonalEKF
from .koala_m import MomentumKOALA
from .koala_plus_plus import KOALAPlusPlus
from .koala_v import VanillaKOALA
from .layerwise_ekf import LayerwiseEKF
from .loss import LossStats
from .output_filter import OutputFilter
from .registry import OptimizerInfo, create_optimizer, list_optimizers
from .sgdf import SGDF
from .sofim import SOFIM

__all__ = [
    "SGDF",
    "SOFIM",
    "DiagonalEKF",
    "KOALAPlusPlus",
    "KalmanOptimizer",
    "LayerwiseEKF",
    "LossStats",
    "MomentumKOALA",
    "OptimizerInfo",
    "OutputFilter",
    "VanillaKOALA",
    "create_optimizer",
    "list_optimizers",
    "reference",
]
