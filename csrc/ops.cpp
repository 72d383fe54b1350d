// Every schema and every registration, on one screen. <name>_cpu: csrc/cpu. <name>_cuda: the CUDA kernels; on CPU tensors the
// same kernels, interpreted. <name>_triton: python/forwardpass/<name>/triton_kernel.py, registered there.
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace forwardpass {
namespace {

// on<quantize, Backend::cpu>::call is quantize with its first argument bound, as a plain function for TORCH_BOX.
template <auto F, Backend B, class = decltype(F)>
struct on;
template <auto F, Backend B, class R, class... Args>
struct on<F, B, R (*)(Backend, Args...)> {
  static R call(Args... args) { return F(B, args...); }
};

}  // namespace
}  // namespace forwardpass

using namespace forwardpass;

#define QUANTIZE_OPTIONS "bool symmetric, Tensor? channel_scale) -> (Tensor q, Tensor scale, Tensor zero_point"
#define NORM_OPTIONS "Tensor? weight, float eps, ScalarType dtype, str kind, Tensor? bias, "

#define FOR_EACH_OP(X) \
  X(quantize, "(Tensor x, ScalarType dtype, Tensor? scale, Tensor? zero_point, int? group_size, " QUANTIZE_OPTIONS ")") \
  X(norm_quantize, "(Tensor x, " NORM_OPTIONS QUANTIZE_OPTIONS ")") \
  X(add_norm_quantize, "(Tensor x, Tensor residual, " NORM_OPTIONS QUANTIZE_OPTIONS ", Tensor residual_out)")

STABLE_TORCH_LIBRARY(forwardpass, m) {
#define DEFINE(name, schema)        \
  m.def(#name "_cpu" schema);       \
  m.def(#name "_triton" schema);    \
  m.def(#name "_cuda" schema);
  FOR_EACH_OP(DEFINE)
  m.def("_set_library(int interpreted, str path) -> ()");
  m.def("_set_poison(bool on) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(forwardpass, CPU, m) {
#define ON_CPU(name, schema)                                               \
  m.impl(#name "_cpu", TORCH_BOX((&on<&name, Backend::cpu>::call)));       \
  m.impl(#name "_cuda", TORCH_BOX((&on<&name, Backend::interpreted>::call)));
  FOR_EACH_OP(ON_CPU)
}
STABLE_TORCH_LIBRARY_IMPL(forwardpass, CUDA, m) {
#define ON_CUDA(name, schema) m.impl(#name "_cuda", TORCH_BOX((&on<&name, Backend::cuda>::call)));
  FOR_EACH_OP(ON_CUDA)
}
STABLE_TORCH_LIBRARY_IMPL(forwardpass, CompositeExplicitAutograd, m) {
  m.impl("_set_library", TORCH_BOX(&set_library));
  m.impl("_set_poison", TORCH_BOX(&set_poison));
}
