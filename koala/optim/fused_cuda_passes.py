"""Triton kernels that pass over the memory of many tensors, for every filter: measure and apply, a program a chunk.

:mod:`koala.optim.fused_cuda` launches them and describes their tables. Inputs of products and moves are counted
x, g, h, buffers, and h = g + decay x is formed in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_of(addresses, chunk, columns, BUFFERS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The chunk's column, its length, how much of it comes in whole aligned blocks, and where its tensors begin."""
    column = tl.load(chunk)
    begin = tl.load(chunk + 1) * (DTYPE.primitive_bitwidth // 8)
    length = tl.load(chunk + 2)
    starts = ()
    together = begin
    for k in tl.static_range(2 + BUFFERS):
        address = tl.load(addresses + k * columns + column)
        start = tl.where(address == 0, 0, address + begin)
        starts = starts + (start,)
        together |= start
    aligned = tl.where(together % 16 == 0, length // BLOCK * BLOCK, 0)
    return column, length, aligned, starts


@triton.jit
def tile_of(first, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Positions [LANES, VECTOR] of a block that begins at ``first``: each lane has VECTOR neighbours."""
    return first + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load(start, tile, length, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A tile of a tensor; 0 beyond its end. Blocks that are ``ALIGNED`` are full, and read 128 bits at a time."""
    if ALIGNED:
        return tl.load(tl.multiple_of(start.to(tl.pointer_type(DTYPE)), 16) + tile)
    return tl.load(start.to(tl.pointer_type(DTYPE)) + tile, mask=tile < length, other=0.0)


@triton.jit
def store(start, tile, length, value, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The inverse of :func:`load`; writes nothing beyond the end."""
    if ALIGNED:
        tl.store(tl.multiple_of(start.to(tl.pointer_type(DTYPE)), 16) + tile, value.to(DTYPE))
    else:
        tl.store(start.to(tl.pointer_type(DTYPE)) + tile, value.to(DTYPE), mask=tile < length)


@triton.jit
def is_last(counter, count):
    """Whether this program is the last of ``count``; what the others stored before is then visible to it."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def ordered_sum(values, count, LANES: tl.constexpr):
    """Their sum, in an order that depends on ``count`` alone."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for i in range(0, count, LANES):
        total += tl.load(values + i + lanes, mask=i + lanes < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _add_products(sums, starts, decay, tile, length, PAIRS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """``sums``, one [LANES] for each of PAIRS, with the products of a tile added, in float64."""
    g = load(starts[1], tile, length, DTYPE, ALIGNED).to(tl.float64)
    x = load(starts[0], tile, length, DTYPE, ALIGNED).to(tl.float64)
    inputs = (x, g, g + decay * x)
    for k in tl.static_range(2, len(starts)):
        inputs = inputs + (load(starts[k], tile, length, DTYPE, ALIGNED).to(tl.float64),)
    added = ()
    for k in tl.static_range(len(PAIRS)):
        added = added + (sums[k] + tl.sum(inputs[PAIRS[k][0]] * inputs[PAIRS[k][1]], 1),)
    return added


@triton.jit
def measure(
    addresses, chunks, present, group, decays, partials, counters, rows, columns, count, n,
    PAIRS: tl.constexpr, BUFFERS: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Row 0: is there a gradient; row 1 + k: the dot product PAIRS[k] of inputs (x, g, h, buffers)."""
    BLOCK: tl.constexpr = LANES * VECTOR
    chunk = chunks + 5 * tl.program_id(0)
    column, length, aligned, starts = chunk_of(addresses, chunk, columns, BUFFERS, DTYPE, BLOCK)
    decay = tl.load(decays + tl.load(group + column))
    missing = starts[1] == 0
    length, aligned = tl.where(missing, 0, length), tl.where(missing, 0, aligned)
    sums = ()
    for _ in tl.static_range(len(PAIRS)):
        sums = sums + (tl.zeros([LANES], tl.float64),)
    for i in range(0, aligned, BLOCK):
        sums = _add_products(sums, starts, decay, tile_of(i, LANES, VECTOR), length, PAIRS, DTYPE, True)
    for i in range(aligned, length, BLOCK):
        sums = _add_products(sums, starts, decay, tile_of(i, LANES, VECTOR), length, PAIRS, DTYPE, False)
    program = tl.program_id(0)
    for k in tl.static_range(len(PAIRS)):
        tl.store(partials + k * count + program, tl.sum(sums[k], 0))
    first, pieces = tl.load(chunk + 3), tl.load(chunk + 4)
    if is_last(counters + column, pieces):
        tl.store(rows + column, tl.load(present + column))
        for k in tl.static_range(len(PAIRS)):
            total = ordered_sum(partials + k * count + first, pieces, LANES)
            if PAIRS[k][0] == 0:  # x.x, which is not wanted without decay
                total = tl.where(decay == 0, 0.0, total)
            tl.store(rows + (1 + k) * n + column, total)


@triton.jit
def _move(
    starts, factors, gate, decay, tile, length,
    MOVES: tl.constexpr, ANYWAY: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Writes a tile of every output, from old values. Where ``gate`` is closed only buffer ANYWAY is written."""
    WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    x = load(starts[0], tile, length, DTYPE, ALIGNED).to(WORK)
    g = load(tl.where(starts[1] == 0, starts[0], starts[1]), tile, length, DTYPE, ALIGNED).to(WORK)
    inputs = (x, g, tl.where(gate, g + decay.to(WORK) * x, 0.0))
    for k in tl.static_range(2, len(starts)):
        inputs = inputs + (load(starts[k], tile, length, DTYPE, ALIGNED).to(WORK),)
    for m in tl.static_range(len(MOVES)):
        value = x if MOVES[m][0] == 0 else tl.zeros_like(x)
        for k in tl.static_range(len(MOVES[m][2])):
            value += factors[MOVES[m][1] + k].to(WORK) * inputs[MOVES[m][2][k]]
        start = starts[0 if MOVES[m][0] == 0 else MOVES[m][0] - 1]
        if ANYWAY < 0 or MOVES[m][0] == ANYWAY or gate:
            store(start, tile, length, value, DTYPE, ALIGNED)


@triton.jit
def apply(
    addresses, chunks, group, decays, coefficients, columns, n,
    MOVES: tl.constexpr, FACTORS: tl.constexpr, ANYWAY: tl.constexpr,
    BUFFERS: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """x += and buffer = the sums of factor * input that MOVES lists: (output, its first factor, inputs)."""
    BLOCK: tl.constexpr = LANES * VECTOR
    chunk = chunks + 5 * tl.program_id(0)
    column, length, aligned, starts = chunk_of(addresses, chunk, columns, BUFFERS, DTYPE, BLOCK)
    decay = tl.load(decays + tl.load(group + column))
    gate = tl.load(coefficients + column) != 0
    if ANYWAY < 0:
        length = tl.where(gate, length, 0)
        aligned = tl.where(gate, aligned, 0)
    factors = ()
    for k in tl.static_range(FACTORS):
        factors = factors + (tl.load(coefficients + (1 + k) * n + column),)
    for i in range(0, aligned, BLOCK):
        _move(starts, factors, gate, decay, tile_of(i, LANES, VECTOR), length, MOVES, ANYWAY, DTYPE, True)
    for i in range(aligned, length, BLOCK):
        _move(starts, factors, gate, decay, tile_of(i, LANES, VECTOR), length, MOVES, ANYWAY, DTYPE, False)


@triton.jit
def nothing(anything):
    """To see whether Triton works."""
    tl.store(anything, 1.0)
