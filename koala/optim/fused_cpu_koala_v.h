// KOALA-V as in koala_v.py.

#pragma once

#include "fused_cpu_koala.h"

namespace {

struct KoalaV {  // state: R, s, go, skipped, gain; constants: noise, direction
  static constexpr int LISTS = 2, PRODUCTS = 3, COEFFICIENTS = 3;
  static constexpr bool TOGETHER = false;
  const double* c;
  Numbers to;
  Noise noise;
  double largest = 0;
  bool broken = false;
  KoalaV(const double* c, Numbers to, const double* sums) : c(c), to(to), noise(c, sums, to.state[0]) {}

  template <class T>
  static void measure(const std::array<T*, LISTS>& p, int64_t n, double decay, double* products) {
    koala_products(p[0], p[1], n, decay, products);
  }

  void gains(int64_t i, const double* rows, double* out) {
    const double gg = rows[0], hh = rows[1], xx = rows[2], s = to.state[1];
    if (!finite(rows, PRODUCTS)) broken = true;
    if (!noise.valid || !finite(rows, PRODUCTS) || to.present[i] == 0 || gg < SKIP_NORM * SKIP_NORM) return;
    const double S = std::max(s * hh + noise.R, TINY);
    const double step = s / S * to.lr[i] * (noise.loss + 0.5 * to.decay[i] * xx);
    out[0] = 1;
    out[1] = -step;
    out[2] = c[4] == 0 ? step * to.decay[i] : 0;
    largest = std::max(largest, hh);
  }

  void conclude() {
    double &R = to.state[0], &s = to.state[1];
    if (noise.valid) {
      R = noise.R;
      const double floor = std::max(R, TINY), S = s * largest + floor;
      to.state[4] = s * largest / S;
      s = s * floor / S;
    }
    to.state[2] = noise.valid;
    to.state[3] += broken || !noise.valid;
  }

  template <class T>
  static void apply(const std::array<T*, LISTS>& p, int64_t n, operation<T> decay, const double* k) {
    const auto [x, g] = p;
    const operation<T> on_h = k[1], on_x = k[2];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const operation<T> xi = x[i], h = g[i] + decay * xi;
      x[i] = xi + (on_x * xi + on_h * h);
    }
  }
  template <class T>
  static void apply_closed(const std::array<T*, LISTS>&, int64_t, const double*) {}
};

TORCH_LIBRARY_FRAGMENT(koala, library) { define<KoalaV>(library, "koala_v"); }

}  // namespace
