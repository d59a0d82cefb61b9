// KOALA-M as in koala_m.py.

#pragma once

#include "fused_cpu_koala.h"

namespace {

struct KoalaM {  // state: R, P11, P12, P22, qx, drift, go, skipped, gain; constants: noise, a, qv, adaptive_q, target, numel
  static constexpr int LISTS = 4, PRODUCTS = 3, COEFFICIENTS = 7;
  static constexpr bool TOGETHER = false;
  const double* c;
  Numbers to;
  Noise noise;
  double P11, P12, P22, qx, largest = 0;
  bool broken = false;
  KoalaM(const double* c, Numbers to, const double* sums) : c(c), to(to), noise(c, sums, to.state[0]) {
    const double* s = to.state;
    qx = c[6] != 0 && std::isfinite(s[5]) ? 0.9 * s[4] + 0.1 / c[8] * std::sqrt(s[5]) : s[4];
    P11 = s[1] + 2 * s[2] + s[3] + qx;
    P12 = c[4] * (s[2] + s[3]);
    P22 = c[4] * c[4] * s[3] + c[5];
  }

  template <class T>
  static void measure(const std::array<T*, LISTS>& p, int64_t n, double decay, double* products) {
    koala_products(p[0], p[1], n, decay, products);
  }

  void gains(int64_t i, const double* rows, double* out) {
    const double gg = rows[0], hh = rows[1], xx = rows[2], a = c[4], target = c[7];
    out[4] = noise.valid ? a : 1;
    if (!finite(rows, PRODUCTS)) broken = true;
    if (!noise.valid || !finite(rows, PRODUCTS) || to.present[i] == 0 || gg < SKIP_NORM * SKIP_NORM) return;
    const double S = std::max(P11 * hh + noise.R, TINY);
    const double innovation = std::isnan(target) ? to.lr[i] * (noise.loss + 0.5 * to.decay[i] * xx) : target;
    const double step = innovation / S;
    out[0] = 1;
    out[1] = 0.9;
    out[2] = 0.1;
    out[3] = -0.1 * step * P11;
    out[5] = -step * P12;
    out[6] = -step * P11;
    largest = std::max(largest, hh);
  }

  void conclude() {
    if (noise.valid) {
      const double floor = std::max(noise.R, TINY), S = P11 * largest + floor, shrink = floor / S;
      to.state[8] = P11 * largest / S;
      const double after[] = {noise.R, P11 * shrink, P12 * shrink,
                              std::max(P22 - P12 * P12 * (1 - shrink) / std::max(P11, TINY), 0.0), qx};
      std::copy_n(after, 5, to.state);
    }
    to.state[6] = noise.valid;
    to.state[7] += broken || !noise.valid;
  }

  template <class T>
  static void apply(const std::array<T*, LISTS>& p, int64_t n, operation<T> decay, const double* k) {
    using O = operation<T>;
    const auto [x, g, velocity, average] = p;
    const O aa = k[1], ax = k[2], ah = k[3], vv = k[4], vh = k[5], xh = k[6];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const O xi = x[i], h = g[i] + decay * xi;
      average[i] = aa * average[i] + ax * xi + ah * h;
      velocity[i] = vv * velocity[i] + vh * h;
      x[i] = xi + xh * h;
    }
  }
  template <class T>
  static void apply_closed(const std::array<T*, LISTS>& p, int64_t n, const double* k) {
    const operation<T> keep = k[4];
    if (keep == 1) return;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) p[2][i] = keep * p[2][i];
  }

  // Weights move by their velocity, where go is not 0; |average - x|^2 before that.
  static bool goes(const double* state) { return state[6] != 0; }
  template <class T>
  static double predict(const std::array<T*, LISTS>& p, int64_t n) {
    const auto [x, g, velocity, average] = p;
    double drift = 0;
#pragma omp simd reduction(+ : drift)
    for (int64_t i = 0; i < n; ++i) {
      const operation<T> xi = x[i];
      const double gap = static_cast<double>(average[i]) - static_cast<double>(xi);
      drift += gap * gap;
      x[i] = xi + static_cast<operation<T>>(velocity[i]);
    }
    return drift;
  }
  static void predicted(double* state, double drift) { state[5] = drift; }
};

TORCH_LIBRARY_FRAGMENT(koala, library) { define<KoalaM>(library, "koala_m"); }

}  // namespace
