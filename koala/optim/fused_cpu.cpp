// The operations torch.ops.koala, on every filter whose header the build includes before this file: see fused_cpu.h.

#include <torch/library.h>

#include "fused_cpu.h"

namespace {

const AnyKernel& kernel_of(const std::string& name) {
  const auto entry = kernels().find(name);
  TORCH_CHECK(entry != kernels().end(), "there is no C++ kernel ", name);
  return *entry->second;
}

std::vector<std::string> names() {
  std::vector<std::string> sorted;
  for (const auto& entry : kernels()) sorted.push_back(entry.first);
  return sorted;
}

// Whether there is a gradient is the rows' where they are given: on any rank.
Tensor with_presence(const Tensor& numbers, const std::optional<Tensor>& rows) {
  if (!rows) return numbers;
  const Tensor copy = numbers.clone();
  copy[2].copy_((*rows)[0]);
  return copy;
}

Tensor measure(std::string kernel, const Tensor& addresses, const Tensor& lengths, const Tensor& dtypes,
               const Tensor& numbers) {
  return kernel_of(kernel).measure(Tensors(addresses, lengths, dtypes), numbers);
}

void correct(std::string kernel, at::ArrayRef<double> constants, const Tensor& addresses, const Tensor& lengths,
             const Tensor& dtypes, const Tensor& numbers, Tensor scalars, Tensor state,
             const std::optional<Tensor>& sums, const std::optional<Tensor>& rows) {
  kernel_of(kernel).correct(constants.data(), Tensors(addresses, lengths, dtypes), with_presence(numbers, rows),
                            scalars, state, sums, rows);
}

Tensor gains(std::string kernel, at::ArrayRef<double> constants, const Tensor& rows, const Tensor& numbers,
             Tensor scalars, Tensor state, const std::optional<Tensor>& sums) {
  return kernel_of(kernel).gains(constants.data(), rows, with_presence(numbers, rows), scalars, state, sums);
}

void predict(std::string kernel, const Tensor& addresses, const Tensor& lengths, const Tensor& dtypes,
             const std::optional<Tensor>& shares, const Tensor& frozen, Tensor state) {
  kernel_of(kernel).predict(Tensors(addresses, lengths, dtypes), shares, *frozen.const_data_ptr<double>(),
                            state.data_ptr<double>());
}

}  // namespace

TORCH_LIBRARY(koala, library) {
  library.def("kernels() -> str[]", &names);
  library.def("measure(str kernel, Tensor addresses, Tensor lengths, Tensor dtypes, Tensor numbers) -> Tensor", &measure);
  library.def(
      "correct(str kernel, float[] constants, Tensor addresses, Tensor lengths, Tensor dtypes, Tensor numbers, "
      "Tensor(a!) scalars, Tensor(b!) state, Tensor? sums, Tensor? rows) -> ()",
      &correct);
  library.def(
      "gains(str kernel, float[] constants, Tensor rows, Tensor numbers, Tensor(a!) scalars, Tensor(b!) state, "
      "Tensor? sums) -> Tensor",
      &gains);
  library.def(
      "predict(str kernel, Tensor addresses, Tensor lengths, Tensor dtypes, Tensor? shares, Tensor frozen, "
      "Tensor(a!) state) -> ()",
      &predict);
}
