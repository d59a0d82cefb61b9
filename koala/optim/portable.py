"""Steps in torch's own operations, on any device: what ``fused=False`` takes, and the fused kernels' description.

Tensors are worked on one after the other, on a CPU in blocks that stay in cache from one operation to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .loss import precision

if TYPE_CHECKING:
    from .layout import Bucket, Layout

name = "portable"
BLOCK = 1 << 16  # elements

Tensors = dict[str, Tensor]  # x, g and buffers of a tensor, or a block of them, by name


def predict(optimizer: Any, layout: Layout) -> None:
    """The filter's own time update."""
    optimizer._predict(optimizer.hyper["go"])


def measure(optimizer: Any, layout: Layout) -> Tensor:
    """Rows ``[1 + products, n]``: is there a gradient, and the dot products."""
    tables = [torch.zeros(len(optimizer.products), 0, dtype=layout.dtype, device=layout.device)]
    names, decays = set(chain.from_iterable(optimizer.products)), layout.decays
    for bucket in layout.buckets:
        zero = torch.zeros((), dtype=precision(bucket.device), device=bucket.device)
        sums = [[zero] * len(bucket.x) for _ in optimizer.products]
        for i, block in blocks(bucket):
            if "g" not in block:
                continue
            wide = _widened(block, decays[bucket.columns.start + i], names)
            for k, (a, b) in enumerate(optimizer.products):
                if a in wide:
                    sums[k][i] = sums[k][i] + torch.dot(wide[a], wide[b])
        products = torch.stack(list(chain.from_iterable(sums))).view(len(sums), -1)
        tables.append(products.to(layout.device))
    return torch.cat((layout.present.unsqueeze(0), torch.cat(tables, dim=1)))


def correct(optimizer: Any, layout: Layout, sums: Tensor | None, rows: Tensor | None = None) -> None:
    """Gains of all tensors at once, then the step."""
    rows = measure(optimizer, layout) if rows is None else rows
    lr, decay = layout.hyper.index_select(1, layout.group)
    coefficients, scalars, state = optimizer.gains(rows, lr, decay, layout.scalars, layout.filter, sums)
    decays = layout.decays
    for bucket, columns in zip(layout.buckets, coefficients.split(layout.widths, dim=1), strict=False):  # one, if none
        optimizer.apply(bucket, columns.to(bucket.device), decays[bucket.columns])
    torch._foreach_copy_([layout.scalars, layout.filter], [scalars, state])


def apply_moves(optimizer: Any, bucket: Bucket, coefficients: Tensor, decays: list[float]) -> None:
    """The step of a bucket's tensors, in place, from their coefficients, by the filter's ``moves``."""
    gates = (coefficients.unbind()[0] > 0).long().split(1)
    columns = coefficients.to(operation_dtype(bucket.dtype)).unbind(1)
    inputs = [(output, name) for output, names in optimizer.moves.items() for name in names]
    anyway = optimizer.decays_anyway
    for i, block in blocks(bucket):
        factors = columns[i].unbind()[1:]
        keep = factors[inputs.index((anyway, anyway))] if anyway else None
        if "g" not in block:
            if anyway:
                block[anyway].mul_(keep)
            continue
        block["h"] = opened(block, decays[i])
        for output, names in optimizer.moves.items():
            target = block[output]
            new = _moved(block, output, names, factors)
            select(gates[i], new, target * keep if output == anyway else target, target)
            factors = factors[len(names) :]


def blocks(bucket: Bucket, uncut: Collection[int] = ()) -> Iterator[tuple[int, Tensors]]:
    """Each tensor in turn, cut into blocks on a CPU but for those of `uncut`. One without a gradient has no ``g``."""
    for i, (x, g) in enumerate(zip(bucket.x, bucket.g, strict=True)):
        tensors = {"x": x}
        for name, buffers in bucket.buffers.items():
            tensors[name] = buffers[i]
        if g is not None:
            tensors["g"] = g
        if i in uncut or x.numel() <= BLOCK or x.device.type != "cpu":
            yield i, tensors
        else:
            for pieces in zip(*(t.split(BLOCK) for t in tensors.values()), strict=True):
                yield i, dict(zip(tensors, pieces, strict=True))


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


def _widened(block: Tensors, decay: float, names: set[str]) -> Tensors:
    """What products are taken of, in float64 where the device has it: what float32 would overflow at is still a number.

    |x|^2 counts where weights decay only: without decay there is no x, and h is g.
    """
    dtype = precision(block["x"].device)
    wide = {}
    for name in names & block.keys():
        if decay or name != "x":
            wide[name] = block[name].to(dtype)
    x = wide["x"] if "x" in wide else block["x"]
    wide["h"] = torch.add(wide["g"], x, alpha=decay) if decay else wide["g"]
    return wide


def _moved(block: Tensors, output: str, names: tuple[str, ...], factors: Sequence[Tensor]) -> Tensor:
    """x plus, or instead of a buffer, the sum of factor times input."""
    old = block[output].to(operation_dtype(block[output].dtype))
    first = block[names[0]].to(old.dtype)
    new = torch.addcmul(old, first, factors[0]) if output == "x" else torch.mul(first, factors[0])
    for name, factor in zip(names[1:], factors[1:], strict=False):  # the factors of other outputs follow
        new.addcmul_(block[name].to(old.dtype), factor)
    return new
