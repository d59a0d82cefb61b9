// What the KOALA filters share: gains.py's noise and gates, and products of weights and gradients.

#pragma once

#include "fused_cpu.h"

namespace {

// R and the innovation; constants begin with r, alpha_r, measurement, lower_bound.
struct Noise {
  double R, loss = 0;
  bool valid;
  Noise(const double* c, const double* sums, double before) {
    const double mean = sums[1] / sums[0], second = sums[2] / sums[0], bound = c[3];
    const double readings[] = {std::max(second - 2 * bound * mean + bound * bound, 0.0), (mean - bound) * (mean - bound),
                               std::max(second - mean * mean, 0.0), 0.0};
    R = std::isnan(c[0]) ? c[1] * before + (1 - c[1]) * readings[static_cast<int>(c[2])] : c[0];
    valid = std::isfinite(mean) && std::isfinite(second) && std::isfinite(R);
    loss = std::max(mean - bound, 0.0);
  }
};

template <class T>
void koala_products(const T* x, const T* g, int64_t n, double decay, double* products) {
  double gg = 0, hh = 0, xx = 0;
  if (decay == 0) {
#pragma omp simd reduction(+ : gg)
    for (int64_t i = 0; i < n; ++i) gg += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    hh = gg;
  } else {
#pragma omp simd reduction(+ : gg, hh, xx)
    for (int64_t i = 0; i < n; ++i) {
      const double xi = x[i], gi = g[i], h = gi + decay * xi;
      gg += gi * gi;
      hh += h * h;
      xx += xi * xi;
    }
  }
  products[0] = gg;
  products[1] = hh;
  products[2] = xx;
}

}  // namespace
