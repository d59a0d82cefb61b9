// SGDF as in sgdf.py.

#pragma once

#include "fused_cpu.h"

namespace {

constexpr double LONGEST = 1e18;  // SGDF's: the square of a longer gradient is no float32

// scalars: t; state: skipped; constants: beta1, beta2, eps, gamma, eps_reading, weight_decouple, use_sign.
// Coefficients: gate, lr, decay, 1 / (1 - beta1^t), B.
struct Sgdf {
  static constexpr int LISTS = 4, PRODUCTS = 2, COEFFICIENTS = 5;
  static constexpr bool TOGETHER = false;
  const double* c;
  Numbers to;
  bool broken = false;
  Sgdf(const double* c, Numbers to, const double*) : c(c), to(to) {}

  template <class T>
  static void measure(const std::array<T*, LISTS>& p, int64_t n, double decay, double* products) {
    const auto x = decay == 0 ? p[1] : p[0];  // weights that do not decay need not be read
    const auto g = p[1];
    double gg = 0, hh = 0;
#pragma omp simd reduction(+ : gg, hh)
    for (int64_t i = 0; i < n; ++i) {
      const double gi = g[i], h = gi + decay * static_cast<double>(x[i]);
      gg += gi * gi;
      hh += h * h;
    }
    products[0] = gg;
    products[1] = hh;
  }

  void gains(int64_t i, const double* rows, double* out) {
    const bool usable = finite(rows, PRODUCTS) && rows[1] <= LONGEST * LONGEST, open = to.present[i] != 0 && usable;
    if (!usable) broken = true;
    const double t = to.scalars[i] += open, beta1 = c[0], power1 = std::pow(beta1, t), power2 = std::pow(c[1], t);
    const double B = (1 + beta1) * (1 - power2) / ((1 - beta1) * (1 - power1 * power1));
    const double coefficients[] = {open ? 1.0 : 0.0, to.lr[i], to.decay[i], 1 / (1 - power1), B};
    std::copy_n(coefficients, COEFFICIENTS, out);
  }

  void conclude() { to.state[0] += broken; }

  // With the power of the gain as a function, so that the loop is one for each.
  template <class T, class Power>
  void step(const std::array<T*, LISTS>& p, int64_t n, operation<T> decay, const double* k, Power power) const {
    using O = operation<T>;
    const auto [x, g, m, s] = p;
    const bool decouple = c[5] != 0, sign = c[6] != 0;
    const O lr = k[1], debias = k[3], B = k[4], one1 = 1 - c[0], one2 = 1 - c[1];
    const O inner = c[4] == 0 ? c[2] : 0, outer = c[4] == 0 ? 0 : c[2];  // eps inside the factor B, or beside it
    const O coupled = decouple ? 0 : decay, shrink = decouple ? static_cast<O>(k[1] * k[2]) : O(0);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const O xi = x[i], gi = g[i] + coupled * xi, m0 = m[i], s0 = s[i];
      const O mi = m0 + one1 * (gi - m0), gap = gi - mi, si = s0 + one2 * (gap * gap - s0);
      const O mean = mi * debias, r = gi - mean;
      const O u = mean + power(si / (si + B * (r * r + inner) + outer)) * r;
      const O along = sign ? static_cast<O>((u > 0) - (u < 0)) : u;
      x[i] = xi - (shrink * xi + lr * along);
      m[i] = mi;
      s[i] = si;
    }
  }

  template <class T>
  void apply(const std::array<T*, LISTS>& p, int64_t n, operation<T> decay, const double* k) const {
    using O = operation<T>;
    const O gamma = c[3];
    if (gamma == O(0.5)) step(p, n, decay, k, [](O gain) { return std::sqrt(gain); });
    else if (gamma == O(1)) step(p, n, decay, k, [](O gain) { return gain; });
    else step(p, n, decay, k, [gamma](O gain) { return std::pow(gain, gamma); });
  }
  template <class T>
  static void apply_closed(const std::array<T*, LISTS>&, int64_t, const double*) {}
};

TORCH_LIBRARY_FRAGMENT(koala, library) { define<Sgdf>(library, "sgdf"); }

}  // namespace
