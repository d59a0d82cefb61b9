"""Triton kernels of KOALA++, as in koala_plus_plus.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_cuda_gains import TINY, constant, gate_of, noise, rates, row, set_rows


@triton.jit
def gains(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State R, skipped; scalars S, HH, vH; constants 4: sigma, q, is_symmetric. An underscore: of the last step."""
    loss, R, valid, least = noise(state, constants, sums)
    sigma, q, symmetric = tl.load(constants + 4), tl.load(constants + 5), tl.load(constants + 6)
    bad = 0.0 * q
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, decay = rates(hyper, group, groups, columns, n)
        HH, xx = row(rows, 2, columns, n), row(rows, 3, columns, n)
        Hv_, HH_ = row(rows, 4, columns, n), row(rows, 5, columns, n)
        S_, H_H_, v_H_ = row(scalars, 0, columns, n), row(scalars, 1, columns, n), row(scalars, 2, columns, n)
        gate, broken = gate_of(rows, columns, n, least, 6)
        fresh = H_H_ == 0  # the first step has H' = H and v' = sigma H
        H_H_, HH_ = tl.where(fresh, HH, H_H_), tl.where(fresh, HH, HH_)
        Hv_, v_H_ = tl.where(fresh, sigma * HH, Hv_), tl.where(fresh, sigma * HH, v_H_)
        S_ = tl.where(fresh, (sigma + q) * HH + R, S_)
        alpha, lam = HH_ / tl.maximum(H_H_, TINY), (Hv_ + q * HH_) / tl.where(S_ == 0, TINY, S_)
        w = tl.where(symmetric == 0, 0.0 * alpha, (Hv_ - v_H_ * alpha) / tl.maximum(H_H_, TINY))
        on_v, on_H_ = alpha - lam, w - q * lam
        vH = on_v * Hv_ + on_H_ * HH_ + q * HH
        S = vH + q * HH + R
        S = tl.where(S == 0, TINY, S)
        on_H = tl.where(fresh, on_v * sigma + on_H_, 0.0) + q  # its v' and H' are not in the buffers
        step = lr * (loss + 0.5 * decay * xx) / S
        on, x = tl.where(gate, 1.0, 0.0), (-step * on_v, -step * on_H_, -step * (on_H + q))
        set_rows(coefficients, columns, n, columns < n, (on,) + x + (on_v, on_H_, on_H, constant(1.0, step)))
        set_rows(scalars, columns, n, gate, (S, HH, vH))
        bad = tl.maximum(bad, broken)
    tl.store(state, R, mask=valid)
    tl.store(state + 1, tl.load(state + 1) + tl.where(valid, bad, 1.0))
