"""What the Triton kernels of the filters' gains share. A filter's own are in fused_cuda_NAME.py: ``gains``, from dot
products to coefficients and new filter state in one program, and ``predict`` and ``apply`` where it has its own.

They mirror the filters' Python files, whose ``gains`` are the ones to read. Row 0 of the coefficients is the gate; the
others are in the order of the filter's ``moves``.
"""

from __future__ import annotations

import triton
import triton.language as tl

SKIP = tl.constexpr(1e-18)  # the squared norm below which a gradient counts as none
TINY = tl.constexpr(2.2250738585072014e-308)  # keeps 0 / 0 out


@triton.jit
def row(table, k, columns, n):
    """Row k of a table [.., n] at ``columns``; 0 beyond its end."""
    return tl.load(table + k * n + columns, mask=columns < n, other=0.0)


@triton.jit
def set_rows(table, columns, n, mask, values):
    """Writes ``values``, one a row, at ``columns`` of a table [.., n] where ``mask`` is true."""
    for k in tl.static_range(len(values)):
        tl.store(table + k * n + columns, values[k], mask=mask)


@triton.jit
def constant(value, like):
    """A Python number in float64: stored as it is it would pass through float32."""
    return tl.full(like.shape, value, tl.float64)


@triton.jit
def is_finite(value):
    """False of infinities and of nan."""
    return tl.abs(value) < float("inf")


@triton.jit
def rates(hyper, group, groups, columns, n):
    """Learning rate and decay of each column."""
    index = tl.load(group + columns, mask=columns < n, other=0)
    return tl.load(hyper + index), tl.load(hyper + groups + index)


@triton.jit
def gate_of(rows, columns, n, least, ROWS: tl.constexpr):
    """Where there is a gradient of at least this squared norm and all is a number; whether some is not, 1 or 0."""
    finite = is_finite(row(rows, 1, columns, n))
    for k in tl.static_range(2, ROWS):
        finite &= is_finite(row(rows, k, columns, n))
    gate = finite & (row(rows, 0, columns, n) > 0) & (row(rows, 1, columns, n) >= least)
    return gate, tl.max(tl.where(finite, 0.0, 1.0), 0).to(tl.float64)


@triton.jit
def noise(state, constants, sums):
    """The loss above its bound, R, whether both are numbers, and what |g|^2 must be at least."""
    r, alpha, measurement, bound = (
        tl.load(constants), tl.load(constants + 1), tl.load(constants + 2), tl.load(constants + 3)
    )  # fmt: skip
    count = tl.load(sums)
    mean, second = tl.load(sums + 1) / count, tl.load(sums + 2) / count
    reading = tl.where(measurement == 0, tl.maximum(second - 2 * bound * mean + bound * bound, 0.0), 0.0 * mean)
    reading = tl.where(measurement == 1, (mean - bound) * (mean - bound), reading)
    reading = tl.where(measurement == 2, tl.maximum(second - mean * mean, 0.0), reading)
    R = tl.where(r == r, r, alpha * tl.load(state) + (1 - alpha) * reading)  # r is nan where it is not constant
    valid = is_finite(mean) & is_finite(second) & is_finite(R)
    return tl.maximum(mean - bound, 0.0), R, valid, tl.where(valid, SKIP, float("inf"))
