#include "params/attention_decode.h"

#include "torch/attention_scores.h"
#include "torch/kv_cache.h"
#include "torch/ops.h"

namespace forwardpass {

namespace {

LibraryFunction<int64_t(const AttentionDecodeParams*)> workspace_bytes("forwardpass_attention_decode_workspace");

bool is_aligned(const CacheTensor& t, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (t.first | t.row | t.head) * size_of(dtype) % 16 == 0;
}

}  // namespace

Tensor attention_decode(Backend backend, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& seq_lens, const OptionalTensor& block_table, const OptionalTensor& k_scale,
                        const OptionalTensor& v_scale, std::optional<double> scale, std::optional<int64_t> window_left,
                        std::optional<int64_t> window_right, double softcap, const OptionalTensor& sinks,
                        bool batch_invariant,  // of the CPU's kernel no row depends on others
                        const OptionalTensor& leftpad) {
  const char* op = "attention_decode";
  AttentionDecodeParams p{};
  p.q = new_rows(q, op, "q");
  p.dtype = dtype_of(q.scalar_type(), op, "q");
  p.heads = size32(q.size(2), op, "heads");
  p.rows = size32(q.size(1), op, "rows");
  STD_TORCH_CHECK(p.rows >= 1 && p.rows <= 8, op, ": q must have 1 to 8 rows a sequence, not ", p.rows);
  p.cache = kv_cache(q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, op);
  STD_TORCH_CHECK(p.heads % p.cache.heads == 0, op, ": the heads of q must be a multiple of the cache's");
  set_scores(p, p.cache.head_dim, scale, softcap, sinks, q, op);
  p.left = window_side(window_left, op);
  window_side(window_right, op);  // checked alone: causality bounds that side
  if (leftpad) p.leftpad = ints(leftpad, p.cache.batch, q, op, "leftpad");
  Tensor out = contiguous_rows(sizes_of(q), q.scalar_type(), q);
  p.out = out.mutable_data_ptr();
  if (backend == Backend::cpu) {
    if (out.numel()) attention_decode_cpu(p);
    return out;
  }
  if (out.numel() == 0) return out;
  STD_TORCH_CHECK(p.dtype != Dtype::f32, op, ": on a GPU q must be float16 or bfloat16");
  STD_TORCH_CHECK(p.cache.head_dim <= 256 && p.cache.head_dim * size_of(p.cache.dtype) % 16 == 0 &&
                      is_aligned(p.cache.k, p.cache.dtype) && is_aligned(p.cache.v, p.cache.dtype),
                  op,
                  ": on a GPU the cache must have rows of a multiple of 16 bytes, up to 256 columns, at addresses "
                  "that are multiples of 16");
  Tensor copy;  // which lives until the kernel is launched
  if (reinterpret_cast<uintptr_t>(p.q.data) % 4 || (p.q.batch | p.q.row | p.q.head) % 2) {
    copy = contiguous_rows(sizes_of(q), q.scalar_type(), q);
    torch::stable::copy_(copy, q);
    p.q = new_rows(copy, op, "q");
  }
  p.batch_invariant = batch_invariant;
  p.device = device_of(backend, q);
  const Tensor workspace = empty_strided({workspace_bytes.of(backend)(&p) / 4}, {1}, ScalarType::Float, q);
  p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
  launch(backend, p, q);
  return out;
}

}  // namespace forwardpass
