"""Triton kernels of SGDF, as in sgdf.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_cuda_gains import gate_of, rates, row, set_rows
from .fused_cuda_passes import chunk_of, load, store, tile_of

COEFFICIENTS = 5  # rows: gate, lr, decay, 1 / (1 - beta1^t), B


@triton.jit
def gains(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State skipped; scalars t; constants: beta1, beta2."""
    beta1, beta2 = tl.load(constants), tl.load(constants + 1)
    bad = 0.0 * beta1
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, decay = rates(hyper, group, groups, columns, n)
        gate, broken = gate_of(rows, columns, n, 0.0 * beta1, 3)
        long = row(rows, 2, columns, n) > 1e36  # LONGEST of sgdf.py, squared
        gate, broken = gate & ~long, tl.maximum(broken, tl.max(tl.where(long, 1.0, 0.0)))
        on = tl.where(gate, 1.0, 0.0).to(tl.float64)
        t = row(scalars, 0, columns, n) + on
        power1, power2 = tl.exp(t * tl.log(beta1)), tl.exp(t * tl.log(beta2))
        B = (1 + beta1) * (1 - power2) / ((1 - beta1) * (1 - power1 * power1))
        set_rows(coefficients, columns, n, columns < n, (on, lr, decay, 1 / (1 - power1), B))
        set_rows(scalars, columns, n, gate, (t,))
        bad = tl.maximum(bad, broken)
    tl.store(state, tl.load(state) + bad)


@triton.jit
def _recalibrate(
    starts, lr, decay, debias, B, constants, tile, length, DTYPE: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """The step on a tile: its x, m and s are written."""
    WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    beta1, beta2 = tl.load(constants).to(WORK), tl.load(constants + 1).to(WORK)
    eps, gamma = tl.load(constants + 2).to(WORK), tl.load(constants + 3).to(WORK)
    x = load(starts[0], tile, length, DTYPE, ALIGNED).to(WORK)
    g = load(starts[1], tile, length, DTYPE, ALIGNED).to(WORK)
    m = load(starts[2], tile, length, DTYPE, ALIGNED).to(WORK)
    s = load(starts[3], tile, length, DTYPE, ALIGNED).to(WORK)
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
    store(starts[0], tile, length, x - lr * u, DTYPE, ALIGNED)
    store(starts[2], tile, length, m, DTYPE, ALIGNED)
    store(starts[3], tile, length, s, DTYPE, ALIGNED)


@triton.jit
def apply(
    addresses, chunks, coefficients, constants, columns, n,
    DTYPE: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The step, which is not linear. Constants: beta1, beta2, eps, gamma, eps_reading, weight_decouple, use_sign."""
    BLOCK: tl.constexpr = LANES * VECTOR
    WORK: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    column, length, aligned, starts = chunk_of(addresses, chunks + 5 * tl.program_id(0), columns, 2, DTYPE, BLOCK)
    gate = tl.load(coefficients + column) != 0
    length, aligned = tl.where(gate, length, 0), tl.where(gate, aligned, 0)
    lr, decay = tl.load(coefficients + n + column).to(WORK), tl.load(coefficients + 2 * n + column).to(WORK)
    debias, B = tl.load(coefficients + 3 * n + column).to(WORK), tl.load(coefficients + 4 * n + column).to(WORK)
    for i in range(0, aligned, BLOCK):
        _recalibrate(starts, lr, decay, debias, B, constants, tile_of(i, LANES, VECTOR), length, DTYPE, True)
    for i in range(aligned, length, BLOCK):
        _recalibrate(starts, lr, decay, debias, B, constants, tile_of(i, LANES, VECTOR), length, DTYPE, False)
