"""One pass over memory: multi-tensor, or fused in C++ for the CPU (fused.cpp).

On the CPU the multi-tensor way goes through memory in blocks that stay in cache from one operation to the next: every
operation is a pass over its operands there, and whole tensors would go through main memory each time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import fused

BLOCK = 1 << 18  # elements


def dot(a: Tensor, b: Tensor) -> Tensor:
    """a.b of two 1-D tensors, 0-dim; half precision is accumulated in float32."""
    if a.dtype in (torch.bfloat16, torch.float16):
        a, b = a.float(), b.float()
    return torch.dot(a, b)


def fresh(operation: Callable, *tensors: Tensor, **kwargs) -> Tensor:
    """``operation(*tensors)`` in working memory that is used again by the next call.

    A block that is allocated for every operation goes back to the system each time, and faulting its pages in again
    takes longer than the operation.
    """
    return operation(*tensors, **kwargs, out=_working_memory(tensors[:1])[0])


def fresh_foreach(operation: str, *lists: list[Tensor], **kwargs) -> list[Tensor]:
    """The same over lists: ``torch._foreach_<operation>`` off the CPU."""
    if lists[0][0].device.type != "cpu":
        return list(getattr(torch, f"_foreach_{operation}")(*lists, **kwargs))
    outs = _working_memory(lists[0])
    return [getattr(torch, operation)(*t, **kwargs, out=out) for *t, out in zip(*lists, outs, strict=True)]


def _working_memory(likes: Sequence[Tensor]) -> Sequence[Tensor]:
    lengths = [t.numel() for t in likes]
    if likes[0].device.type != "cpu" or sum(lengths) > BLOCK:
        return [torch.empty_like(t) for t in likes]
    block = _block(BLOCK, likes[0].dtype, threading.get_ident())
    return block[: sum(lengths)].split(lengths)


@functools.lru_cache(maxsize=32)
def _block(length: int, dtype: torch.dtype, thread: int) -> Tensor:
    return torch.empty(length, dtype=dtype)


def decayed_foreach(gs: list[Tensor], xs: list[Tensor], decay: float) -> list[Tensor]:
    """h = g + decay x of each tensor, good until the next call."""
    return gs if decay == 0 else fresh_foreach("add", gs, xs, alpha=decay)


@dataclass(frozen=True)
class Stage:
    """A pass over the tensors of a bucket.

    Attributes:
        foreach: ``foreach(*lists, *scalars, **constants)`` over lists of 1-D tensors and of 0-dim scalars. It works
            elementwise in place and returns a tuple of lists of dot products (so blocks of a tensor may be given, and
            their results added), or nothing.
        fused: name of the same in fused.cpp, where it is called on its own.
    """

    foreach: Callable[..., tuple[list[Tensor], ...] | None]
    fused: str | None = None

    def __call__(
        self, fused_wanted: bool | None, tensors: Sequence[list[Tensor]], scalars: Tensor | None = None, **constants
    ) -> Tensor | None:
        """Run over all tensors.

        Args:
            fused_wanted: run the C++.
            tensors: lists of 1-D tensors, entry i of each of the same length.
            scalars: float64 ``[scalars, tensors]``.
            constants: of the pass, the same for all tensors.

        Returns:
            The dot products as float64 ``[products, tensors]``, if there are any.

        Raises:
            RuntimeError: there is no compiler for the fused way, or fused tensors are not on the CPU.
        """
        like = tensors[0][0]
        if fused_wanted:
            return getattr(fused.kernels(like.device), self.fused)(*tensors, **constants)
        columns = [] if scalars is None else [row.unbind() for row in scalars.to(like)]
        owners: list[int] = []  # of each row of dot products, the tensor it belongs to
        rows: list[tuple[Tensor, ...]] = []
        for members, lists in _windows(tensors, range(len(tensors[0]))):
            owners += members
            found = self.foreach(*lists, *([s[i] for i in members] for s in columns), **constants)
            rows += zip(*found, strict=True) if found is not None else [None] * len(members)
        return None if rows[0] is None else _total(owners, rows, len(tensors[0]))


def _blocks(tensors: Sequence[list[Tensor]], members: Sequence[int]) -> Iterator[tuple[int, list[Tensor]]]:
    """Each tensor in turn, cut into blocks where it is on the CPU and longer than one."""
    for i in members:
        row = [t[i] for t in tensors]
        if row[0].numel() <= BLOCK or row[0].device.type != "cpu":
            yield i, row
        else:
            for pieces in zip(*(t.split(BLOCK) for t in row), strict=True):
                yield i, list(pieces)


def _windows(tensors: Sequence[list[Tensor]], members: Sequence[int]) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Lists of consecutive blocks that have at most a block's length together; off the CPU, everything at once."""
    owners: list[int] = []
    rows: list[list[Tensor]] = []
    length = 0
    for i, row in _blocks(tensors, members):
        if rows and row[0].device.type == "cpu" and length + row[0].numel() > BLOCK:
            yield owners, [list(column) for column in zip(*rows, strict=True)]
            owners, rows, length = [], [], 0
        owners.append(i)
        rows.append(row)
        length += row[0].numel()
    if rows:
        yield owners, [list(column) for column in zip(*rows, strict=True)]


def _total(owners: list[int], rows: list[tuple[Tensor, ...]], n: int) -> Tensor:
    """Sum the rows of each tensor: float64 ``[k, n]``."""
    if len(rows) == n:
        rows = [row for _, row in sorted(zip(owners, rows, strict=True), key=lambda pair: pair[0])]
    table = torch.stack([value for row in rows for value in row]).double().view(len(rows), -1)
    if len(rows) > n:  # blocks, so on the CPU
        table = table.new_zeros(n, table.shape[1]).index_add_(0, torch.tensor(owners), table)
    return table.T
