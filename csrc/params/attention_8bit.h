#pragma once
#include "params/attention.h"

namespace forwardpass {

// attention_8bit or, with an lse, attention_8bit_with_lse: attention whose products are of 8 bits, with the integers
// and e4m3 of python/forwardpass/ops/attention_8bit/reference.py. q, k and v are those of 16 bits;
// choice.workspace_bytes is what they take in 8 bits.
struct Attention8bitParams : AttentionParams {
  static constexpr const char* kLauncher = "forwardpass_attention_8bit";
  static constexpr const char* kSelector = "forwardpass_select_attention_8bit";
  bool fp8;      // probabilities and v are e4m3, not u8 and int8
  bool rotates;  // q and k, before they are quantised
};

}  // namespace forwardpass

// Returns a cudaError_t. The choice's launch is called with Attention8bitParams.
KERNEL_LIBRARY int forwardpass_select_attention_8bit(const forwardpass::Attention8bitParams* p,
                                                     forwardpass::AttentionChoice* choice);
KERNEL_LIBRARY int forwardpass_attention_8bit(const forwardpass::Attention8bitParams* p, void* stream);
