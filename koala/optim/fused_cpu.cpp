// The filters' steps for the CPU in as few passes over memory as there can be.
//
// The filters are in the headers beside this file. Names, rows and coefficients are those of koala_v.py, koala_m.py,
// koala_plus_plus.py, sofim.py and sgdf.py, whose `gains` are the ones to read; a test holds these copies to them.
// Tensors come as a table of addresses, so that a step costs the same few calls however many there are. `correct`
// measures, forms gains and applies some tensors at a time: what was measured is then still in cache when it is applied.
// Products are float64, added chunk by chunk in order, so that they do not depend on the number of threads.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <vector>

#include "fused_cpu_koala.h"
#include "fused_cpu_sgdf.h"
#include "fused_cpu_sofim.h"

namespace {

using at::Tensor;

constexpr int64_t CHUNK = 1 << 15;  // elements, the work of one thread at a time
constexpr int64_t GROUP = 1 << 18;  // elements that are measured and applied before the next

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

// body.template operator()<T>(chunk, index) on every chunk, on all of torch's threads, each of which has the same
// chunks every time. Backwards, a thread begins with what it read last, which is still in its cache.
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

template <class F, class T>
std::array<T*, F::LISTS> pointers(const Tensors& tensors, const Chunk& chunk) {
  std::array<T*, F::LISTS> found;
  for (int k = 0; k < F::LISTS; ++k) found[k] = tensors.at<T>(k, chunk.tensor, chunk.begin);
  return found;
}

template <class F>
void measured(const Tensors& tensors, const std::vector<Chunk>& chunks, const double* decay,
              std::vector<double>& rows) {
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
void form_gains(F& filter, int64_t first, int64_t last, const std::vector<double>& rows,
                std::vector<double>& coefficients) {
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
