// The steps of all filters on a CPU, in as few passes over memory as there can be. A filter brings its arithmetic in a
// header fused_cpu_NAME.h, which the build finds: a struct with
//   measure        products of a piece of a tensor,
//   gains          a tensor's coefficients from its products; the first is its gate,
//   conclude       the new filter state,
//   apply          the move of a piece; apply_closed where the gate is 0,
//   predict        the time update of a piece and its sum, where predicting moves weights; predicted takes the total,
// and a line `TORCH_LIBRARY_FRAGMENT(koala, library) { define<Struct>(library, "NAME"); }`. TOGETHER: `sum` sees every tensor before the first gain.
//
// Rows, coefficients and state are those of the filters' Python files, whose `gains` are the ones to read; a test holds
// these copies to them. Tensors come as a table of addresses, so that a step costs the same few calls however many there
// are. `correct` measures, forms gains and applies some tensors at a time: what was measured is then still in cache when
// it is applied. Products are float64, added chunk by chunk in order, so that they do not depend on the number of threads.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

constexpr int64_t CHUNK = 1 << 15;  // elements, the work of one thread at a time
constexpr int64_t GROUP = 1 << 18;  // elements that are measured and applied before the next
constexpr double SKIP_NORM = 1e-9;
constexpr double TINY = std::numeric_limits<double>::min();

template <class T>
using operation = std::conditional_t<std::is_same_v<T, double>, double, float>;

// What gains are given: rows and coefficients are [tensor][k] here.
struct Numbers {
  const double *lr, *decay, *present;
  double *scalars, *state;  // [scalar][tensor], [state]
  int64_t n;
};

double nonzero(double value) { return value == 0 ? TINY : value; }

bool finite(const double* rows, int64_t count) {
  return std::all_of(rows, rows + count, [](double value) { return std::isfinite(value); });
}

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
  std::array<T*, F::LISTS> lists;
  for (int k = 0; k < F::LISTS; ++k) lists[k] = tensors.at<T>(k, chunk.tensor, chunk.begin);
  return lists;
}

template <class F>
void measured(const Tensors& tensors, const std::vector<Chunk>& chunks, const double* decay,
              std::vector<double>& rows) {
  std::vector<double> products(chunks.size() * F::PRODUCTS, 0.0);
  each(tensors, chunks, [&]<class T>(const Chunk& chunk, int64_t c) {
    if (!tensors.has_gradient(chunk.tensor)) return;
    F::measure(pointers<F, T>(tensors, chunk), chunk.length, decay[chunk.tensor], &products[c * F::PRODUCTS]);
  });
  for (size_t c = 0; c < chunks.size(); ++c)
    for (int k = 0; k < F::PRODUCTS; ++k) rows[chunks[c].tensor * F::PRODUCTS + k] += products[c * F::PRODUCTS + k];
}

template <class F>
void applied(const F& filter, const Tensors& tensors, const std::vector<Chunk>& chunks,
             const std::vector<double>& coefficients) {
  each<true>(tensors, chunks, [&]<class T>(const Chunk& chunk, int64_t) {
    const double* k = &coefficients[chunk.tensor * F::COEFFICIENTS];
    const auto lists = pointers<F, T>(tensors, chunk);
    if (k[0] == 0) F::apply_closed(lists, chunk.length, k);
    else filter.apply(lists, chunk.length, static_cast<operation<T>>(filter.to.decay[chunk.tensor]), k);
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

// Some tensors at a time, which are measured (unless their rows are given) and applied while they are in cache.
template <class F>
void corrected(F filter, const Tensors& tensors, std::vector<double> rows, bool given) {
  const int64_t n = tensors.n;
  std::vector<double> coefficients(n * F::COEFFICIENTS, 0.0);
  int64_t first = 0, last = 0;
  do {
    int64_t length = 0;
    while (last < n && (F::TOGETHER || last == first || length + tensors.lengths[last] <= GROUP))
      length += tensors.lengths[last++];
    const auto chunks = cut(tensors, first, last);
    if (!given) measured<F>(tensors, chunks, filter.to.decay, rows);
    form_gains(filter, first, last, rows, coefficients);
    applied(filter, tensors, chunks, coefficients);
    first = last;
  } while (last < n);
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

// Whether there is a gradient is the rows' where they are given: on any rank.
Tensor with_presence(const Tensor& numbers, const Tensor& rows) {
  const Tensor copy = numbers.clone();
  copy[2].copy_(rows[0]);
  return copy;
}

template <class F>
Tensor measure(const Tensor& addresses, const Tensor& lengths, const Tensor& dtypes, const Tensor& numbers) {
  const Tensors tensors(addresses, lengths, dtypes);
  std::vector<double> rows(tensors.n * F::PRODUCTS, 0.0);
  measured<F>(tensors, cut(tensors, 0, tensors.n), numbers.const_data_ptr<double>() + tensors.n, rows);
  const Tensor table = at::zeros({1 + F::PRODUCTS, tensors.n}, at::kDouble);
  table[0].copy_(numbers[2]);
  table.slice(0, 1).copy_(as_table(rows, tensors.n, F::PRODUCTS));
  return table;
}

template <class F>
void correct(at::ArrayRef<double> constants, const Tensor& addresses, const Tensor& lengths, const Tensor& dtypes,
             const Tensor& numbers, Tensor scalars, Tensor state, const std::optional<Tensor>& sums,
             const std::optional<Tensor>& rows) {
  const Tensors tensors(addresses, lengths, dtypes);
  const Tensor given = rows ? with_presence(numbers, *rows) : numbers;
  auto products = rows ? without_first(*rows) : std::vector<double>(tensors.n * F::PRODUCTS, 0.0);
  corrected(F(constants.data(), numbers_of(given, scalars, state), sums_of(sums)), tensors, std::move(products),
            rows.has_value());
}

template <class F>
Tensor gains(at::ArrayRef<double> constants, const Tensor& rows, const Tensor& numbers, Tensor scalars, Tensor state,
             const std::optional<Tensor>& sums) {
  const int64_t n = rows.size(1);
  const Tensor given = with_presence(numbers, rows);
  std::vector<double> coefficients(n * F::COEFFICIENTS, 0.0);
  F filter(constants.data(), numbers_of(given, scalars, state), sums_of(sums));
  form_gains(filter, 0, n, without_first(rows), coefficients);
  return as_table(coefficients, n, F::COEFFICIENTS);
}

template <class F>
void predict(const Tensor& addresses, const Tensor& lengths, const Tensor& dtypes, const std::optional<Tensor>& shares,
             const Tensor& frozen, Tensor state) {
  if (!F::goes(state.const_data_ptr<double>())) return;
  const Tensors tensors(addresses, lengths, dtypes);
  const auto chunks = cut(tensors, 0, tensors.n);
  std::vector<double> sums(chunks.size(), 0.0);
  each(tensors, chunks, [&]<class T>(const Chunk& chunk, int64_t c) {
    sums[c] = F::predict(pointers<F, T>(tensors, chunk), chunk.length);
  });
  double total = *frozen.const_data_ptr<double>();
  for (size_t c = 0; c < chunks.size(); ++c)
    total += sums[c] * (shares ? shares->const_data_ptr<double>()[chunks[c].tensor] : 1.0);
  F::predicted(state.data_ptr<double>(), total);
}

// The operations torch.ops.koala.NAME_measure, NAME_correct, NAME_gains and, where predicting moves weights, NAME_predict.
template <class F>
void define(torch::Library& library, const std::string& name) {
  const std::string tensors = "Tensor addresses, Tensor lengths, Tensor dtypes, ";
  library.def((name + "_measure(" + tensors + "Tensor numbers) -> Tensor").c_str(), &measure<F>);
  library.def((name + "_correct(float[] constants, " + tensors + "Tensor numbers, Tensor(a!) scalars, "
               "Tensor(b!) state, Tensor? sums, Tensor? rows) -> ()").c_str(), &correct<F>);
  library.def((name + "_gains(float[] constants, Tensor rows, Tensor numbers, Tensor(a!) scalars, Tensor(b!) state, "
               "Tensor? sums) -> Tensor").c_str(), &gains<F>);
  if constexpr (requires(double* state) { F::predicted(state, 0.0); })
    library.def((name + "_predict(" + tensors + "Tensor? shares, Tensor frozen, Tensor(a!) state) -> ()").c_str(),
                &predict<F>);
}

}  // namespace
