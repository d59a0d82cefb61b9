"""The filters' updates on CUDA and ROCm, by Triton: one launch serves all tensors of a dtype.

A step is ``predict`` (if that moves weights), ``measure``, ``gains`` and ``apply``, over tables that stay on the
device: addresses, chunks of at most so many elements, hyper-parameters. A table is written again only when what it
holds has changed, and nothing is read back. ``measure`` leaves a partial sum a chunk, and the last program of a tensor
adds them in their order, so that sums do not depend on which program ran when.

With TRITON_INTERPRET=1 the same kernels run on tensors of the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import fused_cuda_passes as passes
from .layout import Bucket, Layout

name = "triton"
LANES = 128  # threads of a program
PROGRAMS = 2048  # about as many chunks are made of a large model
SHORTEST = 1 << 12  # elements; a chunk has a multiple of them
TILE = 512  # columns that gains work on at a time
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.cache
def kernels_of(kernel: str) -> ModuleType | None:
    """The module of a filter's kernels: ``gains``, and ``predict`` and ``apply`` where it has its own."""
    if importlib.util.find_spec(f"{__package__}.fused_cuda_{kernel}") is None:
        return None
    return importlib.import_module(f"{__package__}.fused_cuda_{kernel}")


class _Part:
    """The tables of one bucket.

    Attributes:
        addresses: int64 ``[2 + buffers, tensors]``, where weights, gradients and buffers begin; 0: there is none.
        chunks: int64 ``[count, 5]``: column, begin and length of each, first and number of the chunks of its tensor.
        counters: int32 ``[tensors]``: chunks of a tensor that are done; zeros between launches.
        partials: float64 ``[products, count]``.
    """

    def __init__(self, bucket: Bucket, layout: Layout, products: int) -> None:
        dtype = TYPES[bucket.dtype]
        vector = min(32 * 8 // dtype.primitive_bitwidth, 8)  # a thread takes one or two times 128 bits of each tensor
        self.options = {
            "DTYPE": dtype, "LANES": LANES, "VECTOR": vector, "num_warps": LANES // 32, "enable_fp_fusion": True
        }  # fmt: skip
        longest = -(-max(sum(bucket.lengths), 1) // (PROGRAMS * SHORTEST)) * SHORTEST
        chunks: list[tuple[int, ...]] = []
        for column, length in enumerate(bucket.lengths):
            begins = range(0, max(length, 1), longest)
            first = len(chunks)
            chunks += [(column, begin, min(longest, length - begin), first, len(begins)) for begin in begins]
        self.count, self.tensors = len(chunks), len(bucket.lengths)
        self.columns = bucket.columns
        self.chunks = torch.tensor(chunks, device=layout.device)
        self.counters = torch.zeros(self.tensors, dtype=torch.int32, device=layout.device)
        self.partials = torch.empty(products, self.count, dtype=torch.float64, device=layout.device)
        self.group = layout.group[bucket.columns]
        self.shares = None if layout.shares is None else layout.shares[bucket.columns]
        self.gradients: list[int] | None = None
        self.addresses: Tensor | None = None
        self.spare: Tensor | None = None

    def follow(self, bucket: Bucket) -> None:
        """Write the addresses anew if gradients have moved. (If anything else has, there is another layout.)"""
        gradients = bucket.gradient_addresses
        if gradients == self.gradients:
            return
        self.gradients = gradients
        table, device = torch.tensor(bucket.addresses(), device="cpu"), bucket.device
        if device.type == "cpu":
            self.addresses = table
        elif torch.cuda.is_current_stream_capturing() and self.spare is not None:
            # The copy becomes a part of the graph and reads its source at every replay: memory of its own, made before.
            self.addresses = self.spare.copy_(table).to(device, non_blocking=True)
            CAPTURED.append(self.spare)
            self.spare = None
        else:
            self.addresses = table.pin_memory().to(device, non_blocking=True)
            self.spare = torch.empty_like(table, pin_memory=True) if self.spare is None else self.spare


class _Tables:
    """All that the steps over one layout need beside its tensors."""

    def __init__(self, optimizer: Any, layout: Layout) -> None:
        inputs = {name: i for i, name in enumerate(("x", "g", "h", *optimizer.buffers))}
        self.pairs = tuple((inputs[a], inputs[b]) for a, b in optimizer.products)
        self.moves: tuple = ()
        self.factors = 0
        for output, terms in optimizer.moves.items():
            self.moves += ((inputs[output], self.factors, tuple(inputs[name] for name in terms)),)
            self.factors += len(terms)
        self.anyway = inputs[optimizer.decays_anyway] if optimizer.decays_anyway else -1
        like = {"dtype": torch.float64, "device": layout.device}
        self.parts = [_Part(bucket, layout, len(self.pairs)) for bucket in layout.buckets]
        for part, bucket in zip(self.parts, layout.buckets, strict=True):
            part.follow(bucket)
        self.rows = torch.zeros(1 + len(self.pairs), layout.n, **like)
        rows = getattr(kernels_of(optimizer.kernel), "COEFFICIENTS", 1 + self.factors)
        self.coefficients = torch.zeros(rows, layout.n, **like)
        self.chunks = sum(part.count for part in self.parts)
        self.sums = torch.empty(self.chunks, **like)
        self.summed = torch.zeros(1, dtype=torch.int32, device=layout.device)
        constants = layout.constants(optimizer)
        self.constants = torch.zeros(len(constants), **like)
        self.written: list[float | None] = [None] * len(constants)

    def write(self, constants: list[float]) -> None:
        """The hyper-parameters; what has changed is filled in on the device, which takes no copy."""
        for i, (old, new) in enumerate(zip(self.written, constants, strict=True)):
            if not (old is new or old == new):
                self.constants[i].fill_(new)
        self.written = constants


CAPTURED: list = []  # what the launches of a captured graph point to must outlive it, and nothing tells when it goes


def why_not(optimizer: Any, kernel: str, layout: Layout) -> str | None:
    """Why Triton cannot make these steps, if so."""
    if kernels_of(kernel) is None:
        return f"there is no Triton kernel {kernel}"
    if optimizer.hyper.get("use_muon"):
        return "Triton has no kernel of Newton and Schulz's iteration"
    if len({bucket.device for bucket in layout.buckets} | {layout.device}) > 1:
        return "the model is on several devices"
    if other := {str(bucket.dtype) for bucket in layout.buckets if bucket.dtype not in TYPES}:
        return f"Triton has no kernels for {', '.join(sorted(other))}"
    return _why_not(layout.device)


def predict(optimizer: Any, layout: Layout) -> None:
    """The filter's prediction: weights and buffers of the layout, in place."""
    tables, kernels, before = _tables(optimizer, layout), kernels_of(optimizer.kernel), 0
    with torch.accelerator.device_index(layout.device.index):
        for part in tables.parts:
            kernels.predict[(part.count,)](
                part.addresses, part.chunks, layout.filter if part.shares is None else part.shares, layout.filter,
                optimizer.frozen_sum(layout), tables.sums, tables.summed, part.tensors, before, tables.chunks,
                SHARED=part.shares is not None, **part.options,
            )  # fmt: skip
            before += part.count
    torch.autograd.graph.increment_version(layout.tensors)


def measure(optimizer: Any, layout: Layout) -> Tensor:
    """Rows of the dot products that the filter names, ``[1 + products, n]``, of this rank's tensors."""
    tables = _tables(optimizer, layout)
    for part, bucket in zip(tables.parts, layout.buckets, strict=True):
        part.follow(bucket)
    if layout.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        CAPTURED.append((tables, [part.addresses for part in tables.parts]))
    with torch.accelerator.device_index(layout.device.index):
        for part in tables.parts:
            passes.measure[(part.count,)](
                part.addresses, part.chunks, layout.present[part.columns], part.group, layout.hyper[1],
                part.partials, part.counters, tables.rows[:, part.columns], part.tensors, part.count, layout.n,
                PAIRS=tables.pairs, BUFFERS=len(optimizer.buffers), **part.options,
            )  # fmt: skip
    return tables.rows


def correct(optimizer: Any, layout: Layout, sums: Tensor | None, rows: Tensor | None = None) -> None:
    """The update, in place; ``rows`` where they were summed over ranks, else they are measured here."""
    rows = measure(optimizer, layout) if rows is None else rows
    tables, kernels = _tables(optimizer, layout), kernels_of(optimizer.kernel)
    tables.write(layout.constants(optimizer))
    with torch.accelerator.device_index(layout.device.index):
        kernels.gains[(1,)](
            rows, tables.coefficients, layout.scalars, layout.filter, tables.constants, layout.hyper, layout.group,
            layout.filter if sums is None else sums, layout.n, layout.hyper.shape[1], TILE=TILE,
            enable_fp_fusion=True,
        )  # fmt: skip
        for part in tables.parts:
            coefficients = tables.coefficients[:, part.columns]
            if hasattr(kernels, "apply"):
                kernels.apply[(part.count,)](
                    part.addresses, part.chunks, coefficients, tables.constants, part.tensors, layout.n, **part.options
                )
            else:
                passes.apply[(part.count,)](
                    part.addresses, part.chunks, part.group, layout.hyper[1], coefficients, part.tensors, layout.n,
                    MOVES=tables.moves, FACTORS=tables.factors, ANYWAY=tables.anyway, BUFFERS=len(optimizer.buffers),
                    **part.options,
                )  # fmt: skip
    torch.autograd.graph.increment_version(layout.tensors)


def _tables(optimizer: Any, layout: Layout) -> _Tables:
    if "triton" not in layout.cache:
        layout.cache["triton"] = _Tables(optimizer, layout)
    return layout.cache["triton"]


@functools.cache
def _why_not(device: torch.device) -> str | None:
    """Why Triton does not serve a device. The first time, a kernel is tried there."""
    if not hasattr(triton, "knobs"):
        return "Triton's steps need torch 2.8 or later"
    if device.type != ("cpu" if triton.knobs.runtime.interpret else "cuda"):
        return f"Triton does not serve {device.type}"
    try:
        with torch.accelerator.device_index(device.index):
            passes.nothing[(1,)](torch.zeros(1, device=device))
    except Exception as error:  # of whatever is missing: a compiler, a driver, an architecture
        return f"Triton does not run on {device}: {error}"
    return None
