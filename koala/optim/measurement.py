"""What a filter of outputs measures: errors of the outputs, and the covariance R of their noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .loss import precision

IGNORED = -100  # a class index that leaves its sample out


@dataclass
class Measurement:
    """Of B samples with C outputs each.

    Args:
        observed: what is compared with the targets, [B, C] with its graph.
        error: targets minus observed, [B, C].
        noise: R of each sample, [B, C, C].
    """

    observed: Tensor
    error: Tensor
    noise: Tensor


def measure(outputs: Tensor, targets: Tensor, hyper: Mapping[str, Any]) -> Measurement:
    """The measurement of a batch, with the likelihood and the noise that ``hyper`` names (:class:`koala.DiagonalEKF`).

    Args:
        outputs: [B, C] with their graph.
        targets: [B, C], or class indices [B].
    """
    work = precision(outputs.device)
    with torch.enable_grad():
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # autocast's may be shorter
        if hyper["likelihood"] == "gaussian":
            observed = outputs
        else:
            kept = targets != IGNORED
            observed, targets = outputs[kept].softmax(1), F.one_hot(targets[kept], outputs.shape[1])
    values = observed.detach().to(work)
    error = targets.to(work) - values
    return Measurement(observed, error, _noise(values, error, hyper))


def _noise(observed: Tensor, error: Tensor, hyper: Mapping[str, Any]) -> Tensor:
    """R of each sample, [B, C, C]."""
    eye = torch.eye(error.shape[1], dtype=error.dtype, device=error.device)
    if hyper["r"] is None:
        R = _before(hyper, eye) + hyper["jitter"] * eye
    elif hyper["likelihood"] == "gaussian":
        R = hyper["r"] * eye
    else:
        R = observed.diag_embed() - observed[:, :, None] * observed[:, None] + (hyper["jitter"] + hyper["r"]) * eye
    if hyper["robust"] is not None:  # R / omega
        R = R * (1 + error.square().sum(1) / hyper["robust"] ** 2)[:, None, None]
    return R.expand(len(error), *eye.shape)


def _before(hyper: Mapping[str, Any], eye: Tensor) -> Tensor:
    """R as it was followed so far."""
    return hyper["R"].to(eye) if "R" in hyper else hyper["r0"] * eye


def followed(hyper: Mapping[str, Any], seen: Measurement, spread: Tensor, solved: Tensor) -> Tensor:
    """R of the next step, [C, C], from this step's residuals.

    Args:
        spread: H P H^T, [B C, B C].
        solved: S^-1 times the errors, [B C, 1]. R of a sample times its part is the linearised posterior residual.
    """
    error, (count, size) = seen.error, seen.error.shape
    eye = torch.eye(size, dtype=error.dtype, device=error.device)
    if hyper["residual"] == "posterior":
        error = (seen.noise @ solved.view(count, size, 1)).squeeze(2)
    reading = error.square().mean() * eye if hyper["noise"] == "isotropic" else error.mT @ error / count
    if hyper["noise"] == "innovation":
        reading = reading + spread.view(count, size, count, size).diagonal(dim1=0, dim2=2).mean(2)
    keep = 1 - 1 / hyper["updates"] if hyper["beta"] is None else hyper["beta"]
    return keep * _before(hyper, eye) + (1 - keep) * reading
