#include "torch/attention_params.h"

#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

void check_operand(const Tensor& x, const Tensor& q, bool varlen, const char* op, const char* name) {
  const int64_t n = varlen ? 3 : 4;
  STD_TORCH_CHECK(x.dim() == n, op, ": ", name, " must have ", n, " dimensions", varlen ? " with cu_seqlens" : "");
  STD_TORCH_CHECK(x.size(n - 1) >= 1 && (x.size(n - 1) == 1 || x.stride(n - 1) == 1), op, ": the last dimension of ",
                  name, " must not be empty and must have stride 1");
  STD_TORCH_CHECK(same_device(x, q), op, ": ", name, " must be on the device of q");
}

AttentionMask mask_of(OptionalTensorRef m, const Tensor& q, ScalarType dtype, const AttentionParams& p,
                      const char* op) {
  AttentionMask mask{};
  if (!m) return mask;
  STD_TORCH_CHECK(same_device(*m, q), op, ": mask is on another device than q");
  const ScalarType type = m->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Bool || type == ScalarType::Float || type == dtype, op,
                  ": mask must be bool, float32 or of q's dtype");
  mask.kind = type == ScalarType::Bool    ? AttentionMaskKind::boolean
              : type == ScalarType::Float ? AttentionMaskKind::f32
              : type == ScalarType::Half  ? AttentionMaskKind::f16
                                          : AttentionMaskKind::bf16;
  mask.data = m->const_data_ptr();
  const int64_t sizes[] = {p.batch, p.heads, p.rows, p.keys};
  int64_t* strides[] = {&mask.batch, &mask.head, &mask.row, &mask.column};
  const int64_t first = 4 - m->dim();
  STD_TORCH_CHECK(first >= 0, op, ": mask has more than 4 dimensions");
  for (int64_t d = first; d < 4; ++d) {
    const int64_t n = m->size(d - first);
    STD_TORCH_CHECK(n == sizes[d] || n == 1, op, ": mask does not broadcast to [", p.batch, ", ", p.heads, ", ", p.rows,
                    ", ", p.keys, "]");
    *strides[d] = stride_of(*m, d - first);
  }
  STD_TORCH_CHECK(mask.column < int64_t{1} << 29, op, ": columns of mask must be less than 2^29 elements apart, not ",
                  mask.column);
  return mask;
}

// The result of rows without keys.
void fill_without_keys(Tensor& out, Tensor* lse, OptionalTensorRef sinks) {
  torch::stable::zero_(out);
  if (!lse) return;
  if (!sinks) {
    torch::stable::fill_(*lse, -INFINITY);
    return;
  }
  std::vector<int64_t> strides(lse->dim());
  strides[lse->dim() - 2] = 1;  // of heads
  torch::stable::copy_(*lse, reshaped(*sinks, sizes_of(*lse), strides));
}

// The dimension of rows; that of heads and that of columns are behind it.
int64_t row_of(bool varlen) { return varlen ? 0 : 1; }

void check_operands(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, bool varlen) {
  check_operand(q, q, varlen, op, "q");
  check_operand(k, q, varlen, op, "k");
  check_operand(v, q, varlen, op, "v");
  const int64_t row = row_of(varlen), head = row + 1, dim = row + 2;
  STD_TORCH_CHECK(k.size(row) == v.size(row) && k.size(head) == v.size(head) && k.size(dim) == q.size(dim), op,
                  ": k must be [..., keys, kv_heads, ", q.size(dim), "] and v [..., keys, kv_heads, value_dim]");
  STD_TORCH_CHECK(varlen || (q.size(0) == k.size(0) && q.size(0) == v.size(0)), op,
                  ": q, k and v must be of one batch size");
  STD_TORCH_CHECK(k.size(head) >= 1 && q.size(head) >= 1 && q.size(head) % k.size(head) == 0, op,
                  ": the heads of q must be a multiple of those of k");
}

// Whether base and strides are as the kernels need them.
bool is_aligned(const AttentionTensor& t, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (t.batch | t.row | t.head) * size_of(dtype) % 16 == 0;
}

bool has_kernel(int32_t head_dim, int32_t value_dim) {
  if (head_dim == value_dim) return head_dim % 8 == 0 && head_dim >= 32 && head_dim <= 256;
  return head_dim == 192 && value_dim == 128;
}

}  // namespace

AttentionTensor strides_of(const Tensor& x) {
  const int64_t row = x.dim() - 3;
  return {x.const_data_ptr(), row ? stride_of(x, 0) : 0, stride_of(x, row), stride_of(x, row + 1)};
}

AttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const AttentionOptions& o) {
  STD_TORCH_CHECK(o.cu_seqlens_q.has_value() == o.cu_seqlens_k.has_value(), op,
                  ": cu_seqlens_q and cu_seqlens_k go together");
  const bool varlen = o.cu_seqlens_q.has_value();
  STD_TORCH_CHECK(!varlen || !o.mask, op, ": a mask does not go with cu_seqlens");
  check_operands(op, q, k, v, varlen);
  const int64_t row = row_of(varlen), head = row + 1, dim = row + 2;

  STD_TORCH_CHECK(o.out_dtype || (k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type()), op,
                  ": k and v must have the dtype of q");
  const ScalarType dtype = o.out_dtype.value_or(q.scalar_type());
  AttentionParams p{};
  p.q = strides_of(q), p.k = strides_of(k), p.v = strides_of(v);
  p.dtype = dtype_of(dtype, op, "q");
  STD_TORCH_CHECK(is_float(p.dtype), op, ": q must be float16, bfloat16 or float32");
  if (varlen) STD_TORCH_CHECK(o.cu_seqlens_q->numel() >= 1, op, ": cu_seqlens must not be empty");
  p.batch = size32(varlen ? o.cu_seqlens_q->numel() - 1 : q.size(0), op, "sequences");
  p.heads = size32(q.size(head), op, "heads");
  p.kv_heads = size32(k.size(head), op, "heads");
  p.rows = size32(q.size(row), op, "rows of q");
  p.keys = size32(k.size(row), op, "rows of k");
  p.head_dim = size32(q.size(dim), op, "columns of q");
  p.value_dim = size32(v.size(dim), op, "columns of v");
  set_scores(p, p.head_dim, o.scale, o.softcap, o.sinks, q, dtype, op);
  p.left = window_side(o.window_left, op);
  p.right = std::min(window_side(o.window_right, op), o.causal ? 0 : kUnlimited);
  p.mask = mask_of(o.mask, q, dtype, p, op);
  set_alibi(p, o.alibi_slopes, p.batch, q, op);
  p.cu_seqlens_q = ints(o.cu_seqlens_q, int64_t{p.batch} + 1, q, op, "cu_seqlens_q");
  p.cu_seqlens_k = ints(o.cu_seqlens_k, int64_t{p.batch} + 1, q, op, "cu_seqlens_k");
  p.batch_invariant = o.batch_invariant;
  return p;
}

Tensor attention_outputs(AttentionParams& p, const Tensor& q, ScalarType dtype, Tensor* lse) {
  auto sizes = sizes_of(q);
  sizes.back() = p.value_dim;
  Tensor out = contiguous_rows(sizes, dtype, q);
  p.out = out.mutable_data_ptr();
  if (lse) {
    const bool varlen = p.cu_seqlens_q;
    *lse =
        contiguous_rows(varlen ? std::vector<int64_t>{p.heads, p.rows} : std::vector<int64_t>{p.batch, p.heads, p.rows},
                        ScalarType::Float, q);
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  return out;
}

bool fill_without_kernel(const AttentionParams& p, OptionalTensorRef sinks, Tensor& out, Tensor* lse) {
  if (p.batch == 0) {  // the rows of no sequence
    torch::stable::fill_(out, NAN);
    if (lse) torch::stable::fill_(*lse, NAN);
    return true;
  }
  if (p.keys > 0 || p.cu_seqlens_q) return false;
  fill_without_keys(out, lse, sinks);
  return true;
}

OperandCopies operands_of_gpu(const char* op, AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(p.dtype != Dtype::f32, op, ": on a GPU q must be float16 or bfloat16");
  STD_TORCH_CHECK(has_kernel(p.head_dim, p.value_dim), op,
                  ": on a GPU head dims are a multiple of 8 from 32 to 256, or ", "192 with 128 of v, not ", p.head_dim,
                  " with ", p.value_dim);
  OperandCopies copies;
  AttentionTensor* operands[] = {&p.q, &p.k, &p.v};
  const Tensor* tensors[] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i) {
    if (is_aligned(*operands[i], p.dtype)) continue;
    copies[i] = contiguous_rows(sizes_of(*tensors[i]), q.scalar_type(), q);
    torch::stable::copy_(*copies[i], *tensors[i]);
    *operands[i] = strides_of(*copies[i]);
  }
  if (p.keys == 0) p.k = p.v = p.q;  // what cu_seqlens say is still looked at; of keys nothing is read
  return copies;
}

}  // namespace forwardpass
