"""Measure and apply in torch's own operations, on any device: the fallback, and the fused implementations' description.

Tensors are worked on one after the other, on a CPU in blocks that stay in cache from one operation to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
        tables = [torch.zeros(len(optimizer.products), 0, dtype=layout.dtype, device=layout.device)]
        for bucket in layout.buckets:
            nothing = torch.zeros((), dtype=precision(bucket.device), device=bucket.device)
            found = [[nothing] * len(bucket.x) for _ in optimizer.products]
            for i, block in blocks(bucket):
                if "g" not in block:
                    continue
                decay = layout.decays[bucket.columns.start + i]
                block["h"] = opened(block, decay)
                for k, (a, b) in enumerate(optimizer.products):
                    if decay or a != "x":  # |x|^2 counts where weights decay
                        found[k][i] = found[k][i] + dot(block[a], block[b])
            products = torch.stack([value for row in found for value in row]).view(len(found), -1)
            tables.append(products.to(layout.device))
        return torch.cat((layout.present.unsqueeze(0), torch.cat(tables, dim=1)))

    def correct(self, optimizer: Any, layout: Layout, sums: Tensor | None, rows: Tensor | None = None) -> None:
        """Gains of all tensors at once, then the step."""
        rows = self.measure(optimizer, layout) if rows is None else rows
        lr, decay = layout.hyper.index_select(1, layout.group)
        coefficients, scalars, state = optimizer.gains(rows, lr, decay, layout.scalars, layout.filter, sums)
        widths = [len(bucket.x) for bucket in layout.buckets]
        for bucket, own in zip(
            layout.buckets, coefficients.split(widths, dim=1), strict=False
        ):  # no tensors: one split
            own = own.to(bucket.device)
            if hasattr(optimizer, "apply"):
                optimizer.apply(bucket, own)
            else:
                self._apply(optimizer, bucket, own, layout.decays[bucket.columns])
        torch._foreach_copy_([layout.scalars, layout.filter], [scalars, state])

    def _apply(self, optimizer: Any, bucket: Bucket, coefficients: Tensor, decays: list[float]) -> None:
        first, *rest = coefficients.unbind()
        gates = (first > 0).unbind()
        columns = list(zip(*(row.to(operation_dtype(bucket.dtype)).unbind() for row in rest), strict=True))
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
                torch.where(
                    gates[i], new.to(kept.dtype), kept, out=target
                )  # selected: NaN stays out of a tensor that is skipped

    def predict(self, optimizer: Any, layout: Layout) -> None:
        """KOALA-M's: weights move by their velocity; the drift between weights and averages before that."""
        hyper, total = optimizer.hyper, layout.frozen
        shares = [1.0] * layout.n if layout.shares is None else layout.shares.unbind()
        for bucket in layout.buckets:
            go = hyper["go"].to(bucket.device, operation_dtype(bucket.dtype))
            for i, block in blocks(bucket):
                gap = block["average"].to(precision(bucket.device)) - block["x"]
                total = total + torch.dot(gap, gap).to(layout.device) * shares[bucket.columns.start + i]
                block["x"].add_(block["velocity"] * go)
        torch.where(hyper["go"] > 0, total, hyper["drift"], out=hyper["drift"])


def blocks(bucket: Bucket, uncut: Collection[int] = ()) -> Iterator[tuple[int, Tensors]]:
    """Each tensor in turn, cut into blocks on a CPU but for those of `uncut`. One without a gradient has no ``g``."""
    for i, (x, g) in enumerate(zip(bucket.x, bucket.g, strict=True)):
        whole = {"x": x, **{name: tensors[i] for name, tensors in bucket.buffers.items()}}
        if g is not None:
            whole["g"] = g
        if i in uncut or x.numel() <= BLOCK or x.device.type != "cpu":
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
