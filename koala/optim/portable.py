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
    """Every filter's step in torch's own operations; what `fused=False` takes and what any device can run."""

    name = "portable"

    def measure(self, optimizer: Any, layout: Layout) -> Tensor:
        """Rows ``[1 + products, n]``: is there a gradient, and the dot products."""
        tables = [torch.zeros(len(optimizer.products), 0, dtype=layout.dtype, device=layout.device)]
        names = {name for pair in optimizer.products for name in pair}
        for bucket in layout.buckets:
            nothing = torch.zeros((), dtype=precision(bucket.device), device=bucket.device)
            found = [[nothing] * len(bucket.x) for _ in optimizer.products]
            for i, block in blocks(bucket):
                if "g" not in block:
                    continue
                decay = layout.decays[bucket.columns.start + i]
                wide = _widened(block, decay, names)
                for k, (a, b) in enumerate(optimizer.products):
                    if a in wide:
                        found[k][i] = found[k][i] + torch.dot(wide[a], wide[b])
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
        gates = (first > 0).long().split(1)
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
                select(gates[i], new, kept, target)

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


def select(gate: Tensor, new: Tensor, kept: Tensor, out: Tensor) -> None:
    """``out`` is ``new`` where the gate (int64, one element) is 1, else ``kept``: NaN stays out of a skipped tensor."""
    new = new.to(kept.dtype)
    if out.device.type == "cpu":  # three copies; where() takes ten times as long as one with a condition of one element
        torch.index_select(torch.stack((kept, new)), 0, gate, out=out.unsqueeze(0))
    else:
        torch.where(gate > 0, new, kept, out=out)


def _widened(block: Tensors, decay: float, names: Collection[str]) -> Tensors:
    """What products are taken of, in float64 where the device has it: what float32 would overflow at is still a number.

    |x|^2 counts where weights decay only: without decay there is no x, and h is g.
    """
    dtype = precision(block["x"].device)
    wide = {name: block[name].to(dtype) for name in block if name in names and (decay or name != "x")}
    x = wide["x"] if "x" in wide else block["x"]
    wide["h"] = torch.add(wide["g"], x, alpha=decay) if decay else wide["g"]
    return wide


def _moved(block: Tensors, output: str, coefficients: Tensors) -> Tensor:
    """x plus, or instead of a buffer, the sum of coefficient times input."""
    old = block[output].to(operation_dtype(block[output].dtype))
    terms = [(block[name].to(old.dtype), coefficient) for name, coefficient in coefficients.items()]
    if output == "x":
        new = torch.addcmul(old, *terms.pop(0))
    else:
        new = torch.mul(*terms.pop(0))
    for values, coefficient in terms:
        new.addcmul_(values, coefficient)
    return new


backend = Portable()
