"""Triton kernels of KOALA-M, as in koala_m.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_cuda_gains import TINY, constant, gate_of, is_finite, noise, rates, row, set_rows
from .fused_cuda_passes import chunk_of, is_last, load, ordered_sum, store, tile_of


@triton.jit
def gains(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State R, P11, P12, P22, qx, drift, go, skipped, gain; constants a, qv, adaptive_q, target, number of weights."""
    loss, R, valid, least = noise(state, constants, sums)
    a, qv, target = tl.load(constants + 4), tl.load(constants + 5), tl.load(constants + 7)
    P11, P12, P22, qx = tl.load(state + 1), tl.load(state + 2), tl.load(state + 3), tl.load(state + 4)
    drift = tl.load(state + 5)
    adapted = 0.9 * qx + 0.1 * tl.sqrt(drift) / tl.load(constants + 8)
    qx = tl.where((tl.load(constants + 6) != 0) & is_finite(drift), adapted, qx)
    P11 += 2 * P12 + P22 + qx
    P12 = a * (P12 + P22)
    P22 = a * a * P22 + qv
    largest, bad = 0.0 * a, 0.0 * a
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, decay = rates(hyper, group, groups, columns, n)
        hh, xx = row(rows, 2, columns, n), row(rows, 3, columns, n)
        gate, broken = gate_of(rows, columns, n, least, 4)
        innovation = tl.where(target == target, target, lr * (loss + 0.5 * decay * xx))
        step = tl.where(gate, innovation / tl.maximum(P11 * hh + R, TINY), 0.0)
        average = (constant(0.9, step), constant(0.1, step), -0.1 * step * P11)
        velocity = (tl.where(valid, a, 1.0), -step * P12)
        on, x = tl.where(gate, 1.0, 0.0), -step * P11
        set_rows(coefficients, columns, n, columns < n, (on,) + average + velocity + (x,))
        largest, bad = tl.maximum(largest, tl.max(tl.where(gate, hh, 0.0), 0)), tl.maximum(bad, broken)
    floor = tl.maximum(R, TINY)
    S = P11 * largest + floor
    shrink = floor / S
    tl.store(state + 8, P11 * largest / S, mask=valid)
    P22 = tl.maximum(P22 - P12 * P12 * (1 - shrink) / tl.maximum(P11, TINY), 0.0)
    set_rows(state, 0, 1, valid, (R, P11 * shrink, P12 * shrink, P22, qx))
    tl.store(state + 6, tl.where(valid, 1.0, 0.0))
    tl.store(state + 7, tl.load(state + 7) + tl.where(valid, bad, 1.0))


@triton.jit
def _add_move(total, starts, tile, length, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Moves a tile of weights by their velocity; ``total`` [LANES] with |average - x|^2 before it added."""
    WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    x = load(starts[0], tile, length, DTYPE, ALIGNED).to(WORK)
    velocity = load(starts[2], tile, length, DTYPE, ALIGNED).to(WORK)
    gap = load(starts[3], tile, length, DTYPE, ALIGNED).to(tl.float64) - x.to(tl.float64)
    store(starts[0], tile, length, x + velocity, DTYPE, ALIGNED)
    return total + tl.sum(gap * gap, 1)


@triton.jit
def predict(
    addresses, chunks, shares, state, frozen, partials, counter, columns, before, all_chunks,
    SHARED: tl.constexpr,
    DTYPE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """x += velocity, and the drift |average - x|^2 before it; nothing after a skipped update, where go is 0."""
    BLOCK: tl.constexpr = LANES * VECTOR
    chunk = chunks + 5 * tl.program_id(0)
    column, length, aligned, starts = chunk_of(addresses, chunk, columns, 2, DTYPE, BLOCK)
    go = tl.load(state + 6) != 0
    length = tl.where(go, length, 0)
    aligned = tl.where(go, aligned, 0)
    total = tl.zeros([LANES], tl.float64)
    for i in range(0, aligned, BLOCK):
        total = _add_move(total, starts, tile_of(i, LANES, VECTOR), length, DTYPE, True)
    for i in range(aligned, length, BLOCK):
        total = _add_move(total, starts, tile_of(i, LANES, VECTOR), length, DTYPE, False)
    drift = tl.sum(total, 0)
    if SHARED:
        drift *= tl.load(shares + column)
    tl.store(partials + before + tl.program_id(0), drift)
    if is_last(counter, all_chunks):
        drift = ordered_sum(partials, all_chunks, LANES) + tl.load(frozen)
        tl.store(state + 5, drift, mask=go)
