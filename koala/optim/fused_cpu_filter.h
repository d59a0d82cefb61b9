// What the filters of fused_cpu.cpp share. A filter has `measure` (products of a piece of a tensor), `gains` (a tensor's
// coefficients from its products; the first is its gate), `conclude` (what becomes of the state) and `apply` (the move of
// a piece, or `apply_closed` where the gate is 0). TOGETHER: no gain is known before `sum` has seen every tensor.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace {

constexpr double SKIP_NORM = 1e-9;
constexpr double TINY = std::numeric_limits<double>::min();

template <class T>
using operation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What gains are given: rows and coefficients are [tensor][k] here.
struct Numbers {
  const double *lr, *decay, *present;
  double *scalars, *state;  // [scalar][tensor], [state]
  int64_t n;
};

bool finite(const double* rows, int64_t count) {
  return std::all_of(rows, rows + count, [](double value) { return std::isfinite(value); });
}

}  // namespace
