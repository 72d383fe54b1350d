#pragma once
// Run-time value -> compile-time constant, in place of nested switch macros:
//   dispatch<Dtype::f32, Dtype::f16>(p.x.dtype, [&](auto D) { launch<D()>(p); });
#include <type_traits>

namespace forwardpass {

// False where no value matched; the torch side has checked, so the caller turns it into an error code.
template <auto... Values, class T, class F>
bool dispatch(T value, F&& f) {
  return ((value == T(Values) && (f(std::integral_constant<decltype(Values), Values>{}), true)) || ...);
}

}  // namespace forwardpass
