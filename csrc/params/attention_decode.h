#pragma once
#include "params/attention.h"
#include "params/device.h"
#include "params/kv_cache.h"

namespace forwardpass {

// Rows that share keys, of all heads of a kv head, that no kernel but decode's is taken for; q of more is at multiples
// of 16 bytes on a GPU.
constexpr int32_t kFewRows = 32;

// As AttentionChoice: decode's kernel in `grid` thread blocks or, as prefill of a cache, one of attention's.
struct AttentionDecodeChoice {
  int (*launch)(const struct AttentionDecodeParams& p, void* stream);  // returns a cudaError_t
  int64_t grid;
  int64_t workspace_bytes;
  int32_t packed;           // of prefill, as AttentionParams has it
  AttentionChoice prefill;  // launch null: decode's
};

// attention_decode. Row i of a sequence is at position seq_len - rows + i; the score of its key j is
//
//   s = scale q k k_scale;  softcap: s = softcap tanh(s / softcap);  s -= slope (position - j)
//
// and the key is attended to if max(position - left, leftpad) <= j <= position. A row without keys gives 0. A row is
// NaN if the table has no page for a key that it attends to, or if its sequence is not in_range().
struct AttentionDecodeParams {
  static constexpr const char* kLauncher = "forwardpass_attention_decode";
  static constexpr const char* kSelector = "forwardpass_select_attention_decode";
  using Choice = AttentionDecodeChoice;
  AttentionTensor q;  // [batch, row, head, dim]
  void* out;          // [batch, rows, heads, value_dim] contiguous
  float* lse;         // [batch, heads, rows], the natural logarithm of the denominator; or null
  Dtype dtype;        // of q and out
  int32_t heads, rows;
  float scale, softcap;  // softcap 0: none
  int32_t left;
  const void* sinks;           // [heads], logits that enter the denominator only; or null
  Dtype sinks_dtype;           // f32, or dtype
  const float* alibi_slopes;   // [heads], batches alibi_batch_stride apart; or null
  int64_t alibi_batch_stride;  // 0: all batches have the same
  const int32_t* leftpad;      // [batch], on the device; or null: 0
  KvCache cache;
  bool batch_invariant;  // how a sequence's keys are divided depends on nothing of other sequences
  // Of a GPU, unused on a CPU:
  Device device;
  AttentionDecodeChoice choice;
  float* workspace;  // of choice.workspace_bytes

  // Rows of q that share keys.
  int64_t sharing_rows() const { return int64_t{heads / cache.heads} * rows; }
  // Whether the cache has room for a sequence's length, and its padding is at least 0.
  HOST_DEVICE bool in_range(int64_t sequence) const {
    return cache.has_room(sequence) && (!leftpad || leftpad[sequence] >= 0);
  }
  // The first key that any row of a sequence in range may attend to; none before it is read.
  HOST_DEVICE int32_t first_key(int64_t sequence) const {
    const int32_t length = cache.seq_lens[sequence], padding = leftpad ? leftpad[sequence] : 0;
    const int32_t first = left >= length ? 0 : length - rows - left;
    return first > padding ? first : padding;
  }
};

void attention_decode_cpu(const AttentionDecodeParams& p);

}  // namespace forwardpass

// Returns a cudaError_t.
KERNEL_LIBRARY int forwardpass_select_attention_decode(const forwardpass::AttentionDecodeParams* p,
                                                       forwardpass::AttentionDecodeChoice* choice);
KERNEL_LIBRARY int forwardpass_attention_decode(const forwardpass::AttentionDecodeParams* p, void* stream);
