// SOFIM as in sofim.py.

#pragma once

#include "fused_cpu.h"

namespace {

struct Sofim {  // state: t, skipped; constants: beta, rho, precondition
  static constexpr int LISTS = 3, PRODUCTS = 4, COEFFICIENTS = 5;
  static constexpr bool TOGETHER = true;  // gains need the sums over all tensors
  const double* c;
  Numbers to;
  double MM = 0, hM = 0, on_M = 0, on_h = 0;
  bool broken = false;
  Sofim(const double* c, Numbers to, const double*) : c(c), to(to) {}

  template <class T>
  static void measure(const std::array<T*, LISTS>& p, int64_t n, double decay, double* products) {
    const auto x = decay == 0 ? p[1] : p[0];  // weights that do not decay need not be read
    const auto g = p[1], M = p[2];
    double gg = 0, hh = 0, hM = 0, MM = 0;
#pragma omp simd reduction(+ : gg, hh, hM, MM)
    for (int64_t i = 0; i < n; ++i) {
      const double gi = g[i], h = gi + decay * static_cast<double>(x[i]), Mi = M[i];
      gg += gi * gi;
      hh += h * h;
      hM += h * Mi;
      MM += Mi * Mi;
    }
    const double sums[] = {gg, hh, hM, MM};
    std::copy_n(sums, PRODUCTS, products);
  }

  bool seen(int64_t i, const double* rows) const { return to.present[i] != 0 && finite(rows, PRODUCTS); }

  void sum(int64_t i, const double* rows) {
    if (!finite(rows, PRODUCTS)) broken = true;
    if (!seen(i, rows)) return;
    const double beta = c[0];
    hM += beta * rows[2] + (1 - beta) * rows[1];
    MM += beta * beta * rows[3] + 2 * beta * (1 - beta) * rows[2] + (1 - beta) * (1 - beta) * rows[1];
  }

  void conclude() {
    const double beta = c[0], rho = c[1], correction = 1 - std::pow(beta, to.state[0] += 1);
    const double mm = std::max(MM, 0.0) / (correction * correction), mh = hM / correction;
    on_M = c[2] == 0 ? 1 / ((rho + mm) * correction) : -mh / ((rho * rho + rho * mm) * correction);
    on_h = c[2] == 0 ? 0 : 1 / rho;
    to.state[1] += broken;
  }

  void gains(int64_t i, const double* rows, double* out) {
    if (!seen(i, rows)) return;
    const double beta = c[0], lr = to.lr[i];
    const double coefficients[] = {1, -lr * on_M * beta, -lr * (on_M * (1 - beta) + on_h), beta, 1 - beta};
    std::copy_n(coefficients, COEFFICIENTS, out);
  }

  template <class T>
  static void apply(const std::array<T*, LISTS>& p, int64_t n, operation<T> decay, const double* k) {
    using O = operation<T>;
    const auto [x, g, M] = p;
    const O xM = k[1], xh = k[2], MM = k[3], Mh = k[4];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const O xi = x[i], Mi = M[i], h = g[i] + decay * xi;
      x[i] = xi + (xM * Mi + xh * h);
      M[i] = MM * Mi + Mh * h;
    }
  }
  template <class T>
  static void apply_closed(const std::array<T*, LISTS>&, int64_t, const double*) {}
};

TORCH_LIBRARY_FRAGMENT(koala, library) { define<Sofim>(library, "sofim"); }

}  // namespace
