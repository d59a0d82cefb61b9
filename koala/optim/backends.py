"""Which implementation makes the steps: the fastest there is for the device, or the one that was asked for."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

log = logging.getLogger("koala")


def choose(optimizer: Any, layout: Any) -> Any:
    """The backend of a layout; chosen once for each.

    Raises:
        RuntimeError: ``fused=True`` and there is none, or it cannot be built; the message says why.
    """
    if layout.backend is None or layout.backend[0] != optimizer.fused:
        layout.backend = (optimizer.fused, _choose(optimizer, layout))
    return layout.backend[1]


def _choose(optimizer: Any, layout: Any) -> Any:
    from . import portable

    if optimizer.fused is False:
        return portable.backend
    fused = _fused(layout.device.type)
    reason = fused if isinstance(fused, str) else fused.why_not(optimizer, layout)
    if reason is None:
        return fused
    if optimizer.fused:
        raise RuntimeError(f"fused=True: {reason}; fused=None takes what there is")
    say(f"{type(optimizer).__name__} takes portable steps on {layout.device.type}: {reason}")
    return portable.backend


def _fused(device: str) -> Any:
    """The fused backend for a device, or why there is none."""
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own switch: its kernels then take any
        try:
            from . import fused_cuda
        except ImportError as error:
            return f"Triton is not there ({error})"
        return fused_cuda.backend
    if device == "cpu":
        from . import fused_cpu

        return fused_cpu.backend
    return f"there is none for {device}"


@functools.cache
def say(message: str) -> None:
    """Log it, once a process."""
    log.info(message)
