#pragma once
// The few ATen ops that the torch side calls, by name through the dispatcher: the stable ABI has no other way to them.
#include <array>

#include "torch/check.h"

namespace forwardpass {

// The memory of x from element `offset` on, with other sizes and strides.
inline Tensor reshaped(const Tensor& x, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                       int64_t offset = 0) {
  AtenTensorHandle handle;
  check_shim(aoti_torch__reinterpret_tensor(x.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                            offset, &handle));
  return Tensor(handle);
}
inline Tensor view(const Tensor& x, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  return reshaped(x, {rows, columns}, {row_stride, column_stride});
}

// x [..., K], whose matrix is m, as [rows, columns], and transposed; both share its memory.
inline Tensor as_matrix(const Tensor& x, const Matrix& m) { return view(x, m.rows, m.columns, m.stride, 1); }
inline Tensor transposed(const Tensor& x, const Matrix& m) {
  // The stride of a single row is arbitrary; given strides 1 and 1, _int_mm on the CPU takes the wrong one for the
  // leading dimension (torch 2.13).
  return view(x, m.columns, m.rows, m.columns == 1 ? m.rows * m.stride : 1, m.stride);
}

// The results of an overload, each for torch::stable::detail::to once; there are no more of them than arguments.
template <class... Args>
std::array<StableIValue, sizeof...(Args)> call_overload(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  check_shim(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return stack;
}
template <class... Args>
Tensor call(const char* name, const Args&... args) {
  return torch::stable::detail::to<Tensor>(call_overload(name, "", args...)[0]);
}

}  // namespace forwardpass
