"""Measure and apply in torch's own operations, on any device: the fallback, and the fused implementations' description.

Tensors are worked on one after the other, on a CPU in blocks that stay in cache from one operation to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .layout import Bucket, Layout
from .loss import precision

BLOCK = 1 << 16  # elements

Tensors = dict[str, Tensor]  # x, g and buffers of a tensor, or a block of them, by name


class Portable:
    name = "portable"

    def measure(self, optimizer: Any, layout: Layout) -> Tensor:
        """Rows ``[1 + products, n]``: is there a gradient, and the dot products."""
        rows = torch.zeros(1 + len(optimizer.products), layout.n, dtype=layout.dtype, device=layout.device)
        rows[0] = layout.present
        decays = layout.decays
        for bucket in layout.buckets:
            like = {"dtype": precision(bucket.device), "device": bucket.device}
            found = torch.zeros(len(optimizer.products), len(bucket.x), **like)
            for i, block in blocks(bucket):
                if "g" not in block:
                    continue
                decay = decays[bucket.columns.start + i]
                block["h"] = opened(block, decay)
                for k, (a, b) in enumerate(optimizer.products):
                    if decay or a != "x":  # |x|^2 counts where weights decay
                        found[k, i] += dot(block[a], block[b])
            rows[1:, bucket.columns] = found.to(layout.device)
        return rows

    def correct(self, optimizer: Any, layout: Layout, sums: Tensor | None, rows: Tensor | None = None) -> None:
        """Gains of all tensors at once, then the step."""
        rows = self.measure(optimizer, layout) if rows is None else rows
        lr, decay = layout.hyper[:, layout.group]
        coefficients, scalars, state = optimizer.gains(rows, lr, decay, layout.scalars, layout.filter, sums)
        for bucket in layout.buckets:
            own = coefficients[:, bucket.columns].to(bucket.device)
            if hasattr(optimizer, "apply"):
                optimizer.apply(bucket, own)
            else:
                self._apply(optimizer, bucket, own, layout.decays[bucket.columns])
        layout.scalars.copy_(scalars)
        layout.filter.copy_(state)

    def _apply(self, optimizer: Any, bucket: Bucket, coefficients: Tensor, decays: list[float]) -> None:
        gates = (coefficients[0] > 0).unbind()
        columns = [column.unbind() for column in coefficients[1:].to(operation_dtype(bucket.dtype)).T]
        inputs = [(output, name) for output, names in optimizer.moves.items() for name in names]
        for i, block in blocks(bucket):
            own = dict(zip(inputs, columns[i], strict=True))
            anyway = optimizer.decays_anyway
            if "g" not in block:
                if anyway:
                    block[anyway].mul_(own[anyway, anyway])
                continue
            block["h"] = opened(block, decays[i])
            for output, names in optimizer.moves.items():
                target = block[output]
                new = _moved(block, output, {name: own[output, name] for name in names})
                kept = target * own[anyway, anyway] if output == anyway else target
                target.copy_(torch.where(gates[i], new, kept))  # selected: NaN stays out of a tensor that is skipped

    def predict(self, optimizer: Any, layout: Layout) -> None:
        """KOALA-M's: weights move by their velocity; the drift between weights and averages before that."""
        state = dict(zip(optimizer.filter_state, layout.filter, strict=True))
        drifts = torch.zeros(layout.n, dtype=layout.dtype, device=layout.device)
        for bucket in layout.buckets:
            go = state["go"].to(bucket.device, operation_dtype(bucket.dtype))
            found = torch.zeros(len(bucket.x), dtype=precision(bucket.device), device=bucket.device)
            for i, block in blocks(bucket):
                gap = block["average"].to(precision(bucket.device)) - block["x"]
                found[i] += torch.dot(gap, gap)
                block["x"].add_(block["velocity"] * go)
            drifts[bucket.columns] = found.to(layout.device)
        total = (drifts if layout.shares is None else drifts * layout.shares).sum() + layout.frozen
        state["drift"].copy_(torch.where(state["go"] > 0, total, state["drift"]))


def blocks(bucket: Bucket) -> Iterator[tuple[int, Tensors]]:
    """Each tensor in turn, cut into blocks on a CPU. One without a gradient has no ``g``."""
    for i, (x, g) in enumerate(zip(bucket.x, bucket.g, strict=True)):
        whole = {"x": x, **{name: tensors[i] for name, tensors in bucket.buffers.items()}}
        if g is not None:
            whole["g"] = g
        if x.numel() <= BLOCK or x.device.type != "cpu":
            yield i, whole
        else:
            for pieces in zip(*(t.split(BLOCK) for t in whole.values()), strict=True):
                yield i, dict(zip(whole, pieces, strict=True))


def operation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def opened(block: Tensors, decay: float) -> Tensor:
    """h = g + decay x."""
    g = block["g"].to(operation_dtype(block["g"].dtype))
    return g if decay == 0 else torch.add(g, block["x"], alpha=decay)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a.b, 0-dim, in float64 where the device has it: what float32 would overflow at is still a number."""
    dtype = precision(a.device)
    left = a.to(dtype)
    return torch.dot(left, left if b is a else b.to(dtype))


def _moved(block: Tensors, output: str, coefficients: Tensors) -> Tensor:
    """x plus, or instead of a buffer, the sum of coefficient times input."""
    old = block[output].to(operation_dtype(block[output].dtype))
    new = old.clone() if output == "x" else torch.zeros_like(old)
    for name, coefficient in coefficients.items():
        new.addcmul_(block[name].to(old.dtype), coefficient)
    return new


backend = Portable()
