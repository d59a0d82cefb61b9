"""Triton kernels of the filters' gains: from dot products to coefficients and new filter state, one program each.

They mirror the filters' own ``gains``, which are the ones to read. Row 0 of the coefficients is the gate; the others
are in the order of the filter's ``moves``.
"""

from __future__ import annotations

import triton
import triton.language as tl

SKIP = tl.constexpr(1e-18)  # the squared norm below which a gradient counts as none
TINY = tl.constexpr(2.2250738585072014e-308)  # keeps 0 / 0 out


@triton.jit
def _row(table, k, columns, n):
    return tl.load(table + k * n + columns, mask=columns < n, other=0.0)


@triton.jit
def _set_rows(table, columns, n, mask, values):
    for k in tl.static_range(len(values)):
        tl.store(table + k * n + columns, values[k], mask=mask)


@triton.jit
def _constant(value, like):
    """A Python number in float64: stored as it is it would pass through float32."""
    return tl.full(like.shape, value, tl.float64)


@triton.jit
def _finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def _rates(hyper, group, groups, columns, n):
    """Learning rate and decay of each column."""
    mine = tl.load(group + columns, mask=columns < n, other=0)
    return tl.load(hyper + mine), tl.load(hyper + groups + mine)


@triton.jit
def _gate(rows, columns, n, least, ROWS: tl.constexpr):
    """Where there is a gradient of at least this squared norm and all is a number; whether some is not, 1 or 0."""
    finite = _finite(_row(rows, 1, columns, n))
    for k in tl.static_range(2, ROWS):
        finite &= _finite(_row(rows, k, columns, n))
    gate = finite & (_row(rows, 0, columns, n) > 0) & (_row(rows, 1, columns, n) >= least)
    return gate, tl.max(tl.where(finite, 0.0, 1.0), 0).to(tl.float64)


@triton.jit
def _noise(state, constants, sums):
    """The loss above its bound, R, whether both are numbers, and what |g|^2 must be at least: beyond all if not."""
    r, alpha, measurement, bound = (
        tl.load(constants), tl.load(constants + 1), tl.load(constants + 2), tl.load(constants + 3)
    )  # fmt: skip
    count = tl.load(sums)
    mean, second = tl.load(sums + 1) / count, tl.load(sums + 2) / count
    reading = tl.where(measurement == 0, tl.maximum(second - 2 * bound * mean + bound * bound, 0.0), 0.0 * mean)
    reading = tl.where(measurement == 1, (mean - bound) * (mean - bound), reading)
    reading = tl.where(measurement == 2, tl.maximum(second - mean * mean, 0.0), reading)
    R = tl.where(r == r, r, alpha * tl.load(state) + (1 - alpha) * reading)  # r is nan where it is not constant
    whole = _finite(mean) & _finite(second) & _finite(R)
    return tl.maximum(mean - bound, 0.0), R, whole, tl.where(whole, SKIP, float("inf"))


@triton.jit
def koala_v(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State R, s, go, skipped; constants 4: direction."""
    loss, R, whole, least = _noise(state, constants, sums)
    s = tl.load(state + 1)
    largest, bad = 0.0 * s, 0.0 * s
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, decay = _rates(hyper, group, groups, columns, n)
        hh, xx = _row(rows, 2, columns, n), _row(rows, 3, columns, n)
        gate, broken = _gate(rows, columns, n, least, 4)
        step = tl.where(gate, s / tl.maximum(s * hh + R, TINY) * lr * (loss + 0.5 * decay * xx), 0.0)
        along_x = tl.where(tl.load(constants + 4) == 0, step * decay, 0.0 * step)
        _set_rows(coefficients, columns, n, columns < n, (tl.where(gate, 1.0, 0.0), -step, along_x))
        largest, bad = tl.maximum(largest, tl.max(tl.where(gate, hh, 0.0), 0)), tl.maximum(bad, broken)
    _set_rows(state, 0, 1, whole, (R, s * (R / tl.maximum(s * largest + R, TINY))))
    tl.store(state + 2, tl.where(whole, 1.0, 0.0))
    tl.store(state + 3, tl.load(state + 3) + tl.where(whole, bad, 1.0))


@triton.jit
def koala_m(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State R, P11, P12, P22, qx, drift, go, skipped; constants 4: a, qv, adaptive_q, target, number of weights."""
    loss, R, whole, least = _noise(state, constants, sums)
    a, qv, target = tl.load(constants + 4), tl.load(constants + 5), tl.load(constants + 7)
    P11, P12, P22, qx = tl.load(state + 1), tl.load(state + 2), tl.load(state + 3), tl.load(state + 4)
    drift = tl.load(state + 5)
    adapted = 0.9 * qx + 0.1 * tl.sqrt(drift) / tl.load(constants + 8)
    qx = tl.where((tl.load(constants + 6) != 0) & _finite(drift), adapted, qx)
    P11 += 2 * P12 + P22 + qx
    P12 = a * (P12 + P22)
    P22 = a * a * P22 + qv
    largest, bad = 0.0 * a, 0.0 * a
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, decay = _rates(hyper, group, groups, columns, n)
        hh, xx = _row(rows, 2, columns, n), _row(rows, 3, columns, n)
        gate, broken = _gate(rows, columns, n, least, 4)
        innovation = tl.where(target == target, target, lr * (loss + 0.5 * decay * xx))
        step = tl.where(gate, innovation / tl.maximum(P11 * hh + R, TINY), 0.0)
        average = (_constant(0.9, step), _constant(0.1, step), -0.1 * step * P11)
        velocity = (tl.where(whole, a, 1.0), -step * P12)
        on, x = tl.where(gate, 1.0, 0.0), -step * P11
        _set_rows(coefficients, columns, n, columns < n, (on,) + average + velocity + (x,))
        largest, bad = tl.maximum(largest, tl.max(tl.where(gate, hh, 0.0), 0)), tl.maximum(bad, broken)
    shrink = R / tl.maximum(P11 * largest + R, TINY)
    P22 = tl.maximum(P22 - P12 * P12 * (1 - shrink) / tl.maximum(P11, TINY), 0.0)
    _set_rows(state, 0, 1, whole, (R, P11 * shrink, P12 * shrink, P22, qx))
    tl.store(state + 6, tl.where(whole, 1.0, 0.0))
    tl.store(state + 7, tl.load(state + 7) + tl.where(whole, bad, 1.0))


@triton.jit
def koala_plus_plus(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State R, skipped; scalars S, HH, vH; constants 4: sigma, q, is_symmetric. An underscore: of the last step."""
    loss, R, whole, least = _noise(state, constants, sums)
    sigma, q, symmetric = tl.load(constants + 4), tl.load(constants + 5), tl.load(constants + 6)
    bad = 0.0 * q
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, decay = _rates(hyper, group, groups, columns, n)
        HH, xx = _row(rows, 2, columns, n), _row(rows, 3, columns, n)
        Hv_, HH_ = _row(rows, 4, columns, n), _row(rows, 5, columns, n)
        S_, H_H_, v_H_ = _row(scalars, 0, columns, n), _row(scalars, 1, columns, n), _row(scalars, 2, columns, n)
        gate, broken = _gate(rows, columns, n, least, 6)
        fresh = H_H_ == 0  # the first step has H' = H and v' = sigma H
        H_H_, HH_ = tl.where(fresh, HH, H_H_), tl.where(fresh, HH, HH_)
        Hv_, v_H_ = tl.where(fresh, sigma * HH, Hv_), tl.where(fresh, sigma * HH, v_H_)
        S_ = tl.where(fresh, (sigma + q) * HH + R, S_)
        alpha, lam = HH_ / tl.maximum(H_H_, TINY), (Hv_ + q * HH_) / tl.maximum(S_, TINY)
        w = tl.where(symmetric == 0, 0.0 * alpha, (Hv_ - v_H_ * alpha) / tl.maximum(H_H_, TINY))
        on_v, on_H_ = alpha - lam, w - q * lam
        vH = on_v * Hv_ + on_H_ * HH_ + q * HH
        S = tl.maximum(vH + q * HH + R, TINY)
        on_H = tl.where(fresh, on_v * sigma + on_H_, 0.0) + q  # its v' and H' are not in the buffers
        step = lr * (loss + 0.5 * decay * xx) / S
        on, x = tl.where(gate, 1.0, 0.0), (-step * on_v, -step * on_H_, -step * (on_H + q))
        _set_rows(coefficients, columns, n, columns < n, (on,) + x + (on_v, on_H_, on_H, _constant(1.0, step)))
        _set_rows(scalars, columns, n, gate, (S, HH, vH))
        bad = tl.maximum(bad, broken)
    tl.store(state, R, mask=whole)
    tl.store(state + 1, tl.load(state + 1) + tl.where(whole, bad, 1.0))


@triton.jit
def sofim(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State t, skipped; constants: beta, rho, precondition."""
    beta, rho = tl.load(constants), tl.load(constants + 1)
    t = tl.load(state) + 1
    MM, Mh, bad = 0.0 * t, 0.0 * t, 0.0 * t  # of the new M = beta M + (1 - beta) h
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        hh, hM, old = _row(rows, 2, columns, n), _row(rows, 3, columns, n), _row(rows, 4, columns, n)
        gate, broken = _gate(rows, columns, n, 0.0 * t, 5)
        new = beta * beta * old + 2 * beta * (1 - beta) * hM + (1 - beta) * (1 - beta) * hh
        MM += tl.sum(tl.where(gate, new, 0.0), 0)
        Mh += tl.sum(tl.where(gate, beta * hM + (1 - beta) * hh, 0.0), 0)
        _set_rows(coefficients, columns, n, columns < n, (tl.where(gate, 1.0, 0.0),))
        bad = tl.maximum(bad, broken)
    correction = 1 - tl.exp(t * tl.log(beta))  # m = M / correction
    mm, mh = tl.maximum(MM, 0.0) / (correction * correction), Mh / correction
    momentum = tl.load(constants + 2) == 0
    on_M = tl.where(momentum, 1 / ((rho + mm) * correction), -mh / ((rho * rho + rho * mm) * correction))
    on_h = tl.where(momentum, 0.0 * rho, 1 / rho)
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, _ = _rates(hyper, group, groups, columns, n)
        x = (-lr * on_M * beta, -lr * (on_M * (1 - beta) + on_h))
        _set_rows(coefficients + n, columns, n, columns < n, x + (beta, 1 - beta))
    tl.store(state, t)
    tl.store(state + 1, tl.load(state + 1) + bad)


@triton.jit
def sgdf(rows, coefficients, scalars, state, constants, hyper, group, sums, n, groups, TILE: tl.constexpr):
    """State skipped; scalars t; constants: beta1, beta2."""
    beta1, beta2 = tl.load(constants), tl.load(constants + 1)
    bad = 0.0 * beta1
    for first in range(0, n, TILE):
        columns = first + tl.arange(0, TILE)
        lr, decay = _rates(hyper, group, groups, columns, n)
        gate, broken = _gate(rows, columns, n, 0.0 * beta1, 3)
        long = _row(rows, 2, columns, n) > 1e36  # LONGEST of sgdf.py, squared
        gate, broken = gate & ~long, tl.maximum(broken, tl.max(tl.where(long, 1.0, 0.0)))
        on = tl.where(gate, 1.0, 0.0).to(tl.float64)
        t = _row(scalars, 0, columns, n) + on
        power1, power2 = tl.exp(t * tl.log(beta1)), tl.exp(t * tl.log(beta2))
        B = (1 + beta1) * (1 - power2) / ((1 - beta1) * (1 - power1 * power1))
        _set_rows(coefficients, columns, n, columns < n, (on, lr, decay, 1 / (1 - power1), B))
        _set_rows(scalars, columns, n, gate, (t,))
        bad = tl.maximum(bad, broken)
    tl.store(state, tl.load(state) + bad)
