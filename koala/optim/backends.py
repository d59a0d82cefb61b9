"""Which implementation makes the steps: the fastest there is for the device and the filter, or the requested one."""

from __future__ import annotations

import functools
import logging
import os
from types import ModuleType
from typing import Any

from . import portable

log = logging.getLogger("koala")
# What the kernels of a filter repeat. A subclass that changes any of it is not answered by them.
STEP = (
    "gains", "_predict", "apply", "products", "moves", "buffers", "scalars", "filter_state",
    "constant_names", "choices", "decays_anyway", "moves_on_predict", "frozen_sum",
)  # fmt: skip


def kernel_of(optimizer: Any) -> str | None:
    """Name of the kernels that make this very step: its class, or the parent that declares them, has no other part."""
    for cls in type(optimizer).__mro__:
        if "kernel" in vars(cls):
            same = all(getattr(type(optimizer), part) is value for part, value in cls.step_of_kernel.items())
            return cls.kernel if same and vars(optimizer).keys().isdisjoint(STEP) else None
    return None


def choose(optimizer: Any, layout: Any) -> ModuleType:
    """The backend of a layout: a module with ``name``, ``predict``, ``measure`` and ``correct``.

    Raises:
        RuntimeError: ``fused=True`` and there is none, or it cannot be built; the message says why.
    """
    if optimizer.fused is False:
        return portable
    fused, reason = _fused(layout.device.type)
    if fused is not None:
        kernel = kernel_of(optimizer)
        if kernel is None:
            reason = f"there are no kernels of {type(optimizer).__qualname__}'s step"
        else:
            reason = fused.why_not(optimizer, kernel, layout)
    if reason is None:
        return fused
    if optimizer.fused:
        raise RuntimeError(f"fused=True: {reason}; fused=None takes what there is")
    _say(f"{type(optimizer).__name__} takes portable steps on {layout.device.type}: {reason}")
    return portable


def _fused(device: str) -> tuple[ModuleType | None, str | None]:
    """The fused backend for a device, or why there is none."""
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own switch: its kernels then take any
        try:
            from . import fused_cuda
        except ImportError as error:
            return None, f"Triton is not there ({error})"
        return fused_cuda, None
    if device == "cpu":
        from . import fused_cpu

        return fused_cpu, None
    return None, f"there is none for {device}"


@functools.cache
def _say(message: str) -> None:
    """Log it, once a process."""
    log.info(message)
