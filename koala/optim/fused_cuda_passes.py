"""Triton kernels that pass over the memory of many tensors: predict, measure and apply, a program a chunk.

:mod:`koala.optim.fused_cuda` launches them and says what is in their tables. Inputs of products and moves are counted
x, g, h, buffers, and h = g + decay x is formed in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _chunk(addresses, chunk, columns, BUFFERS: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
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
    whole = tl.where(together % 16 == 0, length // BLOCK * BLOCK, 0)
    return column, length, whole, starts


@triton.jit
def _tile(first, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return first + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _load(start, tile, length, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """A tile of a tensor. Whole tiles are aligned, and read 128 bits at a time."""
    if WHOLE:
        return tl.load(tl.multiple_of(start.to(tl.pointer_type(DTYPE)), 16) + tile)
    return tl.load(start.to(tl.pointer_type(DTYPE)) + tile, mask=tile < length, other=0.0)


@triton.jit
def _store(start, tile, length, value, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(tl.multiple_of(start.to(tl.pointer_type(DTYPE)), 16) + tile, value.to(DTYPE))
    else:
        tl.store(start.to(tl.pointer_type(DTYPE)) + tile, value.to(DTYPE), mask=tile < length)


@triton.jit
def _is_last(counter, count):
    """Whether this program is the last of ``count``; what the others stored before is then visible to it."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _sum(values, count, LANES: tl.constexpr):
    """Their sum, in an order that depends on ``count`` alone."""
    lanes = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float64)
    for i in range(0, count, LANES):
        total += tl.load(values + i + lanes, mask=i + lanes < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def _add_products(sums, starts, decay, tile, length, PAIRS: tl.constexpr, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    g = _load(starts[1], tile, length, DTYPE, WHOLE).to(tl.float64)
    x = _load(starts[0], tile, length, DTYPE, WHOLE).to(tl.float64)
    inputs = (x, g, g + decay * x)
    for k in tl.static_range(2, len(starts)):
        inputs = inputs + (_load(starts[k], tile, length, DTYPE, WHOLE).to(tl.float64),)
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
    column, length, whole, starts = _chunk(addresses, chunk, columns, BUFFERS, DTYPE, BLOCK)
    decay = tl.load(decays + tl.load(group + column))
    missing = starts[1] == 0
    length, whole = tl.where(missing, 0, length), tl.where(missing, 0, whole)
    sums = ()
    for _ in tl.static_range(len(PAIRS)):
        sums = sums + (tl.zeros([LANES], tl.float64),)
    for i in range(0, whole, BLOCK):
        sums = _add_products(sums, starts, decay, _tile(i, LANES, VECTOR), length, PAIRS, DTYPE, True)
    for i in range(whole, length, BLOCK):
        sums = _add_products(sums, starts, decay, _tile(i, LANES, VECTOR), length, PAIRS, DTYPE, False)
    program = tl.program_id(0)
    for k in tl.static_range(len(PAIRS)):
        tl.store(partials + k * count + program, tl.sum(sums[k], 0))
    first, pieces = tl.load(chunk + 3), tl.load(chunk + 4)
    if _is_last(counters + column, pieces):
        tl.store(rows + column, tl.load(present + column))
        for k in tl.static_range(len(PAIRS)):
            total = _sum(partials + k * count + first, pieces, LANES)
            if PAIRS[k][0] == 0:  # x.x, which is not wanted without decay
                total = tl.where(decay == 0, 0.0, total)
            tl.store(rows + (1 + k) * n + column, total)


@triton.jit
def _add_move(total, starts, tile, length, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    x = _load(starts[0], tile, length, DTYPE, WHOLE).to(WORK)
    velocity = _load(starts[2], tile, length, DTYPE, WHOLE).to(WORK)
    gap = _load(starts[3], tile, length, DTYPE, WHOLE).to(tl.float64) - x.to(tl.float64)
    _store(starts[0], tile, length, x + velocity, DTYPE, WHOLE)
    return total + tl.sum(gap * gap, 1)


@triton.jit
def predict(
    addresses, chunks, shares, state, frozen, partials, counter, columns, before, all_chunks,
    GO: tl.constexpr, DRIFT: tl.constexpr, SHARED: tl.constexpr,
    DTYPE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """KOALA-M: x += velocity, and the drift |average - x|^2 before it; nothing where the last update said no go."""
    BLOCK: tl.constexpr = LANES * VECTOR
    chunk = chunks + 5 * tl.program_id(0)
    column, length, whole, starts = _chunk(addresses, chunk, columns, 2, DTYPE, BLOCK)
    go = tl.load(state + GO) != 0
    length = tl.where(go, length, 0)
    whole = tl.where(go, whole, 0)
    total = tl.zeros([LANES], tl.float64)
    for i in range(0, whole, BLOCK):
        total = _add_move(total, starts, _tile(i, LANES, VECTOR), length, DTYPE, True)
    for i in range(whole, length, BLOCK):
        total = _add_move(total, starts, _tile(i, LANES, VECTOR), length, DTYPE, False)
    drift = tl.sum(total, 0)
    if SHARED:
        drift *= tl.load(shares + column)
    tl.store(partials + before + tl.program_id(0), drift)
    if _is_last(counter, all_chunks):
        drift = _sum(partials, all_chunks, LANES) + tl.load(frozen)
        tl.store(state + DRIFT, drift, mask=go)


@triton.jit
def _move(
    starts, factors, gate, decay, tile, length,
    MOVES: tl.constexpr, ANYWAY: tl.constexpr, DTYPE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    x = _load(starts[0], tile, length, DTYPE, WHOLE).to(WORK)
    g = _load(tl.where(starts[1] == 0, starts[0], starts[1]), tile, length, DTYPE, WHOLE).to(WORK)
    inputs = (x, g, tl.where(gate, g + decay.to(WORK) * x, 0.0))
    for k in tl.static_range(2, len(starts)):
        inputs = inputs + (_load(starts[k], tile, length, DTYPE, WHOLE).to(WORK),)
    for m in tl.static_range(len(MOVES)):
        value = x if MOVES[m][0] == 0 else tl.zeros_like(x)
        for k in tl.static_range(len(MOVES[m][2])):
            value += factors[MOVES[m][1] + k].to(WORK) * inputs[MOVES[m][2][k]]
        start = starts[0 if MOVES[m][0] == 0 else MOVES[m][0] - 1]
        if ANYWAY < 0 or MOVES[m][0] == ANYWAY or gate:
            _store(start, tile, length, value, DTYPE, WHOLE)


@triton.jit
def apply(
    addresses, chunks, group, decays, coefficients, columns, n,
    MOVES: tl.constexpr, FACTORS: tl.constexpr, ANYWAY: tl.constexpr,
    BUFFERS: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """x += and buffer = the sums of factor * input that MOVES lists: (output, its first factor, inputs)."""
    BLOCK: tl.constexpr = LANES * VECTOR
    chunk = chunks + 5 * tl.program_id(0)
    column, length, whole, starts = _chunk(addresses, chunk, columns, BUFFERS, DTYPE, BLOCK)
    decay = tl.load(decays + tl.load(group + column))
    gate = tl.load(coefficients + column) != 0
    if ANYWAY < 0:
        length = tl.where(gate, length, 0)
        whole = tl.where(gate, whole, 0)
    factors = ()
    for k in tl.static_range(FACTORS):
        factors = factors + (tl.load(coefficients + (1 + k) * n + column),)
    for i in range(0, whole, BLOCK):
        _move(starts, factors, gate, decay, _tile(i, LANES, VECTOR), length, MOVES, ANYWAY, DTYPE, True)
    for i in range(whole, length, BLOCK):
        _move(starts, factors, gate, decay, _tile(i, LANES, VECTOR), length, MOVES, ANYWAY, DTYPE, False)


@triton.jit
def _recalibrate(
    starts, lr, decay, debias, B, constants, tile, length, DTYPE: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    beta1, beta2 = tl.load(constants).to(WORK), tl.load(constants + 1).to(WORK)
    eps, gamma = tl.load(constants + 2).to(WORK), tl.load(constants + 3).to(WORK)
    x = _load(starts[0], tile, length, DTYPE, WHOLE).to(WORK)
    g = _load(starts[1], tile, length, DTYPE, WHOLE).to(WORK)
    m = _load(starts[2], tile, length, DTYPE, WHOLE).to(WORK)
    s = _load(starts[3], tile, length, DTYPE, WHOLE).to(WORK)
    if tl.load(constants + 5) != 0:
        x -= lr * decay * x
    else:
        g += decay * x
    m += (1 - beta1) * (g - m)
    s += (1 - beta2) * ((g - m) * (g - m) - s)
    mean = m * debias
    r = g - mean
    gain = s / (s + B * r * r + tl.where(tl.load(constants + 4) == 0, B * eps, eps))
    power = tl.where(gamma == 0.5, tl.sqrt(gain), tl.where(gamma == 1, gain, tl.exp2(gamma * tl.log2(gain))))
    u = mean + power * r
    u = tl.where(tl.load(constants + 6) == 0, u, tl.where(u > 0, 1.0, tl.where(u < 0, -1.0, 0.0)))
    _store(starts[0], tile, length, x - lr * u, DTYPE, WHOLE)
    _store(starts[2], tile, length, m, DTYPE, WHOLE)
    _store(starts[3], tile, length, s, DTYPE, WHOLE)


@triton.jit
def apply_sgdf(
    addresses, chunks, coefficients, constants, columns, n,
    DTYPE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """SGDF's step, which is not linear. Constants: beta1, beta2, eps, gamma, eps_reading, weight_decouple, use_sign."""
    BLOCK: tl.constexpr = LANES * VECTOR
    WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    column, length, whole, starts = _chunk(addresses, chunks + 5 * tl.program_id(0), columns, 2, DTYPE, BLOCK)
    gate = tl.load(coefficients + column) != 0
    length, whole = tl.where(gate, length, 0), tl.where(gate, whole, 0)
    lr, decay = tl.load(coefficients + n + column).to(WORK), tl.load(coefficients + 2 * n + column).to(WORK)
    debias, B = tl.load(coefficients + 3 * n + column).to(WORK), tl.load(coefficients + 4 * n + column).to(WORK)
    for i in range(0, whole, BLOCK):
        _recalibrate(starts, lr, decay, debias, B, constants, _tile(i, LANES, VECTOR), length, DTYPE, True)
    for i in range(whole, length, BLOCK):
        _recalibrate(starts, lr, decay, debias, B, constants, _tile(i, LANES, VECTOR), length, DTYPE, False)


@triton.jit
def nothing(anything):
    """To see whether Triton works."""
    tl.store(anything, 1.0)
