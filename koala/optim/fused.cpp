// The filters' updates for the CPU, in as few passes over memory as there can be: implementation="fused" of koala/optim.
//
// Formulas, names and arguments are those of koala_v.py, koala_m.py, koala_plus_plus.py and sofim.py, which are the ground
// truth; here a call takes lists of flat tensors. `*_measure` returns dot products as float64 [products, tensors].
// `*_correct` measures (unless it is given the products, where ranks had to sum them), turns each tensor's products into
// its gains and applies them, some tensors at a time: what was measured is then still in cache when it is applied.
// Products are accumulated in float64, chunk by chunk in order, so that they do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <vector>

namespace {

using at::Tensor;
using at::TensorList;
template <size_t K>
using Lists = std::array<TensorList, K>;
template <class Pointers>
using element = std::remove_pointer_t<typename Pointers::value_type>;

constexpr int64_t CHUNK = 1 << 15;  // elements, the work of one thread at a time
constexpr int64_t GROUP = 1 << 20;  // elements of a list that are measured and applied before the next
constexpr double SKIP_NORM = 1e-9;
constexpr double TINY = std::numeric_limits<double>::min();

struct Chunk {
  int64_t tensor, begin, length;
};

std::vector<Chunk> cut(TensorList tensors, int64_t first, int64_t last) {
  std::vector<Chunk> chunks;
  for (int64_t i = first; i < last; ++i)
    for (int64_t begin = 0, end = tensors[i].numel(); begin < end; begin += CHUNK)
      chunks.push_back({i, begin, std::min(CHUNK, end - begin)});
  return chunks;
}

// body(pointers, chunk, index) on every chunk, on all of torch's threads.
template <size_t K, class Body>
void each(const Lists<K>& tensors, const std::vector<Chunk>& chunks, Body body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, tensors[0][0].scalar_type(), "koala", [&] {
    at::parallel_for(0, chunks.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        std::array<scalar_t*, K> pointers;
        for (size_t k = 0; k < K; ++k)
          pointers[k] = static_cast<scalar_t*>(tensors[k][chunks[c].tensor].data_ptr()) + chunks[c].begin;
        body(pointers, chunks[c], c);
      }
    });
  });
}

// A tensor's weights. Where they do not decay they need not be read: any tensor will do in their place, times zero.
template <class Pointers>
auto weights(const Pointers& pointers, double decay) {
  return decay == 0 ? pointers[1] : pointers[0];
}

// products[tensor * dots + k] += what measure(pointers, length, dots) finds in the chunks.
template <size_t K, class Measure>
void measured(const Lists<K>& tensors, const std::vector<Chunk>& chunks, int64_t dots, std::vector<double>& products,
              Measure measure) {
  std::vector<double> found(chunks.size() * dots, 0.0);
  each(tensors, chunks, [&](auto pointers, const Chunk& chunk, int64_t c) {
    measure(pointers, chunk.length, &found[c * dots]);
  });
  for (size_t c = 0; c < chunks.size(); ++c)
    for (int64_t k = 0; k < dots; ++k) products[chunks[c].tensor * dots + k] += found[c * dots + k];
}

Tensor as_table(const std::vector<double>& rows, int64_t n, int64_t width) {
  const Tensor table = at::empty({n, width}, at::kDouble);
  std::copy(rows.begin(), rows.end(), table.data_ptr<double>());
  return table.t();
}

template <size_t K, class Measure>
Tensor table_of(const Lists<K>& tensors, int64_t dots, Measure measure) {
  const int64_t n = tensors[0].size();
  std::vector<double> products(n * dots, 0.0);
  measured(tensors, cut(tensors[0], 0, n), dots, products, measure);
  return as_table(products, n, dots);
}

// apply(pointers, length, scalars) on every chunk, backwards: what was read last is still in cache.
template <size_t K, class Apply>
void applied(const Lists<K>& tensors, std::vector<Chunk> chunks, int64_t width, const std::vector<double>& scalars,
             Apply apply) {
  std::reverse(chunks.begin(), chunks.end());
  each(tensors, chunks, [&](auto pointers, const Chunk& chunk, int64_t) {
    apply(pointers, chunk.length, scalars.data() + chunk.tensor * width);
  });
}

// Measure, gains(tensor, dots, scalars), apply. `table`: the products, if they are known.
template <size_t K, class Measure, class Gains, class Apply>
void correct(const Lists<K>& tensors, const std::optional<Tensor>& table, int64_t dots, int64_t width, Measure measure,
             Gains gains, Apply apply) {
  const int64_t n = tensors[0].size();
  std::vector<double> products(n * dots, 0.0), scalars(n * width, 0.0);
  if (table) {
    const Tensor rows = table->t().contiguous();
    std::copy_n(rows.const_data_ptr<double>(), n * dots, products.begin());
  }
  for (int64_t first = 0, last = 0; first < n; first = last) {
    int64_t length = 0;
    do length += tensors[0][last++].numel();
    while (last < n && length + tensors[0][last].numel() <= GROUP);
    const auto chunks = cut(tensors[0], first, last);
    if (!table) measured(tensors, chunks, dots, products, measure);
    for (int64_t i = first; i < last; ++i) gains(i, &products[i * dots], &scalars[i * width]);
    applied(tensors, chunks, width, scalars, apply);
  }
}

// ---------------------------------------------------------------------------------------------------------- KOALA-V, -M

auto koala_dots(double decay) {
  return [=](auto pointers, int64_t n, double* dots) {
    const auto x = weights(pointers, decay), g = pointers[1];
    double gg = 0, gx = 0, xx = 0;
#pragma omp simd reduction(+ : gg, gx, xx)
    for (int64_t i = 0; i < n; ++i) {
      const double gi = g[i], xi = x[i];
      gg += gi * gi;
      gx += gi * xi;
      xx += xi * xi;
    }
    dots[0] = gg;
    dots[1] = gx;
    dots[2] = xx;
  };
}

struct Norms {
  bool seen;
  double hh, xx;
  Norms(const double* dots, double decay) : seen(dots[0] >= SKIP_NORM * SKIP_NORM), hh(dots[0]), xx(0) {
    if (decay == 0) return;
    hh = std::max(dots[0] + 2 * decay * dots[1] + decay * decay * dots[2], 0.0);
    xx = dots[2];
  }
};

Tensor koala_measure(TensorList xs, TensorList gs, double decay) {
  return table_of<2>({xs, gs}, 3, koala_dots(decay));
}

// filter: s, R, L, lr. Returns the largest |h|^2.
Tensor koala_v_correct(TensorList xs, TensorList gs, const Tensor& filter, const std::optional<Tensor>& table,
                       double decay, bool l2) {
  const double* f = filter.const_data_ptr<double>();
  const double s = f[0], noise = f[1], loss = f[2], lr = f[3];
  double largest = 0;
  const auto gains = [&](int64_t, const double* dots, double* scalars) {
    const Norms norms(dots, decay);
    if (!norms.seen) return;
    scalars[0] = s / std::max(s * norms.hh + noise, TINY) * lr * (loss + 0.5 * decay * norms.xx);
    largest = std::max(largest, norms.hh);
  };
  const auto apply = [=](auto pointers, int64_t n, const double* scalars) {
    using T = element<decltype(pointers)>;
    const auto x = pointers[0], g = pointers[1];
    const T step = scalars[0], lambda = l2 ? decay : 0;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) x[i] -= step * (g[i] + lambda * x[i]);
  };
  correct<2>({xs, gs}, table, 3, 1, koala_dots(decay), gains, apply);
  return at::scalar_tensor(largest, at::kDouble);
}

Tensor koala_m_predict(TensorList xs, TensorList velocities, TensorList averages) {
  return table_of<3>({xs, velocities, averages}, 1, [](auto pointers, int64_t n, double* dots) {
    const auto [x, velocity, average] = pointers;
    double drift = 0;
#pragma omp simd reduction(+ : drift)
    for (int64_t i = 0; i < n; ++i) {
      const double gap = (double)average[i] - (double)x[i];
      drift += gap * gap;
      x[i] += velocity[i];
    }
    dots[0] = drift;
  });
}

// filter: P11, P12, R, L, lr. Returns the largest |h|^2.
Tensor koala_m_correct(TensorList xs, TensorList gs, TensorList velocities, TensorList averages, const Tensor& filter,
                       const std::optional<Tensor>& table, double decay, double a, std::optional<double> target) {
  const double* f = filter.const_data_ptr<double>();
  const double P11 = f[0], P12 = f[1], noise = f[2], loss = f[3], lr = f[4];
  double largest = 0;
  const auto gains = [&](int64_t, const double* dots, double* scalars) {
    const Norms norms(dots, decay);
    if (!norms.seen) return;
    const double innovation = target ? *target : lr * (loss + 0.5 * decay * norms.xx);
    const double step = innovation / std::max(P11 * norms.hh + noise, TINY);
    scalars[0] = step * P11;
    scalars[1] = step * P12;
    scalars[2] = 0.1;
    largest = std::max(largest, norms.hh);
  };
  const auto apply = [=](auto pointers, int64_t n, const double* scalars) {
    using T = element<decltype(pointers)>;
    const auto [x, g, velocity, average] = pointers;
    const T step_x = scalars[0], step_v = scalars[1], rate = scalars[2], lambda = decay, keep = a;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T h = g[i] + lambda * x[i];
      const T xi = x[i] - step_x * h;
      x[i] = xi;
      velocity[i] = keep * velocity[i] - step_v * h;
      average[i] += rate * (xi - average[i]);
    }
  };
  correct<4>({xs, gs, velocities, averages}, table, 3, 3, koala_dots(decay), gains, apply);
  return at::scalar_tensor(largest, at::kDouble);
}

// -------------------------------------------------------------------------------------------------------------- KOALA++

auto koala_plus_plus_dots(double decay) {
  return [=](auto pointers, int64_t n, double* dots) {
    const auto x = weights(pointers, decay), g = pointers[1], v = pointers[2], H_ = pointers[3];
    double gg = 0, HH = 0, HH_ = 0, Hv_ = 0, xx = 0;
#pragma omp simd reduction(+ : gg, HH, HH_, Hv_, xx)
    for (int64_t i = 0; i < n; ++i) {
      const double gi = g[i], xi = x[i], H = gi + decay * xi;
      gg += gi * gi;
      HH += H * H;
      HH_ += H * (double)H_[i];
      Hv_ += H * (double)v[i];
      xx += xi * xi;
    }
    dots[0] = gg;
    dots[1] = HH;
    dots[2] = HH_;
    dots[3] = Hv_;
    dots[4] = xx;
  };
}

Tensor koala_plus_plus_measure(TensorList xs, TensorList gs, TensorList vs, TensorList Hs, double decay) {
  return table_of<4>({xs, gs, vs, Hs}, 5, koala_plus_plus_dots(decay));
}

// filter: R, L, lr. S, HH, vH are the tensors' scalars of the previous step, and after the call of this one.
void koala_plus_plus_correct(TensorList xs, TensorList gs, TensorList vs, TensorList Hs, TensorList Ss, TensorList HHs,
                             TensorList vHs, const Tensor& filter, const std::optional<Tensor>& table, double decay,
                             double sigma, double q, bool is_symmetric) {
  const double* f = filter.const_data_ptr<double>();
  const double noise = f[0], loss = f[1], lr = f[2];
  const auto gains = [&](int64_t i, const double* dots, double* scalars) {
    scalars[0] = 1;
    if (!(dots[0] >= SKIP_NORM * SKIP_NORM)) return;  // also where it is no number
    double &S = *Ss[i].data_ptr<double>(), &own = *HHs[i].data_ptr<double>(), &vH = *vHs[i].data_ptr<double>();
    const double HH = dots[1];
    double HH_ = dots[2], Hv_ = dots[3];
    const bool first = own == 0;
    if (first) {  // H' = H and v' = sigma H
      HH_ = own = HH;
      Hv_ = vH = sigma * HH;
      S = (sigma + q) * HH + noise;
    }
    const double alpha = HH_ / std::max(own, TINY), ell = (Hv_ + q * HH_) / std::max(S, TINY);
    const double w = is_symmetric ? (Hv_ - vH * alpha) / std::max(own, TINY) : 0;
    const double on_v = alpha - ell, on_H_ = w - q * ell;
    own = HH;
    vH = on_v * Hv_ + on_H_ * HH_ + q * HH;
    S = std::max(vH + q * HH + noise, TINY);
    scalars[0] = on_v;
    scalars[1] = on_H_;
    scalars[2] = first ? on_v * sigma + on_H_ + q : q;
    scalars[3] = lr * (loss + 0.5 * decay * dots[4]) / S;
    scalars[4] = 1;
  };
  const auto apply = [=](auto pointers, int64_t n, const double* scalars) {
    using T = element<decltype(pointers)>;
    const auto [x, g, v, H_] = pointers;
    const T on_v = scalars[0], on_H_ = scalars[1], on_H = scalars[2], step = scalars[3], seen = scalars[4];
    const T lambda = decay, process = q;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const T H = g[i] + lambda * x[i];
      const T vi = on_v * v[i] + on_H_ * H_[i] + on_H * H;
      v[i] = vi;
      H_[i] += seen * (H - H_[i]);
      x[i] -= step * (vi + process * H);
    }
  };
  correct<4>({xs, gs, vs, Hs}, table, 5, 5, koala_plus_plus_dots(decay), gains, apply);
}

// ---------------------------------------------------------------------------------------------------------------- SOFIM

Tensor sofim_measure(TensorList xs, TensorList gs, TensorList Ms, double decay, double beta, bool with_gradient) {
  return table_of<3>({xs, gs, Ms}, 2, [=](auto pointers, int64_t n, double* dots) {
    using T = element<decltype(pointers)>;
    const auto x = weights(pointers, decay), g = pointers[1], M = pointers[2];
    const T lambda = decay, weight = 1 - beta;
    double MM = 0, Mh = 0;
#pragma omp simd reduction(+ : MM, Mh)
    for (int64_t i = 0; i < n; ++i) {
      const T h = g[i] + lambda * x[i];
      const T Mi = M[i] + weight * (h - M[i]);
      M[i] = Mi;
      MM += (double)Mi * (double)Mi;
      Mh += (double)Mi * (double)h;
    }
    dots[0] = MM;
    dots[1] = with_gradient ? Mh : 0;
  });
}

// filter: what M and h are multiplied by.
void sofim_correct(TensorList xs, TensorList gs, TensorList Ms, const Tensor& filter, double decay,
                   bool with_gradient) {
  const double* f = filter.const_data_ptr<double>();
  applied<3>({xs, gs, Ms}, cut(xs, 0, xs.size()), 0, {}, [=](auto pointers, int64_t n, const double*) {
    using T = element<decltype(pointers)>;
    const auto [x, g, M] = pointers;
    const T on_M = f[0], on_h = f[1], lambda = decay;
    if (with_gradient) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] -= on_M * M[i] + on_h * (g[i] + lambda * x[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) x[i] -= on_M * M[i];
    }
  });
}

}  // namespace

TORCH_LIBRARY(koala, library) {
  library.def("koala_measure(Tensor[] x, Tensor[] g, *, float decay) -> Tensor", &koala_measure);
  library.def(
      "koala_v_correct(Tensor(a!)[] x, Tensor[] g, Tensor filter, *, Tensor? table, float decay, bool l2) -> Tensor",
      &koala_v_correct);
  library.def("koala_m_predict(Tensor(a!)[] x, Tensor[] velocity, Tensor[] average) -> Tensor", &koala_m_predict);
  library.def(
      "koala_m_correct(Tensor(a!)[] x, Tensor[] g, Tensor(b!)[] velocity, Tensor(c!)[] average, Tensor filter, *, "
      "Tensor? table, float decay, float a, float? target) -> Tensor",
      &koala_m_correct);
  library.def("koala_plus_plus_measure(Tensor[] x, Tensor[] g, Tensor[] v, Tensor[] H, *, float decay) -> Tensor",
              &koala_plus_plus_measure);
  library.def(
      "koala_plus_plus_correct(Tensor(a!)[] x, Tensor[] g, Tensor(b!)[] v, Tensor(c!)[] H, Tensor(d!)[] S, "
      "Tensor(e!)[] HH, Tensor(f!)[] vH, Tensor filter, *, Tensor? table, float decay, float sigma, float q, "
      "bool is_symmetric) -> ()",
      &koala_plus_plus_correct);
  library.def(
      "sofim_measure(Tensor[] x, Tensor[] g, Tensor(a!)[] M, *, float decay, float beta, bool with_gradient) -> Tensor",
      &sofim_measure);
  library.def(
      "sofim_correct(Tensor(a!)[] x, Tensor[] g, Tensor[] M, Tensor filter, *, float decay, bool with_gradient) -> ()",
      &sofim_correct);
}
