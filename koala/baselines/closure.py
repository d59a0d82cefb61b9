"""How `step(closure)` begins."""

from collections.abc import Callable
from typing import Any

import torch


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """What `closure` returns; None without one. Gradients are recorded in it, also where the caller records none."""
    with torch.enable_grad():
        return None if closure is None else closure()
