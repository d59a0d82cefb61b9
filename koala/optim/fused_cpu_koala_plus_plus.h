// KOALA++ as in koala_plus_plus.py.

#pragma once

#include "fused_cpu_koala.h"

namespace {

struct KoalaPlusPlus {  // scalars: S, HH, vH; state: R, skipped; constants: noise, sigma, q, is_symmetric
  static constexpr int LISTS = 4, PRODUCTS = 5, COEFFICIENTS = 8;
  static constexpr bool TOGETHER = false;
  const double* c;
  Numbers to;
  Noise noise;
  bool broken = false;
  KoalaPlusPlus(const double* c, Numbers to, const double* sums) : c(c), to(to), noise(c, sums, to.state[0]) {}

  template <class T>
  static void measure(const std::array<T*, LISTS>& p, int64_t n, double decay, double* products) {
    const auto [x, g, v, H_] = p;
    double gg = 0, HH = 0, xx = 0, Hv_ = 0, HH_ = 0;
    if (decay == 0) {
#pragma omp simd reduction(+ : gg, Hv_, HH_)
      for (int64_t i = 0; i < n; ++i) {
        const double gi = g[i];
        gg += gi * gi;
        Hv_ += gi * static_cast<double>(v[i]);
        HH_ += gi * static_cast<double>(H_[i]);
      }
      HH = gg;
    } else {
#pragma omp simd reduction(+ : gg, HH, xx, Hv_, HH_)
      for (int64_t i = 0; i < n; ++i) {
        const double xi = x[i], gi = g[i], H = gi + decay * xi;
        gg += gi * gi;
        HH += H * H;
        xx += xi * xi;
        Hv_ += H * static_cast<double>(v[i]);
        HH_ += H * static_cast<double>(H_[i]);
      }
    }
    const double sums[] = {gg, HH, xx, Hv_, HH_};
    std::copy_n(sums, PRODUCTS, products);
  }

  void gains(int64_t i, const double* rows, double* out) {
    if (!finite(rows, PRODUCTS)) broken = true;
    if (!noise.valid || !finite(rows, PRODUCTS) || to.present[i] == 0 || rows[0] < SKIP_NORM * SKIP_NORM) return;
    double &S = to.scalars[i], &H_H_ = to.scalars[to.n + i], &vH = to.scalars[2 * to.n + i];
    const double HH = rows[1], sigma = c[4], q = c[5], R = noise.R;
    double Hv_ = rows[3], HH_ = rows[4];
    const bool first = H_H_ == 0;
    if (first) {  // H' = H and v' = sigma H
      HH_ = H_H_ = HH;
      Hv_ = vH = sigma * HH;
      S = (sigma + q) * HH + R;
    }
    const double alpha = HH_ / std::max(H_H_, TINY), lam = (Hv_ + q * HH_) / nonzero(S);
    const double w = c[6] != 0 ? (Hv_ - vH * alpha) / std::max(H_H_, TINY) : 0;
    const double on_v = alpha - lam, on_H_ = w - q * lam, on_H = (first ? on_v * sigma + on_H_ : 0) + q;
    H_H_ = HH;
    vH = on_v * Hv_ + on_H_ * HH_ + q * HH;
    S = nonzero(vH + q * HH + R);
    const double step = to.lr[i] * (noise.loss + 0.5 * to.decay[i] * rows[2]) / S;
    const double coefficients[] = {1, -step * on_v, -step * on_H_, -step * (on_H + q), on_v, on_H_, on_H, 1};
    std::copy_n(coefficients, COEFFICIENTS, out);
  }

  void conclude() {
    if (noise.valid) to.state[0] = noise.R;
    to.state[1] += broken || !noise.valid;
  }

  template <class T>
  static void apply(const std::array<T*, LISTS>& p, int64_t n, operation<T> decay, const double* k) {
    using O = operation<T>;
    const auto [x, g, v, H_] = p;
    const O xv = k[1], xH_ = k[2], xH = k[3], vv = k[4], vH_ = k[5], vH = k[6];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const O xi = x[i], vi = v[i], Hi = H_[i], H = g[i] + decay * xi;
      x[i] = xi + (xv * vi + xH_ * Hi + xH * H);
      v[i] = vv * vi + vH_ * Hi + vH * H;
      H_[i] = H;
    }
  }
  template <class T>
  static void apply_closed(const std::array<T*, LISTS>&, int64_t, const double*) {}
};

TORCH_LIBRARY_FRAGMENT(koala, library) { define<KoalaPlusPlus>(library, "koala_plus_plus"); }

}  // namespace
