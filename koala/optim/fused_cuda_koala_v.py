"""Triton kernels of KOALA-V, as in koala_v.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_cuda_gains import TINY, gate_of, noise, rates, row, set_rows


@triton.jit
def gains(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State R, s, go, skipped, gain; constants 4: direction."""
    loss, R, valid, least = noise(state, constants, sums)
    s = tl.load(state + 1)
    largest, bad = 0.0 * s, 0.0 * s
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, decay = rates(hyper, group, groups, columns, n)
        hh, xx = row(rows, 2, columns, n), row(rows, 3, columns, n)
        gate, broken = gate_of(rows, columns, n, least, 4)
        step = tl.where(gate, s / tl.maximum(s * hh + R, TINY) * lr * (loss + 0.5 * decay * xx), 0.0)
        along_x = tl.where(tl.load(constants + 4) == 0, step * decay, 0.0 * step)
        set_rows(coefficients, columns, n, columns < n, (tl.where(gate, 1.0, 0.0), -step, along_x))
        largest, bad = tl.maximum(largest, tl.max(tl.where(gate, hh, 0.0), 0)), tl.maximum(bad, broken)
    floor = tl.maximum(R, TINY)
    S = s * largest + floor
    set_rows(state, 0, 1, valid, (R, s * (floor / S)))
    tl.store(state + 4, s * largest / S, mask=valid)
    tl.store(state + 2, tl.where(valid, 1.0, 0.0))
    tl.store(state + 3, tl.load(state + 3) + tl.where(valid, bad, 1.0))
