#include "torch/kv_cache.h"

namespace forwardpass {
namespace {

CacheTensor cache_tensor(const Tensor& t, const Tensor& like, const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(same_device(t, x), op, ": ", name, " is on another device than the input");
  STD_TORCH_CHECK(t.dim() == 4 && t.size(1) >= 1 && t.size(2) >= 1 && t.size(3) >= 1, op, ": ", name,
                  " must be [B or P, L or page, Hk, columns]");
  for (int64_t d = 0; d < 3; ++d)
    STD_TORCH_CHECK(t.size(d) == like.size(d), op, ": k_cache and v_cache must have one shape, columns apart");
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": k_cache and v_cache must have one dtype");
  STD_TORCH_CHECK(t.size(3) == 1 || t.stride(3) == 1, op, ": the last dimension of ", name, " must have stride 1");
  return {t.mutable_data_ptr(), stride_of(t, 0), stride_of(t, 1), stride_of(t, 2)};
}

CacheScale cache_scale(const OptionalTensor& s, const Tensor& cache, bool is_8bit, const char* op, const char* name) {
  STD_TORCH_CHECK(s.has_value() == is_8bit, op, ": ", name, " goes with an int8 or float8_e4m3fn cache");
  if (!s) return {};
  STD_TORCH_CHECK(s->scalar_type() == ScalarType::Float && same_device(*s, cache), op, ": ", name,
                  " must be float32, on the cache's device");
  CacheScale scale{static_cast<float*>(s->mutable_data_ptr()), 0, 0, 0, s->dim() == 3};
  if (scale.per_token) {
    for (int64_t d = 0; d < 3; ++d)
      STD_TORCH_CHECK(s->size(d) == cache.size(d), op, ": ", name, " must have the cache's shape without D");
    scale.first = stride_of(*s, 0), scale.row = stride_of(*s, 1), scale.head = stride_of(*s, 2);
  } else {
    STD_TORCH_CHECK(s->dim() == 1 && (s->size(0) == 1 || s->size(0) == cache.size(2)), op, ": ", name,
                    " must be [1], [Hk] or have the cache's shape without D");
    scale.head = stride_of(*s, 0);
  }
  return scale;
}

}  // namespace

AttentionTensor new_rows(const Tensor& x, const char* op, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(2) >= 1 && x.size(3) >= 1, op, ": ", name, " must be [B, S, heads, D]");
  STD_TORCH_CHECK(x.size(3) == 1 || x.stride(3) == 1, op, ": the last dimension of ", name, " must have stride 1");
  STD_TORCH_CHECK(is_float(dtype_of(x.scalar_type(), op, name)), op, ": ", name,
                  " must be float16, bfloat16 or float32");
  return {x.const_data_ptr(), stride_of(x, 0), stride_of(x, 1), stride_of(x, 2)};
}

KvCache kv_cache(const Tensor& x, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                 const OptionalTensor& block_table, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                 const char* op) {
  KvCache c{};
  c.k = cache_tensor(k_cache, k_cache, x, op, "k_cache");
  c.v = cache_tensor(v_cache, k_cache, x, op, "v_cache");
  c.dtype = dtype_of(k_cache.scalar_type(), op, "k_cache");
  const bool is_8bit = c.dtype == Dtype::i8 || c.dtype == Dtype::e4m3;
  STD_TORCH_CHECK(is_8bit || k_cache.scalar_type() == x.scalar_type(), op,
                  ": the cache must be int8, float8_e4m3fn or of the input's dtype");
  c.k_scale = cache_scale(k_scale, k_cache, is_8bit, op, "k_scale");
  c.v_scale = cache_scale(v_scale, v_cache, is_8bit, op, "v_scale");
  c.batch = size32(x.size(0), op, "sequences");
  c.heads = size32(k_cache.size(2), op, "heads");
  STD_TORCH_CHECK(k_cache.size(3) == x.size(3), op, ": k_cache must have ", x.size(3), " columns");
  c.head_dim = size32(x.size(3), op, "columns");
  c.value_dim = size32(v_cache.size(3), op, "columns");
  c.pages = size32(k_cache.size(0), op, "pages");
  c.page = size32(k_cache.size(1), op, "rows of the cache");
  c.blocks = 1;
  STD_TORCH_CHECK(seq_lens.dim() == 1, op, ": seq_lens must be [B]");
  c.seq_lens = ints(seq_lens, c.batch, x, op, "seq_lens");
  if (!block_table) {
    STD_TORCH_CHECK(c.pages == c.batch, op,
                    ": without a block_table k_cache must have a sequence for each of the input");
    return c;
  }
  const Tensor& t = *block_table;
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && same_device(t, x), op,
                  ": block_table must be int32, on the input's device");
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == c.batch && t.size(1) >= 1 && (t.size(1) == 1 || t.stride(1) == 1), op,
                  ": block_table must be [", c.batch, ", n], its last dimension with stride 1");
  STD_TORCH_CHECK(c.pages >= 1, op, ": there must be pages");
  c.block_table = static_cast<const int32_t*>(t.const_data_ptr());
  c.table_stride = stride_of(t, 0);
  c.blocks = size32(t.size(1), op, "columns of block_table");
  return c;
}

}  // namespace forwardpass
