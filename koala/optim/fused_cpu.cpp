// The filters' steps for the CPU in as few passes over memory as there can be.
//
// Names, rows and coefficients are those of koala_v.py, koala_m.py, koala_plus_plus.py, sofim.py and sgdf.py, whose
// `gains` are the ones to read; a test holds these copies to them. Tensors come as a table of addresses, so that a step costs the same
// few calls however many there are. `correct` measures, forms gains and applies some tensors at a time: what was
// measured is then still in cache when it is applied. Products are float64, added chunk by chunk in order, so that they do
// not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t CHUNK = 1 << 15;  // elements, the work of one thread at a time
constexpr int64_t GROUP = 1 << 18;  // elements that are measured and applied before the next
constexpr double SKIP_NORM = 1e-9;
constexpr double LONGEST = 1e18;  // SGDF's: the square of a longer gradient is no float32
constexpr double TINY = std::numeric_limits<double>::min();

template <class T>
using operation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The tensors of a layout: rows of addresses (x, gradients or 0, buffers), and of each its length and dtype.
struct Tensors {
  const int64_t *addresses, *lengths, *dtypes;
  int64_t n;
  Tensors(const Tensor& a, const Tensor& l, const Tensor& d)
      : addresses(a.const_data_ptr<int64_t>()), lengths(l.const_data_ptr<int64_t>()),
        dtypes(d.const_data_ptr<int64_t>()), n(l.numel()) {}
  template <class T>
  T* at(int64_t list, int64_t i, int64_t offset) const {
    return reinterpret_cast<T*>(addresses[list * n + i]) + offset;
  }
  bool has_gradient(int64_t i) const { return addresses[n + i] != 0; }
};

struct Chunk {
  int64_t tensor, begin, length;
};

std::vector<Chunk> cut(const Tensors& tensors, int64_t first, int64_t last) {
  std::vector<Chunk> chunks;
  for (int64_t i = first; i < last; ++i)
    for (int64_t begin = 0, end = tensors.lengths[i]; begin < end; begin += CHUNK)
      chunks.push_back({i, begin, std::min(CHUNK, end - begin)});
  return chunks;
}

// body.template operator()<T>(chunk, index) on every chunk, on all of torch's threads, each of which has the same chunks
// every time. Backwards, a thread begins with what it read last, which is still in its cache.
template <bool BACKWARDS = false, class Body>
void each(const Tensors& tensors, const std::vector<Chunk>& chunks, Body body) {
  at::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      const int64_t c = BACKWARDS ? first + last - 1 - k : k;
      switch (static_cast<at::ScalarType>(tensors.dtypes[chunks[c].tensor])) {
        case at::kFloat: body.template operator()<float>(chunks[c], c); break;
        case at::kDouble: body.template operator()<double>(chunks[c], c); break;
        case at::kBFloat16: body.template operator()<at::BFloat16>(chunks[c], c); break;
        default: body.template operator()<at::Half>(chunks[c], c);
      }
    }
  });
}

// What gains are given: rows and coefficients are [tensor][k] here.
struct Numbers {
  const double *lr, *decay, *present;
  double *scalars, *state;  // [scalar][tensor], [state]
  int64_t n;
};

bool finite(const double* rows, int64_t count) {
  return std::all_of(rows, rows + count, [](double value) { return std::isfinite(value); });
}

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

// ---------------------------------------------------------------------------------------------------------- KOALA-V, -M

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

// -------------------------------------------------------------------------------------------------------------- KOALA++

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

// ---------------------------------------------------------------------------------------------------------------- SOFIM

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
    const double found[] = {gg, hh, hM, MM};
    std::copy_n(found, PRODUCTS, products);
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
    const double found[] = {1, -lr * on_M * beta, -lr * (on_M * (1 - beta) + on_h), beta, 1 - beta};
    std::copy_n(found, COEFFICIENTS, out);
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

// ----------------------------------------------------------------------------------------------------------------- SGDF

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
    const double found[] = {open ? 1.0 : 0.0, to.lr[i], to.decay[i], 1 / (1 - power1), B};
    std::copy_n(found, COEFFICIENTS, out);
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

// --------------------------------------------------------------------------------------------------------------- a step

template <class F, class T>
std::array<T*, F::LISTS> pointers(const Tensors& tensors, const Chunk& chunk) {
  std::array<T*, F::LISTS> found;
  for (int k = 0; k < F::LISTS; ++k) found[k] = tensors.at<T>(k, chunk.tensor, chunk.begin);
  return found;
}

template <class F>
void measured(const Tensors& tensors, const std::vector<Chunk>& chunks, const double* decay, std::vector<double>& rows) {
  std::vector<double> found(chunks.size() * F::PRODUCTS, 0.0);
  each(tensors, chunks, [&]<class T>(const Chunk& chunk, int64_t c) {
    if (!tensors.has_gradient(chunk.tensor)) return;
    F::measure(pointers<F, T>(tensors, chunk), chunk.length, decay[chunk.tensor], &found[c * F::PRODUCTS]);
  });
  for (size_t c = 0; c < chunks.size(); ++c)
    for (int k = 0; k < F::PRODUCTS; ++k) rows[chunks[c].tensor * F::PRODUCTS + k] += found[c * F::PRODUCTS + k];
}

template <class F>
void applied(const F& filter, const Tensors& tensors, const std::vector<Chunk>& chunks,
             const std::vector<double>& coefficients) {
  each<true>(tensors, chunks, [&]<class T>(const Chunk& chunk, int64_t) {
    const double* own = &coefficients[chunk.tensor * F::COEFFICIENTS];
    const auto lists = pointers<F, T>(tensors, chunk);
    if (own[0] == 0) F::apply_closed(lists, chunk.length, own);
    else filter.apply(lists, chunk.length, static_cast<operation<T>>(filter.to.decay[chunk.tensor]), own);
  });
}

template <class F>
void form_gains(F& filter, int64_t first, int64_t last, const std::vector<double>& rows, std::vector<double>& coefficients) {
  if constexpr (F::TOGETHER) {
    for (int64_t i = first; i < last; ++i) filter.sum(i, &rows[i * F::PRODUCTS]);
    filter.conclude();
  }
  for (int64_t i = first; i < last; ++i) filter.gains(i, &rows[i * F::PRODUCTS], &coefficients[i * F::COEFFICIENTS]);
  if (!F::TOGETHER && last == filter.to.n) filter.conclude();
}

// Some tensors at a time, which are measured (unless their rows are known) and applied while they are in cache.
template <class F>
void corrected(F filter, const Tensors& tensors, std::vector<double> rows, bool known) {
  const int64_t n = tensors.n;
  std::vector<double> coefficients(n * F::COEFFICIENTS, 0.0);
  int64_t first = 0, last = 0;
  do {
    int64_t length = 0;
    while (last < n && (F::TOGETHER || last == first || length + tensors.lengths[last] <= GROUP))
      length += tensors.lengths[last++];
    const auto chunks = cut(tensors, first, last);
    if (!known) measured<F>(tensors, chunks, filter.to.decay, rows);
    form_gains(filter, first, last, rows, coefficients);
    applied(filter, tensors, chunks, coefficients);
    first = last;
  } while (last < n);
}

template <class Body>
void with_filter(const std::string& name, Body body) {
  if (name == "VanillaKOALA") body.template operator()<KoalaV>();
  else if (name == "MomentumKOALA") body.template operator()<KoalaM>();
  else if (name == "KOALAPlusPlus") body.template operator()<KoalaPlusPlus>();
  else if (name == "SOFIM") body.template operator()<Sofim>();
  else if (name == "SGDF") body.template operator()<Sgdf>();
  else TORCH_CHECK(false, "no filter is called ", name);
}

// numbers: lr, decay and whether there is a gradient, [3, n]. rows [1 + products, n] on the outside.
Numbers numbers_of(const Tensor& numbers, Tensor& scalars, Tensor& state) {
  const double* first = numbers.const_data_ptr<double>();
  const int64_t n = numbers.size(1);
  return {first, first + n, first + 2 * n, scalars.data_ptr<double>(), state.data_ptr<double>(), n};
}

const double* sums_of(const std::optional<Tensor>& sums) { return sums ? sums->const_data_ptr<double>() : nullptr; }

// Row-major [columns][k] from a table [1 + k, columns], without its first row.
std::vector<double> without_first(const Tensor& table) {
  const Tensor rows = table.slice(0, 1).t().contiguous();
  return std::vector<double>(rows.const_data_ptr<double>(), rows.const_data_ptr<double>() + rows.numel());
}

Tensor as_table(const std::vector<double>& columns, int64_t n, int64_t k) {
  const Tensor table = at::empty({n, k}, at::kDouble);
  std::copy(columns.begin(), columns.end(), table.data_ptr<double>());
  return table.t();
}

Tensor measure(std::string filter, const Tensor& addresses, const Tensor& lengths, const Tensor& dtypes,
               const Tensor& numbers) {
  const Tensors tensors(addresses, lengths, dtypes);
  Tensor table;
  with_filter(filter, [&]<class F>() {
    std::vector<double> rows(tensors.n * F::PRODUCTS, 0.0);
    measured<F>(tensors, cut(tensors, 0, tensors.n), numbers.const_data_ptr<double>() + tensors.n, rows);
    table = at::zeros({1 + F::PRODUCTS, tensors.n}, at::kDouble);
    table[0].copy_(numbers[2]);
    table.slice(0, 1).copy_(as_table(rows, tensors.n, F::PRODUCTS));
  });
  return table;
}

void correct(std::string filter, at::ArrayRef<double> constants, const Tensor& addresses, const Tensor& lengths,
             const Tensor& dtypes, const Tensor& numbers, Tensor scalars, Tensor state, const std::optional<Tensor>& sums,
             const std::optional<Tensor>& rows) {
  const Tensors tensors(addresses, lengths, dtypes);
  Tensor own = numbers;
  if (rows) (own = numbers.clone())[2].copy_((*rows)[0]);  // whether any rank has a gradient
  with_filter(filter, [&]<class F>() {
    std::vector<double> known = rows ? without_first(*rows) : std::vector<double>(tensors.n * F::PRODUCTS, 0.0);
    corrected(F(constants.data(), numbers_of(own, scalars, state), sums_of(sums)), tensors, std::move(known),
              rows.has_value());
  });
}

Tensor gains(std::string filter, at::ArrayRef<double> constants, const Tensor& rows, const Tensor& numbers,
             Tensor scalars, Tensor state, const std::optional<Tensor>& sums) {
  const int64_t n = rows.size(1);
  Tensor own = numbers.clone(), table;
  own[2].copy_(rows[0]);
  with_filter(filter, [&]<class F>() {
    std::vector<double> coefficients(n * F::COEFFICIENTS, 0.0);
    F instance(constants.data(), numbers_of(own, scalars, state), sums_of(sums));
    form_gains(instance, 0, n, without_first(rows), coefficients);
    table = as_table(coefficients, n, F::COEFFICIENTS);
  });
  return table;
}

// KOALA-M's prediction: weights move by their velocity, where go is not 0; |average - x|^2 of each tensor before that.
Tensor predict(const Tensor& addresses, const Tensor& lengths, const Tensor& dtypes, const Tensor& go) {
  if (*go.const_data_ptr<double>() == 0) return at::zeros({lengths.numel()}, at::kDouble);
  const Tensors tensors(addresses, lengths, dtypes);
  const auto chunks = cut(tensors, 0, tensors.n);
  std::vector<double> found(chunks.size(), 0.0);
  each(tensors, chunks, [&]<class T>(const Chunk& chunk, int64_t c) {
    const auto [x, g, velocity, average] = pointers<KoalaM, T>(tensors, chunk);
    double drift = 0;
#pragma omp simd reduction(+ : drift)
    for (int64_t i = 0; i < chunk.length; ++i) {
      const operation<T> xi = x[i];
      const double gap = static_cast<double>(average[i]) - static_cast<double>(xi);
      drift += gap * gap;
      x[i] = xi + static_cast<operation<T>>(velocity[i]);
    }
    found[c] = drift;
  });
  const Tensor drifts = at::zeros({tensors.n}, at::kDouble);
  for (size_t c = 0; c < chunks.size(); ++c) drifts.data_ptr<double>()[chunks[c].tensor] += found[c];
  return drifts;
}

}  // namespace

TORCH_LIBRARY(koala, library) {
  library.def("measure(str filter, Tensor addresses, Tensor lengths, Tensor dtypes, Tensor numbers) -> Tensor", &measure);
  library.def(
      "correct(str filter, float[] constants, Tensor addresses, Tensor lengths, Tensor dtypes, Tensor numbers, "
      "Tensor(a!) scalars, Tensor(b!) state, Tensor? sums, Tensor? rows) -> ()",
      &correct);
  library.def(
      "gains(str filter, float[] constants, Tensor rows, Tensor numbers, Tensor(a!) scalars, Tensor(b!) state, "
      "Tensor? sums) -> Tensor",
      &gains);
  library.def("predict(Tensor addresses, Tensor lengths, Tensor dtypes, Tensor go) -> Tensor", &predict);
}
