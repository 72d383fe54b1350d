#pragma once
#include "params/common.h"
#include "params/device.h"

namespace forwardpass {

constexpr float kLog2e = 1.44269504f;

// q, k or v: [batch, row, head, dim] by strides in elements; the last dimension's is 1. Of sequences one behind the
// other (cu_seqlens) the rows are those of all, and batch is 0. Base and strides are multiples of 16 bytes; a stride
// may be 0.
struct AttentionTensor {
  const void* data;
  int64_t batch, row, head;
};

enum class AttentionMaskKind : int32_t { none, boolean, f16, bf16, f32 };

// [batch, head, row, column] by strides in elements, 0 where it is broadcast. Boolean, one byte: 1 may be attended to.
// Else added to the scores: -inf may not be attended to, and neither may what overflows in units of log2(e).
struct AttentionMask {
  const void* data;
  AttentionMaskKind kind;
  int64_t batch, head, row, column;
};

// INT32_MAX: unlimited
constexpr int32_t kUnlimited = 0x7fffffff;

// attention, and with an lse attention_with_lse. Row i of a sequence of Sq rows and Sk keys stands at i + Sk - Sq, and
// of its keys j
//   s = scale q k;  softcap: s = softcap tanh(s / softcap);  s -= slope |i + Sk - Sq - j|;  s += mask
// counts where -left <= j - (i + Sk - Sq) <= right and the mask lets it. A row without a key gives 0, and as its lse
// -inf, or the sink.
struct AttentionParams {
  static constexpr const char* kLauncher = "forwardpass_attention";
  AttentionTensor q, k, v;  // heads, kv_heads and kv_heads; query head h reads head h / (heads / kv_heads)
  void* out;                // [batch, rows, heads, value_dim] contiguous; with cu_seqlens [rows, heads, value_dim]
  float* lse;               // [batch, heads, rows], with cu_seqlens [heads, rows]; natural logarithm; or null
  Dtype dtype;              // of q, k, v and out: f16 or bf16
  int32_t batch, heads, kv_heads;
  int32_t rows, keys;  // Sq and Sk, of which neither is 0; with cu_seqlens those of all sequences together
  int32_t head_dim, value_dim;
  float scale, softcap;  // softcap 0: none
  int32_t left, right;   // a causal one has right = 0
  AttentionMask mask;
  const float* alibi_slopes;                   // [heads], batches alibi_batch_stride apart; or null
  int64_t alibi_batch_stride;                  // 0: the same for all
  const void* sinks;                           // [heads], a logit each, in the denominator and the lse alone; or null
  Dtype sinks_dtype;                           // f32, or dtype
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // [batch + 1], where sequences begin, on the device; or null, both
  bool batch_invariant;                        // tile and split depend on nothing but dims, heads and options
  Device device;                               // that runs it; on a CPU none
};

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_attention(const forwardpass::AttentionParams* p, void* stream);
