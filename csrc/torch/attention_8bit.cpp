#include "params/attention_8bit.h"

#include "cpu/attention_8bit.h"
#include "torch/attention_params.h"

namespace forwardpass {
namespace {

constexpr int32_t kMostColumns = 1 << 17;  // whose products an int32 sums

void check_columns(const AttentionParams& p, const char* op) {
  STD_TORCH_CHECK(p.head_dim <= kMostColumns, op, ": q and k must have at most ", kMostColumns, " columns, not ",
                  p.head_dim);
}

bool is_fp8(const std::string& dtype, Backend backend, const char* op) {
  STD_TORCH_CHECK(dtype == "int8" || dtype == "fp8", op, ": dtype must be int8 or fp8, not ", dtype);
  const bool fp8 = dtype == "fp8";
  STD_TORCH_CHECK(!fp8 || backend != Backend::cpu, op, ": no CPU multiplies e4m3");
  return fp8;
}
constexpr ScalarType value_type(bool fp8) { return fp8 ? ScalarType::Float8_e4m3fn : ScalarType::Char; }

template <class T>
T* memory(Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Scales of operands in 8 bits, where q, k and v are such.
struct GivenScales {
  OptionalTensorRef q_scale, q_shift, k_scale, v_scale, v_block_scale;
  bool any() const { return q_scale || q_shift || k_scale || v_scale || v_block_scale; }
  bool all(bool fp8) const {
    return q_scale && q_shift && k_scale && v_scale && static_cast<bool>(v_block_scale) != fp8;
  }
};

// What a call has of `scales`. What AttentionOperands points to is not written.
AttentionOperands given_operands(const AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, bool fp8,
                                 const GivenScales& scales, const char* op) {
  STD_TORCH_CHECK(scales.all(fp8), op, ": q_scale, q_shift, k_scale, v_scale, v_block_scale and out_dtype go together");
  const int64_t sequences = p.cu_seqlens_q ? 1 : p.batch, rows = sequences * p.rows * p.heads,
                keys = sequences * p.keys * p.kv_heads;
  const auto integers = [&](const Tensor& x, ScalarType type, const char* name) {
    return const_cast<int8_t*>(elements<int8_t>(x, x.numel(), type, q, op, name));
  };
  const auto floats_of = [&](OptionalTensorRef x, int64_t n, const char* name) {
    return const_cast<float*>(elements<float>(x, n, ScalarType::Float, q, op, name));
  };
  return {.q = integers(q, ScalarType::Char, "q"),
          .q_scale = floats_of(scales.q_scale, rows, "q_scale"),
          .q_shift = floats_of(scales.q_shift, rows, "q_shift"),
          .k = integers(k, ScalarType::Char, "k"),
          .k_scale = floats_of(scales.k_scale, keys, "k_scale"),
          .v = integers(v, value_type(fp8), "v"),
          .v_scale = floats_of(scales.v_scale, int64_t{p.batch} * p.kv_heads * p.value_dim, "v_scale"),
          .v_block_scale = fp8 ? nullptr : floats_of(scales.v_block_scale, keys, "v_block_scale")};
}

Tensor run_8bit(Backend backend, const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                const std::string& dtype, bool rotates, const AttentionOptions& o, const GivenScales& scales,
                Tensor* lse) {
  const bool fp8 = is_fp8(dtype, backend, op);
  STD_TORCH_CHECK(scales.any() == o.out_dtype.has_value(), op,
                  ": q_scale, q_shift, k_scale, v_scale, v_block_scale and out_dtype go together");
  Attention8bitParams p{attention_params(op, q, k, v, o), fp8, rotates, {}};
  check_columns(p, op);
  if (scales.any()) p.quantized = given_operands(p, q, k, v, fp8, scales, op);
  return run_attention(backend, op, p, q, k, v, o, lse, [&](Tensor&) { attention_8bit_cpu(p); });
}

}  // namespace

template <bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attention_8bit(
    Backend backend, const Tensor& q, const Tensor& k, const Tensor& v, const std::string& dtype, bool rotates,
    std::optional<double> scale, bool causal, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double softcap, const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool batch_invariant,
    const OptionalTensor& q_scale, const OptionalTensor& q_shift, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& v_block_scale, std::optional<ScalarType> out_dtype) {
  const GivenScales scales{
      .q_scale = q_scale, .q_shift = q_shift, .k_scale = k_scale, .v_scale = v_scale, .v_block_scale = v_block_scale};
  const AttentionOptions options{.scale = scale,
                                 .causal = causal,
                                 .window_left = window_left,
                                 .window_right = window_right,
                                 .softcap = softcap,
                                 .mask = mask,
                                 .alibi_slopes = alibi_slopes,
                                 .sinks = sinks,
                                 .cu_seqlens_q = cu_seqlens_q,
                                 .cu_seqlens_k = cu_seqlens_k,
                                 .batch_invariant = batch_invariant,
                                 .out_dtype = out_dtype};
  if constexpr (kLse) {
    Tensor lse;
    Tensor out = run_8bit(backend, "attention_8bit_with_lse", q, k, v, dtype, rotates, options, scales, &lse);
    return {out, lse};
  } else {
    return run_8bit(backend, "attention_8bit", q, k, v, dtype, rotates, options, scales, nullptr);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize_attention(
    Backend backend, const Tensor& q, const Tensor& k, const Tensor& v, const std::string& dtype, bool rotates,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k) {
  const char* op = "quantize_attention";
  const AttentionOptions options{.cu_seqlens_q = cu_seqlens_q, .cu_seqlens_k = cu_seqlens_k};
  const bool fp8 = is_fp8(dtype, backend, op);
  QuantizeAttentionParams p{{attention_params(op, q, k, v, options), fp8, rotates, {}}, {}};
  check_columns(p, op);
  const auto empty = [&](const Tensor& x, ScalarType type) { return contiguous_rows(sizes_of(x), type, q); };
  const auto scales = [&](const Tensor& x) {
    auto sizes = sizes_of(x);
    sizes.pop_back();
    return contiguous_rows(sizes, ScalarType::Float, q);
  };
  std::tuple result{empty(q, ScalarType::Char),
                    scales(q),
                    scales(q),
                    empty(k, ScalarType::Char),
                    scales(k),
                    empty(v, value_type(fp8)),
                    contiguous_rows({p.batch, p.kv_heads, p.value_dim}, ScalarType::Float, q),
                    fp8 ? contiguous_rows({0}, ScalarType::Float, q) : scales(k)};
  auto& [q8, q_scale, q_shift, k8, k_scale, v8, v_scale, v_block_scale] = result;
  p.to = {.q = memory<int8_t>(q8),
          .q_scale = memory<float>(q_scale),
          .q_shift = memory<float>(q_shift),
          .k = memory<int8_t>(k8),
          .k_scale = memory<float>(k_scale),
          .v = memory<int8_t>(v8),
          .v_scale = memory<float>(v_scale),
          .v_block_scale = memory<float>(v_block_scale)};
  if (cu_seqlens_q) {  // what is of no known sequence
    for (Tensor* x : {&q_scale, &q_shift, &k_scale, &v_block_scale}) torch::stable::fill_(*x, NAN);
    for (Tensor* x : {&q8, &k8, &v8, &v_scale}) torch::stable::zero_(*x);
  }
  if (p.keys == 0) torch::stable::zero_(v_scale);
  if (p.batch == 0 || p.rows + p.keys == 0) return result;
  if (backend == Backend::cpu) {
    quantize_attention_cpu(p);
  } else {
    const OperandCopies copies = operands_of_gpu(op, p, q, k, v);
    launch_chosen(backend, p, q);
  }
  return result;
}

template decltype(attention_8bit<false>) attention_8bit<false>;
template decltype(attention_8bit<true>) attention_8bit<true>;

}  // namespace forwardpass
