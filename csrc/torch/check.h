#pragma once
// The second line of argument checks. fp.ops checks the same before the first call with arguments of some types, and
// after an error from here, for a full sentence (the op's __init__.py); callers of torch.ops come here at once. Also
// the allocation of outputs, and the one way to launch.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "params/affine.h"
#include "params/common.h"
#include "torch/library.h"

namespace forwardpass {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An optional tensor by reference, as a copy of a Tensor would cost two atomic operations. It cannot be made from a
// temporary, which would not live long enough.
class OptionalTensorRef {
 public:
  OptionalTensorRef() = default;
  OptionalTensorRef(const Tensor& t) : tensor_(&t) {}
  OptionalTensorRef(const OptionalTensor& t) : tensor_(t ? &*t : nullptr) {}
  OptionalTensorRef(Tensor&&) = delete;
  OptionalTensorRef(OptionalTensor&&) = delete;

  bool has_value() const { return tensor_; }
  explicit operator bool() const { return tensor_; }
  const Tensor& operator*() const { return *tensor_; }
  const Tensor* operator->() const { return tensor_; }

 private:
  const Tensor* tensor_ = nullptr;
};

// Throws if a call of the shim has failed. Torch's macro for that changes its name from release to release.
inline void check_shim(AOTITorchError error) {
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "a call into libtorch failed");
}

inline Dtype dtype_of(ScalarType t, const char* op, const char* name) {
  switch (t) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Char:
      return Dtype::i8;
    case ScalarType::Float8_e4m3fn:
      return Dtype::e4m3;
    case ScalarType::Int:
      return Dtype::i32;
    default:
      STD_TORCH_CHECK(false, op, ": unsupported dtype of ", name);
  }
}

inline bool is_float(Dtype t) { return t == Dtype::f32 || t == Dtype::f16 || t == Dtype::bf16; }

// An activation by its name in Python (forwardpass/ops/common/activations.py).
inline Activation activation_of(const std::optional<std::string>& name, const char* op) {
  static constexpr std::pair<const char*, Activation> kActivations[] = {
      {"relu", Activation::relu},
      {"gelu", Activation::gelu},
      {"gelu_tanh", Activation::gelu_tanh},
      {"silu", Activation::silu},
      {"relu6", Activation::relu6},
      {"hard_swish", Activation::hard_swish},
      {"silu_mul", Activation::silu_mul},
      {"gelu_mul", Activation::gelu_mul},
      {"gelu_tanh_mul", Activation::gelu_tanh_mul},
  };
  if (!name) return Activation::none;
  for (const auto& [activation_name, activation] : kActivations)
    if (*name == activation_name) return activation;
  STD_TORCH_CHECK(false, op, ": there is no activation ", *name);
}

// x [..., K] as a matrix: throws unless the last stride is 1 and the leading dimensions collapse into one row stride.
inline Matrix matrix(const Tensor& x, const char* op, const char* name) {
  const int64_t n = x.dim();
  STD_TORCH_CHECK(n >= 1 && x.size(n - 1) >= 1, op, ": ", name, " needs a last dimension that is not empty");
  Matrix m{x.const_data_ptr(), dtype_of(x.scalar_type(), op, name), 1, x.size(n - 1), x.size(n - 1)};
  STD_TORCH_CHECK(m.columns <= 1 || x.stride(n - 1) == 1, op, ": the last dimension of ", name, " must have stride 1");
  bool first = true;
  for (int64_t d = n - 2; d >= 0; --d) {
    if (x.size(d) == 1) continue;
    if (first) m.stride = x.stride(d);
    STD_TORCH_CHECK(x.numel() == 0 || first || x.stride(d) == m.stride * m.rows, op, ": the leading dimensions of ",
                    name, " must collapse into one row stride");
    first = false;
    m.rows *= x.size(d);
  }
  return m;
}

inline std::vector<int64_t> sizes_of(const Tensor& x) {
  auto s = x.sizes();
  return std::vector<int64_t>(s.begin(), s.end());
}

// 0 for a dimension with one element, so that alignment checks need not look at it.
inline int64_t stride_of(const Tensor& x, int64_t d) { return x.size(d) == 1 ? 0 : x.stride(d); }

inline int32_t size32(int64_t n, const char* op, const char* what) {
  STD_TORCH_CHECK(n >= 0 && n <= 1 << 30, op, ": ", what, " must be at most 2^30, not ", n);
  return static_cast<int32_t>(n);
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device_index() == b.get_device_index();
}

// An operand of a GEMM, int8 or e4m3, on x's device.
inline Matrix operand(const Tensor& t, Dtype type, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(same_device(t, x), op, ": ", name, " is on another device than the input");
  Matrix m = matrix(t, op, name);
  STD_TORCH_CHECK(m.dtype == type, op, ": ", name, " must be ", type == Dtype::i8 ? "int8" : "float8_e4m3fn");
  return m;
}
// The second operand of a GEMM, [N, columns]: its b, or the weight of a Linear.
inline Matrix b_operand(const Tensor& t, Dtype type, int64_t columns, const Tensor& x, const char* op,
                        const char* name) {
  Matrix m = operand(t, type, x, op, name);
  STD_TORCH_CHECK(t.dim() == 2 && m.columns == columns, op, ": ", name, " must be [N, ", columns, "]");
  return m;
}

// An optional contiguous tensor of `size` elements, whatever its shape, on x's device.
template <class T>
const T* elements(OptionalTensorRef v, int64_t size, ScalarType type, const Tensor& x, const char* op,
                  const char* name) {
  if (!v) return nullptr;
  STD_TORCH_CHECK(v->scalar_type() == type, op, ": wrong dtype of ", name);
  STD_TORCH_CHECK(v->numel() == size && v->is_contiguous(), op, ": ", name, " must be contiguous with ", size,
                  " elements");
  STD_TORCH_CHECK(same_device(*v, x), op, ": ", name, " is on another device than the input");
  return static_cast<const T*>(v->const_data_ptr());
}

// The same of one dimension, or of one element: torch would broadcast [N, 1] otherwise than a kernel reads it.
template <class T>
const T* vector(OptionalTensorRef v, int64_t size, ScalarType type, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(!v || size == 1 || v->dim() == 1, op, ": ", name, " must have one dimension");
  return elements<T>(v, size, type, x, op, name);
}

inline const float* floats(OptionalTensorRef v, int64_t size, const Tensor& x, const char* op, const char* name) {
  return vector<float>(v, size, ScalarType::Float, x, op, name);
}
inline const int32_t* ints(OptionalTensorRef v, int64_t size, const Tensor& x, const char* op, const char* name) {
  return vector<int32_t>(v, size, ScalarType::Int, x, op, name);
}

// A vector over the columns of x, whose tensor is `like`, in float32 or in the dtype of x.
inline Affine affine(OptionalTensorRef v, const Matrix& x, const Tensor& like, const char* op, const char* name) {
  if (!v) return {nullptr, x.dtype};
  const Dtype dtype = dtype_of(v->scalar_type(), op, name);
  STD_TORCH_CHECK(dtype == x.dtype || dtype == Dtype::f32, op, ": ", name, " must be float32 or have the dtype of x");
  return {vector<void>(v, x.columns, v->scalar_type(), like, op, name), dtype};
}

// Throws unless t is of these sizes: as many elements in another shape would be read as others.
inline void check_sizes(const Tensor& t, std::initializer_list<int64_t> sizes, const char* op, const char* name) {
  const auto s = t.sizes();
  STD_TORCH_CHECK(std::equal(s.begin(), s.end(), sizes.begin(), sizes.end()), op, ": ", name,
                  " must have another shape");
}

inline Tensor empty_strided(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType type,
                            const Tensor& like) {
  AtenTensorHandle handle;
  int32_t device_type, device_index;
  check_shim(aoti_torch_get_device_type(like.get(), &device_type));
  check_shim(aoti_torch_get_device_index(like.get(), &device_index));
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  check_shim(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype,
                                      device_type, device_index, &handle));
  Tensor t(handle);
  report_storage(t);
  if (poison())
    torch::stable::fill_(t,
                         is_float(dtype_of(type, "poison", "output")) || type == ScalarType::Float8_e4m3fn ? NAN : -1);
  return t;
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// [lead..., columns], rows `stride` elements apart, leading dimensions collapsible.
inline Tensor empty_rows(const std::vector<int64_t>& sizes, int64_t stride, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  return empty_strided(sizes, strides, type, like);
}
inline Tensor contiguous_rows(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  return empty_rows(sizes, sizes.back(), type, like);
}
// Rows padded to multiples of 16 bytes, as the main loops of the GEMMs need them.
inline Tensor padded_rows(const std::vector<int64_t>& sizes, ScalarType type, int64_t element_size,
                          const Tensor& like) {
  return empty_rows(sizes, round_up(sizes.back(), 16 / element_size), type, like);
}

// The one way to a kernel: `cpu`, a function of csrc/cpu, or the launcher that Params names, in a kernel library. An op
// without `cpu` has no CPU kernel.
template <class Params>
void launch(Backend backend, const Params& p, const Tensor& x, void (*cpu)(const Params&) = nullptr) {
  if (backend == Backend::cpu) return cpu(p);
  static LibraryFunction<int(const Params*, void*)> launcher(Params::kLauncher);
  const auto f = launcher.of(backend);
  const RelaxedCapture relaxed(backend);
  if (backend == Backend::interpreted) return check_cuda(backend, Params::kLauncher, f(&p, kInterpretedStream));
  torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_cuda(backend, Params::kLauncher, f(&p, current_stream(x.get_device_index())));
}

}  // namespace forwardpass
