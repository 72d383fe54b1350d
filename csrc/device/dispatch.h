#pragma once
// Run-time value -> compile-time constant, in place of nested switch macros:
//   return dispatch<Dtype::f32, Dtype::f16>(p.x.dtype, [&](auto D) { return launch<D()>(p); });
#include <cuda_runtime.h>

#include <type_traits>

namespace forwardpass {

// What f returned, or an error where no value matched: a kernel that was never launched is not a success.
template <auto... Values, class T, class F>
[[nodiscard]] cudaError_t dispatch(T value, F&& f) {
  cudaError_t error = cudaErrorInvalidValue;
  (void)((value == T(Values) && (error = f(std::integral_constant<decltype(Values), Values>{}), true)) || ...);
  return error;
}

}  // namespace forwardpass
