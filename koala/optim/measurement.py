"""What a filter of outputs measures: errors of the outputs, and the covariance R of their noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .jacobian import depends_on_the_batch
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


def check(outputs: Tensor, targets: Tensor, likelihood: str, name: str) -> None:
    """Raises ValueError unless outputs [B, C] and targets make a measurement; `name` of the filter, for the message."""
    if outputs.dim() != 2:
        raise ValueError(f"{name}: outputs must be [B, C], got {tuple(outputs.shape)}")
    if not outputs.requires_grad:
        raise ValueError(f"{name}: the outputs have no graph: compute them where gradients are recorded")
    categorical = likelihood == "categorical"
    wanted = outputs.shape[:1] if categorical else outputs.shape
    if targets.shape != wanted:
        kind = "class indices [B]" if categorical else "numbers [B, C]"
        raise ValueError(
            f"{name}: likelihood={likelihood} takes targets of {kind}, here {tuple(wanted)}, got {tuple(targets.shape)}"
        )
    if categorical:
        if targets.is_floating_point():
            raise ValueError(f"{name}: targets must be class indices, got {targets.dtype}")
        if (wrong := (targets != IGNORED) & ((targets < 0) | (targets >= outputs.shape[1]))).any():
            raise ValueError(
                f"{name}: target {targets[wrong][0].item()} is no class; valid: 0 to {outputs.shape[1] - 1}, "
                f"{IGNORED} to leave the sample out"
            )
    if len(outputs) > 1 and depends_on_the_batch(outputs):
        raise ValueError(
            f"{name}: BatchNorm in training mode makes the outputs of one sample depend on the others; "
            "valid: its eval mode, batches of one sample, another normalisation"
        )


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
            observed, targets = outputs[kept].softmax(1), F.one_hot(targets[kept].long(), outputs.shape[1])
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
