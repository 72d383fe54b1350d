#pragma once
#include "params/common.h"
#include "params/device.h"
#include "params/kv_cache.h"

namespace forwardpass {

constexpr float kLog2e = 1.44269504f;

// q, k or v: [batch, row, head, dim], by strides in elements; the last dimension has stride 1. Varlen (cu_seqlens):
// rows are those of all sequences, batch is 0. Base and strides are multiples of 16 bytes; a stride may be 0.
struct AttentionTensor {
  const void* data;
  int64_t batch, row, head;
};

enum class AttentionMaskKind : int32_t { none, boolean, f16, bf16, f32 };

// [batch, head, row, column], by strides in elements, 0 where it broadcasts. Boolean, one byte: 1 lets a key be
// attended to. Otherwise it is added to the scores: a key with -inf is not attended to, nor is one with a value that
// overflows in units of log2(e).
struct AttentionMask {
  const void* data;
  AttentionMaskKind kind;
  int64_t batch, head, row, column;
};

// INT32_MAX: unlimited
constexpr int32_t kUnlimited = 0x7fffffff;

// Which kernel computes a call, with which tile, and how its keys are divided: chosen once, on the host
// (kernels/attention/select.cpp), a function of shapes, options and device only.
struct AttentionChoice {
  int (*launch)(const struct AttentionParams& p, void* stream);  // returns a cudaError_t
  int32_t splits;                                                // blocks that share a tile's keys (split-KV)
  int64_t workspace_bytes;                                       // that it takes; 0: none
};

// attention or, with an lse, attention_with_lse. Row i of a sequence of Sq rows and Sk keys is at position i + Sk - Sq
// (bottom-right alignment). The score of its key j is
//
//   s = scale q k;  softcap: s = softcap tanh(s / softcap);  s -= slope |i + Sk - Sq - j|;  s += mask
//
// and the key is attended to if -left <= j - (i + Sk - Sq) <= right and the mask lets it. A row without keys gives 0;
// its lse is -inf, or the sink.
struct AttentionParams {
  static constexpr const char* kLauncher = "forwardpass_attention";
  static constexpr const char* kSelector = "forwardpass_select_attention";
  using Choice = AttentionChoice;
  AttentionTensor q, k, v;  // heads, kv_heads and kv_heads; query head h reads head h / (heads / kv_heads)
  void* out;                // [batch, rows, heads, value_dim] contiguous; varlen: [rows, heads, value_dim]
  float* lse;               // [batch, heads, rows], varlen: [heads, rows]; natural logarithm; or null
  Dtype dtype;              // of q, k, v and out: f16 or bf16
  int32_t batch, heads, kv_heads;
  int32_t rows, keys;  // Sq and Sk, neither is 0; varlen: of all sequences together, and keys may be 0; cache: unused
  // GQA's packing, of a cache only: the 2^packed query heads of a kv head are rows, and heads are kv_heads. Row r is
  // row r >> packed of the sequence, of its head's query head r & (2^packed - 1). 0: none
  int32_t packed;
  int32_t head_dim, value_dim;
  float scale, softcap;  // softcap 0: none
  int32_t left, right;   // causal: right = 0
  AttentionMask mask;
  const float* alibi_slopes;   // [heads], batches alibi_batch_stride apart; or null
  int64_t alibi_batch_stride;  // 0: all batches have the same
  const void* sinks;           // [heads], logits that enter the denominator and the lse only; or null
  Dtype sinks_dtype;           // f32, or dtype
  const int32_t *cu_seqlens_q,
      *cu_seqlens_k;  // varlen: [batch + 1], where sequences begin, on the device, any numbers; else both null
  // With seq_lens, not varlen: sequence b's keys are the first seq_lens[b] of a cache, a number that only the device
  // knows, as attention_decode has them. k and v are this cache's, contiguous or, with block_table, paged: `batch` is
  // from one page to the next. Rows are NaN whose sequence has no room() or that attend to a key without a page.
  KvCache cache;
  bool batch_invariant;  // tile and split depend on dims, heads and options only
  // Of a GPU, unused on a CPU:
  Device device;
  AttentionChoice choice;
  float* workspace;  // of choice.workspace_bytes
};

}  // namespace forwardpass

// Returns a cudaError_t.
KERNEL_LIBRARY int forwardpass_select_attention(const forwardpass::AttentionParams* p,
                                                forwardpass::AttentionChoice* choice);
KERNEL_LIBRARY int forwardpass_attention(const forwardpass::AttentionParams* p, void* stream);
