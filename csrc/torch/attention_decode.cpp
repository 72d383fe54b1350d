#include "params/attention_decode.h"

#include "torch/attention.h"
#include "torch/kv_cache.h"
#include "torch/ops.h"

namespace forwardpass {

namespace {

bool is_aligned(const CacheTensor& t, int32_t columns, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 &&
         (t.first | t.row | t.head | columns) * size_of(dtype) % 16 == 0;
}

// o and, if p.lse is not null already, what it points to.
void run(Backend backend, AttentionDecodeParams& p, const Tensor& q, const char* op) {
  STD_TORCH_CHECK(p.dtype != Dtype::f32, op, ": on a GPU q must be float16 or bfloat16");
  const KvCache& c = p.cache;
  STD_TORCH_CHECK(c.head_dim <= 256 && c.value_dim <= 256 && is_aligned(c.k, c.head_dim, c.dtype) &&
                      is_aligned(c.v, c.value_dim, c.dtype),
                  op,
                  ": on a GPU the cache must have rows of a multiple of 16 bytes, up to 256 columns, at addresses "
                  "that are multiples of 16");
  Tensor copy;                                                 // which lives until the kernel is launched
  const int64_t bytes = p.sharing_rows() > kFewRows ? 16 : 4;  // that a kernel reads together
  if (reinterpret_cast<uintptr_t>(p.q.data) % bytes || (p.q.batch | p.q.row | p.q.head) * 2 % bytes) {
    copy = contiguous_rows(sizes_of(q), q.scalar_type(), q);
    torch::stable::copy_(copy, q);
    p.q = new_rows(copy, op, "q");
  }
  launch_chosen(backend, p, q);
}

}  // namespace

template <bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attention_decode(
    Backend backend, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
    const OptionalTensor& block_table, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
    std::optional<double> scale, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double softcap, const OptionalTensor& sinks,
    bool batch_invariant,  // of the CPU's kernel no row depends on others
    const OptionalTensor& leftpad, const OptionalTensor& alibi_slopes) {
  const char* op = kLse ? "attention_decode_with_lse" : "attention_decode";
  AttentionDecodeParams p{};
  p.q = new_rows(q, op, "q");
  p.dtype = dtype_of(q.scalar_type(), op, "q");
  p.heads = size32(q.size(2), op, "heads");
  p.rows = size32(q.size(1), op, "rows");
  STD_TORCH_CHECK(p.rows >= 1, op, ": q must have a row for each sequence");
  p.cache = kv_cache(q, k_cache, v_cache, seq_lens, block_table, k_scale, v_scale, op);
  STD_TORCH_CHECK(p.heads % p.cache.heads == 0, op, ": the heads of q must be a multiple of the cache's");
  set_scores(p, p.cache.head_dim, scale, softcap, sinks, q, q.scalar_type(), op);
  set_alibi(p, alibi_slopes, p.cache.batch, q, op);
  p.left = window_side(window_left, op);
  window_side(window_right, op);  // checked alone: causality bounds that side
  if (leftpad) p.leftpad = ints(leftpad, p.cache.batch, q, op, "leftpad");
  p.batch_invariant = batch_invariant;
  auto sizes = sizes_of(q);
  sizes.back() = p.cache.value_dim;
  Tensor out = contiguous_rows(sizes, q.scalar_type(), q), lse;
  p.out = out.mutable_data_ptr();
  if constexpr (kLse) {
    lse = contiguous_rows({p.cache.batch, p.heads, p.rows}, ScalarType::Float, q);
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
  }
  if (out.numel()) backend == Backend::cpu ? attention_decode_cpu(p) : run(backend, p, q, op);
  if constexpr (kLse)
    return {out, lse};
  else
    return out;
}

template decltype(attention_decode<false>) attention_decode<false>;
template decltype(attention_decode<true>) attention_decode<true>;

}  // namespace forwardpass
