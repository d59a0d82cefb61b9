// KOALA-V, KOALA-M and KOALA++ as in koala_v.py, koala_m.py and koala_plus_plus.py.

#pragma once

#include "fused_cpu_filter.h"

namespace {

// R and the innovation; constants begin with r, alpha_r, measurement, lower_bound.
struct Noise {
  double R, loss = 0;
  bool whole;
  Noise(const double* c, const double* sums, double before) {
    const double mean = sums[1] / sums[0], second = sums[2] / sums[0], bound = c[3];
    const double readings[] = {std::max(second - 2 * bound * mean + bound * bound, 0.0), (mean - bound) * (mean - bound),
                               std::max(second - mean * mean, 0.0), 0.0};
    R = std::isnan(c[0]) ? c[1] * before + (1 - c[1]) * readings[static_cast<int>(c[2])] : c[0];
    whole = std::isfinite(mean) && std::isfinite(second) && std::isfinite(R);
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

struct KoalaV {  // state: R, s, go, skipped; constants: noise, direction
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
    if (!noise.whole || !finite(rows, PRODUCTS) || to.present[i] == 0 || gg < SKIP_NORM * SKIP_NORM) return;
    const double S = std::max(s * hh + noise.R, TINY);
    const double step = s / S * to.lr[i] * (noise.loss + 0.5 * to.decay[i] * xx);
    out[0] = 1;
    out[1] = -step;
    out[2] = c[4] == 0 ? step * to.decay[i] : 0;
    largest = std::max(largest, hh);
  }

  void conclude() {
    double &R = to.state[0], &s = to.state[1];
    if (noise.whole) {
      R = noise.R;
      s = s * R / std::max(s * largest + R, TINY);
    }
    to.state[2] = noise.whole;
    to.state[3] += broken || !noise.whole;
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

struct KoalaM {  // state: R, P11, P12, P22, qx, drift, go, skipped; constants: noise, a, qv, adaptive_q, target, numel
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
    out[4] = noise.whole ? a : 1;
    if (!finite(rows, PRODUCTS)) broken = true;
    if (!noise.whole || !finite(rows, PRODUCTS) || to.present[i] == 0 || gg < SKIP_NORM * SKIP_NORM) return;
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
    if (noise.whole) {
      const double shrink = noise.R / std::max(P11 * largest + noise.R, TINY);
      const double after[] = {noise.R, P11 * shrink, P12 * shrink,
                              std::max(P22 - P12 * P12 * (1 - shrink) / std::max(P11, TINY), 0.0), qx};
      std::copy_n(after, 5, to.state);
    }
    to.state[6] = noise.whole;
    to.state[7] += broken || !noise.whole;
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
};

// ---------------------------------------------------------------------------------------------------------- KOALA++

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
    const double found[] = {gg, HH, xx, Hv_, HH_};
    std::copy_n(found, PRODUCTS, products);
  }

  void gains(int64_t i, const double* rows, double* out) {
    if (!finite(rows, PRODUCTS)) broken = true;
    if (!noise.whole || !finite(rows, PRODUCTS) || to.present[i] == 0 || rows[0] < SKIP_NORM * SKIP_NORM) return;
    double &S = to.scalars[i], &own = to.scalars[to.n + i], &vH = to.scalars[2 * to.n + i];
    const double HH = rows[1], sigma = c[4], q = c[5], R = noise.R;
    double Hv_ = rows[3], HH_ = rows[4];
    const bool first = own == 0;
    if (first) {  // H' = H and v' = sigma H
      HH_ = own = HH;
      Hv_ = vH = sigma * HH;
      S = (sigma + q) * HH + R;
    }
    const double alpha = HH_ / std::max(own, TINY), lam = (Hv_ + q * HH_) / std::max(S, TINY);
    const double w = c[6] != 0 ? (Hv_ - vH * alpha) / std::max(own, TINY) : 0;
    const double on_v = alpha - lam, on_H_ = w - q * lam, on_H = (first ? on_v * sigma + on_H_ : 0) + q;
    own = HH;
    vH = on_v * Hv_ + on_H_ * HH_ + q * HH;
    S = std::max(vH + q * HH + R, TINY);
    const double step = to.lr[i] * (noise.loss + 0.5 * to.decay[i] * rows[2]) / S;
    const double found[] = {1, -step * on_v, -step * on_H_, -step * (on_H + q), on_v, on_H_, on_H, 1};
    std::copy_n(found, COEFFICIENTS, out);
  }

  void conclude() {
    if (noise.whole) to.state[0] = noise.R;
    to.state[1] += broken || !noise.whole;
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

}  // namespace
