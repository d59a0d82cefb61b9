"""Triton kernels of SOFIM, as in sofim.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_cuda_gains import gate_of, rates, row, set_rows


@triton.jit
def gains(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State t, skipped; constants: beta, rho, precondition."""
    beta, rho = tl.load(constants), tl.load(constants + 1)
    t = tl.load(state) + 1
    MM, Mh, bad = 0.0 * t, 0.0 * t, 0.0 * t  # of the new M = beta M + (1 - beta) h
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        hh, hM, old = row(rows, 2, columns, n), row(rows, 3, columns, n), row(rows, 4, columns, n)
        gate, broken = gate_of(rows, columns, n, 0.0 * t, 5)
        new = beta * beta * old + 2 * beta * (1 - beta) * hM + (1 - beta) * (1 - beta) * hh
        MM += tl.sum(tl.where(gate, new, 0.0), 0)
        Mh += tl.sum(tl.where(gate, beta * hM + (1 - beta) * hh, 0.0), 0)
        set_rows(coefficients, columns, n, columns < n, (tl.where(gate, 1.0, 0.0),))
        bad = tl.maximum(bad, broken)
    correction = 1 - tl.exp(t * tl.log(beta))  # m = M / correction
    mm, mh = tl.maximum(MM, 0.0) / (correction * correction), Mh / correction
    momentum = tl.load(constants + 2) == 0
    on_M = tl.where(momentum, 1 / ((rho + mm) * correction), -mh / ((rho * rho + rho * mm) * correction))
    on_h = tl.where(momentum, 0.0 * rho, 1 / rho)
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, _ = rates(hyper, group, groups, columns, n)
        x = (-lr * on_M * beta, -lr * (on_M * (1 - beta) + on_h))
        set_rows(coefficients + n, columns, n, columns < n, x + (beta, 1 - beta))
    tl.store(state, t)
    tl.store(state + 1, tl.load(state + 1) + bad)
