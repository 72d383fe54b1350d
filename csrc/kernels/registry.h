#pragma once
// Which kernels of an operation are in this library. Each file registers those that it has, and the operation's entry
// point chooses among them: whatever architectures the library was built for, no kernel is called that is not there.
//
//   namespace {  // files may have functions of the same names
//   const GemmKernel kernels[] = {{.arch = sm_80, …}};
//   const Registered<Int8GemmParams, GemmKernel> registered(kernels);
//   }
#include <cstddef>

#include "params/device.h"

namespace forwardpass {

// What a kernel was compiled for: this architecture and later ones, or, with instructions of its own, this one only.
struct Arch {
  int32_t number;
  bool only;
};
constexpr Arch sm_80{80, false}, sm_89{89, false}, sm_90a{90, true};

constexpr bool runs_on(Arch arch, const Device& device) {
  return arch.only ? device.arch == arch.number : device.arch >= arch.number;
}

// Kernels of the operation that Params names, those of one file.
template <class Params, class Kernel>
class Registered {
 public:
  template <size_t N>
  explicit Registered(const Kernel (&kernels)[N]) : kernels_(kernels), count_(N), next_(first_) {
    first_ = this;
  }
  // f(kernel) for those of all files, in no order that counts.
  template <class F>
  static void for_each(F f) {
    for (const Registered* r = first_; r; r = r->next_)
      for (size_t i = 0; i < r->count_; ++i) f(r->kernels_[i]);
  }

 private:
  const Kernel* kernels_;
  size_t count_;
  const Registered* next_;
  static inline const Registered* first_ = nullptr;  // a constant, so there before any constructor runs
};

}  // namespace forwardpass
