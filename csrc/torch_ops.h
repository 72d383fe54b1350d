#pragma once
// The few ATen ops that the torch side calls, by name through the dispatcher: the stable ABI has no other way to them.
#include "check.h"

namespace forwardpass {

// x [..., K] as the matrix m of it: [rows, columns] with m's row stride, sharing its memory.
inline Tensor as_matrix(const Tensor& x, const Matrix& m) {
  const int64_t sizes[2] = {m.rows, m.columns}, strides[2] = {m.stride, 1};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(x.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

template <class... Args>
Tensor call(const char* name, const Args&... args) {
  StableIValue stack[] = {torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// fp32 [M, K] and [N, K] -> fp32 [M, N] = a b^T.
inline Tensor float_product(const Tensor& a, const Tensor& b) { return call("aten::mm", a, torch::stable::transpose(b, 0, 1)); }

}  // namespace forwardpass
