#include "params/append_kv.h"

#include <cmath>

#include "torch/kv_cache.h"
#include "torch/ops.h"

namespace forwardpass {
namespace {

void check_written(const Tensor& x, const char* name) {
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(x.size(d) <= 1 || x.stride(d) != 0, "append_kv: ", name, " is expanded and cannot be written");
}

// Of one memory what is written of v would overwrite k.
template <class T>
void check_apart(const T& k, const T& v, const char* name) {
  STD_TORCH_CHECK(!k.data || k.data != v.data || k.first != v.first || k.row != v.row || k.head != v.head,
                  "append_kv: the ", name, " of k and v are the same memory");
}

Affine norm_weight(const OptionalTensor& w, const Tensor& k, const char* name) {
  if (!w) return {};
  const char* op = "append_kv";
  STD_TORCH_CHECK(w->scalar_type() == ScalarType::Float || w->scalar_type() == k.scalar_type(), op, ": ", name,
                  " must be float32 or of k's dtype");
  return {vector<void>(w, k.size(3), w->scalar_type(), k, op, name), dtype_of(w->scalar_type(), op, name)};
}

AttentionTensor rotary(const Tensor& x, const Tensor& k, const Tensor& cos, const char* name) {
  const char* op = "append_kv";
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(0) == 1 || x.size(0) == k.size(0)) && x.size(1) == k.size(1) &&
                      x.size(2) == cos.size(2) && x.size(2) >= 2 && x.size(2) <= k.size(3) && x.size(2) % 2 == 0,
                  op, ": ", name, " must be [B or 1, S, R], R even");
  STD_TORCH_CHECK(x.stride(2) == 1 && same_device(x, k), op, ": ", name,
                  " must be on k's device, its columns in order");
  STD_TORCH_CHECK(x.scalar_type() == cos.scalar_type() &&
                      (x.scalar_type() == ScalarType::Float || x.scalar_type() == k.scalar_type()),
                  op, ": ", name, " must be float32 or of k's dtype");
  return {x.const_data_ptr(), stride_of(x, 0), stride_of(x, 1), 0};
}

}  // namespace

void append_kv(Backend backend, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& seq_lens, const OptionalTensor& block_table, const OptionalTensor& k_scale,
               const OptionalTensor& v_scale, const OptionalTensor& cos, const OptionalTensor& sin,
               const OptionalTensor& q, const OptionalTensor& q_out, const OptionalTensor& q_norm,
               const OptionalTensor& k_norm, double norm_eps, bool interleaved) {
  const char* op = "append_kv";
  AppendKvParams p{};
  p.k = new_rows(k, op, "k"), p.v = new_rows(v, op, "v");
  p.dtype = dtype_of(k.scalar_type(), op, "k");
  for (int64_t d = 0; d < 3; ++d)
    STD_TORCH_CHECK(k.size(d) == v.size(d), op, ": k and v must have one shape, columns apart");
  STD_TORCH_CHECK(k.scalar_type() == v.scalar_type() && same_device(k, v), op,
                  ": k and v must have one dtype and device");
  p.cache = kv_cache(k, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, op);
  STD_TORCH_CHECK(k.size(2) == p.cache.heads, op, ": k must have the heads of k_cache");
  STD_TORCH_CHECK(v.size(3) == p.cache.value_dim, op, ": v must have the columns of v_cache");
  check_written(k_cache, "k_cache"), check_written(v_cache, "v_cache");
  if (k_scale) check_written(*k_scale, "k_scale"), check_written(*v_scale, "v_scale");
  check_apart(p.cache.k, p.cache.v, "caches");
  if (p.cache.k_scale.per_token && p.cache.v_scale.per_token) check_apart(p.cache.k_scale, p.cache.v_scale, "scales");
  p.tokens = size32(k.size(1), op, "tokens");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), op, ": cos and sin go together");
  if (cos) {
    p.cos = rotary(*cos, k, *cos, "cos"), p.sin = rotary(*sin, k, *cos, "sin");
    p.rotary_dtype = dtype_of(cos->scalar_type(), op, "cos");
    p.rotated = static_cast<int32_t>(cos->size(2));
  }
  STD_TORCH_CHECK(cos || !interleaved, op, ": interleaved says how cos and sin rotate: pass them");
  p.interleaved = interleaved;
  STD_TORCH_CHECK(q.has_value() == q_out.has_value(), op, ": q and q_out go together");
  if (q) {
    p.q = new_rows(*q, op, "q");
    for (const Tensor& x : {*q, *q_out})
      STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == k.size(0) && x.size(1) == k.size(1) && x.size(2) == q->size(2) &&
                          x.size(3) == k.size(3) && x.scalar_type() == k.scalar_type() && same_device(x, k),
                      op, ": q and q_out must have the sequences, tokens, columns, dtype and device of k");
    STD_TORCH_CHECK(q_out->is_contiguous(), op, ": q_out must be contiguous");
    p.q_out = q_out->mutable_data_ptr();
    p.q_heads = size32(q->size(2), op, "heads of q");
  }
  STD_TORCH_CHECK(q || !q_norm, op, ": q_norm goes with q");
  p.q_norm = norm_weight(q_norm, k, "q_norm"), p.k_norm = norm_weight(k_norm, k, "k_norm");
  p.eps = static_cast<float>(norm_eps);
  STD_TORCH_CHECK(p.eps >= 0 && std::isfinite(p.eps), op, ": norm_eps must be at least 0");
  if (backend != Backend::cpu) p.device = device_of(backend, k);
  if (k.numel()) launch(backend, p, k, append_kv_cpu);
}

}  // namespace forwardpass
