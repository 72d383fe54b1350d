// Every schema and every registration, on one screen. <name>_cpu: csrc/cpu. <name>_cuda: the CUDA kernels; on CPU
// tensors the same kernels, interpreted. <name>_triton: python/forwardpass/ops/<name>/triton_kernel.py, registered
// there.
#include "torch/ops.h"

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

#define EPILOGUE_OPTIONS "Tensor? bias, str? activation, ScalarType out_dtype, "

#define GEMM_OPERANDS "(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, "

#define ATTENTION_OPERANDS                                                                          \
  "(Tensor q, Tensor k, Tensor v, float? scale, bool causal, int? window_left, int? window_right, " \
  "float softcap, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q, "        \
  "Tensor? cu_seqlens_k, bool batch_invariant) -> "

// with kernels on every backend
#define FOR_EACH_OP(X)                                                                                                 \
  X(quantize,                                                                                                          \
    "(Tensor x, ScalarType dtype, Tensor? scale, Tensor? zero_point, int? group_size, " QUANTIZE_OPTIONS ")")          \
  X(activation_quantize,                                                                                               \
    "(Tensor x, str activation, ScalarType dtype, int? group_size, str layout, " QUANTIZE_OPTIONS ")")                 \
  X(norm_quantize, "(Tensor x, " NORM_OPTIONS QUANTIZE_OPTIONS ")")                                                    \
  X(add_norm_quantize, "(Tensor x, Tensor residual, " NORM_OPTIONS QUANTIZE_OPTIONS ", Tensor residual_out)")          \
  X(dequant_activation, "(Tensor acc, Tensor? a_scale, Tensor? b_scale, " EPILOGUE_OPTIONS                             \
                        "Tensor? out_scale, Tensor? a_zero_point, Tensor? b_sum) -> Tensor")                           \
  X(int8_gemm, GEMM_OPERANDS EPILOGUE_OPTIONS "Tensor? out_scale, Tensor? a_zero_point, Tensor? b_sum) -> Tensor")     \
  X(int8_linear, "(Tensor x, Tensor weight, Tensor w_scale, " EPILOGUE_OPTIONS                                         \
                 "Tensor? scale, Tensor? zero_point, bool symmetric, Tensor? channel_scale, Tensor? w_sum) -> Tensor") \
  X(w8a16_gemm, "(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, str? activation) -> Tensor")                       \
  X(attention, ATTENTION_OPERANDS "Tensor")                                                                            \
  X(attention_with_lse, ATTENTION_OPERANDS "(Tensor o, Tensor lse)")

// on GPUs only: the CPU has no fp8 arithmetic
#define FOR_EACH_GPU_OP(X)                                                                                         \
  X(fp8_gemm, GEMM_OPERANDS EPILOGUE_OPTIONS "Tensor? out_scale) -> Tensor")                                       \
  X(fp8_gemm_quantize, GEMM_OPERANDS "Tensor? bias, str? activation, int group_size) -> (Tensor q, Tensor scale)") \
  X(fp8_linear,                                                                                                    \
    "(Tensor x, Tensor weight, Tensor w_scale, " EPILOGUE_OPTIONS "Tensor? scale, Tensor? channel_scale) -> Tensor")

STABLE_TORCH_LIBRARY(forwardpass, m) {
#define DEFINE(name, schema)     \
  m.def(#name "_cpu" schema);    \
  m.def(#name "_triton" schema); \
  m.def(#name "_cuda" schema);
  FOR_EACH_OP(DEFINE)
#define DEFINE_GPU(name, schema) \
  m.def(#name "_triton" schema); \
  m.def(#name "_cuda" schema);
  FOR_EACH_GPU_OP(DEFINE_GPU)
  m.def("_set_library(int interpreted, str path) -> ()");
  m.def("_set_poison(bool on) -> ()");
  m.def("_set_storage_hook(int address) -> ()");
  m.def("_keep_storage(bool on) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(forwardpass, CPU, m) {
#define ON_CPU(name, schema)                                         \
  m.impl(#name "_cpu", TORCH_BOX((&on<&name, Backend::cpu>::call))); \
  m.impl(#name "_cuda", TORCH_BOX((&on<&name, Backend::interpreted>::call)));
  FOR_EACH_OP(ON_CPU)
#define ON_INTERPRETED(name, schema) m.impl(#name "_cuda", TORCH_BOX((&on<&name, Backend::interpreted>::call)));
  FOR_EACH_GPU_OP(ON_INTERPRETED)
}
STABLE_TORCH_LIBRARY_IMPL(forwardpass, CUDA, m) {
#define ON_CUDA(name, schema) m.impl(#name "_cuda", TORCH_BOX((&on<&name, Backend::cuda>::call)));
  FOR_EACH_OP(ON_CUDA)
  FOR_EACH_GPU_OP(ON_CUDA)
}
STABLE_TORCH_LIBRARY_IMPL(forwardpass, CompositeExplicitAutograd, m) {
  m.impl("_set_library", TORCH_BOX(&set_library));
  m.impl("_set_poison", TORCH_BOX(&set_poison));
  m.impl("_set_storage_hook", TORCH_BOX(&set_storage_hook));
  m.impl("_keep_storage", TORCH_BOX(&keep_storage));
}
