#pragma once
#include "params/attention.h"

namespace forwardpass {

// q, k and v in 8 bits as quantize_attention returns them, contiguous. A token is a row of q, or a key, of all
// sequences.
struct AttentionOperands {
  int8_t* q;                 // [token, head, head_dim]
  float *q_scale, *q_shift;  // [token, head]; q_shift: q times k's centre
  int8_t* k;                 // [token, kv head, head_dim]
  float* k_scale;            // [token, kv head]
  int8_t* v;                 // [token, kv head, value_dim], int8 or e4m3
  float* v_scale;            // [sequence, kv head, value_dim]
  float* v_block_scale;      // [token, kv head], of v in int8; of each 64 keys of a sequence the first one's counts
};

// attention_8bit or, with an lse, attention_8bit_with_lse: attention whose products are of 8 bits, with the integers
// and e4m3 of python/forwardpass/ops/attention_8bit/reference.py. q, k and v are those of 16 bits, or `quantized`, in 8
// bits; choice.workspace_bytes is what they take in the kernel's layout.
struct Attention8bitParams : AttentionParams {
  static constexpr const char* kLauncher = "forwardpass_attention_8bit";
  static constexpr const char* kSelector = "forwardpass_select_attention_8bit";
  bool fp8;                     // probabilities and v are e4m3, not u8 and int8
  bool rotates;                 // q and k, before they are quantised
  AttentionOperands quantized;  // or null
};

// quantize_attention: of attention's params those that say where q, k and v are.
struct QuantizeAttentionParams : Attention8bitParams {
  static constexpr const char* kLauncher = "forwardpass_quantize_attention";
  static constexpr const char* kSelector = "forwardpass_select_quantize_attention";
  AttentionOperands to;
};

}  // namespace forwardpass

// Returns a cudaError_t. The choice's launch is called with Attention8bitParams.
KERNEL_LIBRARY int forwardpass_select_attention_8bit(const forwardpass::Attention8bitParams* p,
                                                     forwardpass::AttentionChoice* choice);
KERNEL_LIBRARY int forwardpass_attention_8bit(const forwardpass::Attention8bitParams* p, void* stream);
KERNEL_LIBRARY int forwardpass_select_quantize_attention(const forwardpass::QuantizeAttentionParams* p,
                                                         forwardpass::AttentionChoice* choice);
KERNEL_LIBRARY int forwardpass_quantize_attention(const forwardpass::QuantizeAttentionParams* p, void* stream);
