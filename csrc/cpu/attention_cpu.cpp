#include "cpu/attention.h"
#include "cpu/attention_rows.h"
#include "cpu/sequences.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

// Torch's fused attention takes an additive mask and no other option. The mask is written for some rows at a time, so
// that it has at most this many elements.
constexpr int64_t kMaskElements = int64_t{1} << 22;

// A batch whose sequences have the same numbers of rows and keys; varlen: one sequence.
struct Part {
  int64_t first_batch, batch, first_row, rows, first_key, keys;
};

class PartAttention {
 public:
  PartAttention(const AttentionParams& p, const Part& part, const Tensor& q, const Tensor& k, const Tensor& v,
                Tensor& out)
      : p_(p),
        part_(part),
        uses_attention_rows_(takes_attention_rows(p.dtype, p.head_dim, part.rows)),
        q_(q),
        k_(k),
        v_(v),
        out_(out) {}

  void run() {
    if (part_.rows == 0) return;
    if (part_.keys == 0) return rows_without_keys();
    // torch's causal mask is aligned top-left; a single row at the end sees every key.
    const int64_t offset = part_.keys - part_.rows;
    const bool causal = p_.right == 0 && offset == 0, left = p_.left < part_.keys - 1,
               right = !causal && p_.right < part_.rows - 1, limited = !uses_attention_rows_ && (left || right);
    if (!limited && p_.mask.kind == AttentionMaskKind::none && !p_.alibi_slopes) return rows(0, part_.rows, causal, {});
    const bool per_batch = p_.mask.batch || p_.alibi_batch_stride, per_head = p_.mask.head || p_.alibi_slopes;
    const int64_t batches = per_batch ? part_.batch : 1, heads = per_head ? p_.heads : 1;
    const int64_t step = std::max<int64_t>(1, kMaskElements / (batches * heads * part_.keys));
    for (int64_t row = 0; row < part_.rows; row += step) {
      const int64_t count = std::min(step, part_.rows - row);
      rows(row, count, false, mask(batches, heads, row, count));
    }
  }

 private:
  // [batches, heads, count, keys] fp32, the additive mask: -inf where a key is not attended to.
  Tensor mask(int64_t batches, int64_t heads, int64_t row, int64_t count) const {
    Tensor t = contiguous_rows({batches, heads, count, part_.keys}, ScalarType::Float, q_);
    auto data = static_cast<float*>(t.mutable_data_ptr());
    torch::stable::parallel_for(0, batches * heads * count, 64, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        fill_mask_row(data + i * part_.keys, i / (heads * count), i / count % heads, row + i % count);
    });
    return t;
  }

  void fill_mask_row(float* row_mask, int64_t batch, int64_t head, int64_t row) const {
    const int64_t position = row + part_.keys - part_.rows;
    const float slope =
        p_.alibi_slopes ? p_.alibi_slopes[(part_.first_batch + batch) * p_.alibi_batch_stride + head] : 0;
    const AttentionMask& m = p_.mask;
    const int64_t mask_row = (part_.first_batch + batch) * m.batch + head * m.head + row * m.row;
    for (int64_t j = 0; j < part_.keys; ++j) {
      const int64_t distance = j - position;
      float value = p_.alibi_slopes ? -slope * static_cast<float>(std::abs(distance)) : 0;
      if (m.kind == AttentionMaskKind::boolean) {
        if (!static_cast<const bool*>(m.data)[mask_row + j * m.column]) value = -INFINITY;
      } else if (m.kind != AttentionMaskKind::none) {
        const Dtype dtype = m.kind == AttentionMaskKind::f32 ? Dtype::f32 : p_.dtype;
        const float additive = float_at(m.data, mask_row + j * m.column, dtype);
        value += additive * kLog2e == -INFINITY ? -INFINITY : additive;
      }
      row_mask[j] = distance < -p_.left || distance > p_.right ? -INFINITY : value;
    }
  }

  // [batch, heads, count, dim] of q, k, v or out, from one of the part's rows on.
  Tensor operand(const Tensor& x, const AttentionTensor& t, int64_t heads, int64_t row, int64_t count,
                 int64_t dim) const {
    return reshaped(x, {part_.batch, heads, count, dim}, {t.batch, t.head, t.row, 1},
                    part_.first_batch * t.batch + row * t.row);
  }

  AttentionTensor out_strides() const {
    const int64_t head = p_.value_dim, row = head * p_.heads;
    return {p_.out, p_.cu_seqlens_q ? 0 : row * p_.rows, row, head};
  }

  void rows(int64_t first, int64_t count, bool causal, const OptionalTensor& mask) {
    if (uses_attention_rows_) {
      run_attention_rows(first, count, mask);
    } else {
      run_torch(first, count, causal, mask);
    }
  }

  // t from the part's first batch and from `row` on.
  AttentionTensor from_row(AttentionTensor t, int64_t row) const {
    t.data = static_cast<const char*>(t.data) + (part_.first_batch * t.batch + row * t.row) * size_of(p_.dtype);
    return t;
  }

  void run_attention_rows(int64_t first, int64_t count, const OptionalTensor& mask) {
    std::vector<float> sinks(p_.sinks ? p_.heads : 0);
    for (int64_t h = 0; h < std::ssize(sinks); ++h) sinks[h] = float_at(p_.sinks, h, p_.sinks_dtype);
    auto stride = [&](int64_t d) { return mask && mask->size(d) > 1 ? mask->stride(d) : 0; };
    attention_rows({.dtype = p_.dtype,
                    .q = from_row(p_.q, part_.first_row + first),
                    .k = from_row(p_.k, part_.first_key),
                    .v = from_row(p_.v, part_.first_key),
                    .out = from_row(out_strides(), part_.first_row + first),
                    .lse = p_.lse ? lse_at(0, 0, first) : nullptr,
                    .lse_batch = int64_t{p_.heads} * p_.rows,
                    .lse_head = p_.rows,
                    .mask = static_cast<const float*>(mask ? mask->const_data_ptr() : nullptr),
                    .mask_batch = stride(0),
                    .mask_head = stride(1),
                    .mask_row = part_.keys,
                    .sinks = p_.sinks ? sinks.data() : nullptr,
                    .batch = part_.batch,
                    .heads = p_.heads,
                    .kv_heads = p_.kv_heads,
                    .rows = count,
                    .keys = part_.keys,
                    .columns = p_.head_dim,
                    .scale = p_.scale,
                    .first_position = part_.keys - part_.rows + first,
                    .left = p_.left,
                    .right = p_.right});
  }

  void run_torch(int64_t first, int64_t count, bool causal, const OptionalTensor& mask) {
    const Tensor q = operand(q_, p_.q, p_.heads, part_.first_row + first, count, p_.head_dim),
                 k = operand(k_, p_.k, p_.kv_heads, part_.first_key, part_.keys, p_.head_dim),
                 v = operand(v_, p_.v, p_.kv_heads, part_.first_key, part_.keys, p_.value_dim);
    const auto results = call_overload("aten::_scaled_dot_product_flash_attention_for_cpu", "", q, k, v, 0.0, causal,
                                       mask, std::optional<double>(p_.scale));
    const auto o = torch::stable::detail::to<Tensor>(results[0]), lse = torch::stable::detail::to<Tensor>(results[1]);
    Tensor rows_of_out = operand(out_, out_strides(), p_.heads, part_.first_row + first, count, p_.value_dim);
    // [batch, heads, count, 1]: the factor of each row
    Tensor factors = contiguous_rows({part_.batch, p_.heads, count, 1}, ScalarType::Float, q_);
    if (finish(lse, q, k, causal, mask, first, static_cast<float*>(factors.mutable_data_ptr()))) {
      torch::stable::detail::to<Tensor>(call_overload("aten::mul", "out", o, factors, rows_of_out)[0]);
    } else {
      torch::stable::copy_(rows_of_out, o);
    }
  }

  // Adds what torch lacks: sinks, and the lse of rows for which it returns 0. Returns whether any factor is not 1.
  bool finish(const Tensor& lse, const Tensor& q, const Tensor& k, bool causal, const OptionalTensor& mask,
              int64_t first, float* factors) {
    auto torch_lse = static_cast<const float*>(lse.const_data_ptr());
    bool all_one = true;
    for (int64_t b = 0; b < part_.batch; ++b)
      for (int64_t h = 0; h < p_.heads; ++h)
        for (int64_t i = 0; i < q.size(2); ++i) {
          float value = torch_lse[b * lse.stride(0) + h * lse.stride(1) + i * lse.stride(2)];
          if (value == 0) value = lse_where_torch_has_0(q, k, causal, mask, b, h, i);
          const float factor = *factors++ = add_sink(value, h);
          all_one = all_one && factor == 1;
          if (p_.lse) *lse_at(b, h, first + i) = value;
        }
    return !all_one;
  }

  // Torch's running maximum ignores NaN. Where it stays -inf, torch returns 0 for the row and for its lse: either the
  // row is fully masked, or all of its scores are NaN. Finds out which.
  float lse_where_torch_has_0(const Tensor& q, const Tensor& k, bool causal, const OptionalTensor& mask, int64_t b,
                              int64_t h, int64_t i) const {
    const int64_t kv_head = h / (p_.heads / p_.kv_heads), q_row = b * q.stride(0) + h * q.stride(1) + i * q.stride(2),
                  k_head = b * k.stride(0) + kv_head * k.stride(1);
    const float* row_mask = nullptr;  // the row's mask, [keys]
    if (mask) {
      const int64_t batch = mask->size(0) > 1 ? b : 0, head = mask->size(1) > 1 ? h : 0;
      row_mask = static_cast<const float*>(mask->const_data_ptr()) + batch * mask->stride(0) + head * mask->stride(1) +
                 i * mask->stride(2);
    }
    float lse = -INFINITY;
    for (int64_t j = 0; j < (causal ? i + 1 : part_.keys); ++j) {
      if (row_mask && row_mask[j] == -INFINITY) continue;
      float score = row_mask ? row_mask[j] : 0;
      for (int64_t d = 0; d < p_.head_dim; ++d)
        score += p_.scale * float_at(q.const_data_ptr(), q_row + d, p_.dtype) *
                 float_at(k.const_data_ptr(), k_head + j * k.stride(2) + d, p_.dtype);
      if (std::isfinite(score)) return 0;  // an ordinary score: the sum of the exponentials is 1
      if (score != score) lse = score;
    }
    return lse;
  }

  // Adds the head's sink to a row's lse. Returns the factor of the row's output, which is NaN for a row of NaN.
  float add_sink(float& lse, int64_t head) const {
    if (!p_.sinks) return lse == lse ? 1 : lse;
    const float sink = float_at(p_.sinks, head, p_.sinks_dtype), without = lse;
    const float high = std::max(sink, without);
    lse = high == -INFINITY ? high : high + std::log(std::exp(sink - high) + std::exp(without - high));
    return lse == -INFINITY ? 0 : std::exp(without - lse);
  }

  float* lse_at(int64_t batch, int64_t head, int64_t row) const {
    const int64_t first_head = p_.cu_seqlens_q ? 0 : (part_.first_batch + batch) * p_.heads;
    return p_.lse + (first_head + head) * p_.rows + part_.first_row + row;
  }

  void rows_without_keys() {
    Tensor rows_of_out = operand(out_, out_strides(), p_.heads, part_.first_row, part_.rows, p_.value_dim);
    torch::stable::zero_(rows_of_out);
    if (!p_.lse) return;
    for (int64_t b = 0; b < part_.batch; ++b)
      for (int64_t h = 0; h < p_.heads; ++h)
        for (int64_t i = 0; i < part_.rows; ++i) {
          float lse = -INFINITY;
          add_sink(lse, h);
          *lse_at(b, h, i) = lse;
        }
  }

  const AttentionParams& p_;
  const Part part_;
  const bool uses_attention_rows_;  // else torch's fused attention
  const Tensor &q_, &k_, &v_;
  Tensor& out_;
};

}  // namespace

void attention_cpu(const AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out) {
  STD_TORCH_CHECK(p.softcap == 0 && p.head_dim == p.value_dim,
                  "attention: torch's fused attention has no softcap, and v has the columns of q");
  if (!p.cu_seqlens_q) {
    // The order in which torch's batched GEMM accumulates may depend on the batch size.
    const int64_t step = p.batch_invariant ? 1 : p.batch;
    for (int64_t b = 0; b < p.batch; b += step) PartAttention(p, {b, step, 0, p.rows, 0, p.keys}, q, k, v, out).run();
    return;
  }
  const int64_t known = known_sequences(p);
  for (int64_t b = 0; b < known; ++b) {
    const int64_t row = p.cu_seqlens_q[b], key = p.cu_seqlens_k[b];
    PartAttention(p, {b, 1, row, p.cu_seqlens_q[b + 1] - row, key, p.cu_seqlens_k[b + 1] - key}, q, k, v, out).run();
  }
  fill_unknown(p, known);
}

}  // namespace forwardpass
