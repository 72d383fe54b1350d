#pragma once
#include "params/attention_8bit.h"

namespace forwardpass {

// attention_8bit on a CPU: as AttentionParams says, with float32 and any head dims too. The integers are those of
// python/forwardpass/ops/attention_8bit/reference.py. The bits of a row depend on that row and on its keys only.
void attention_8bit_cpu(const Attention8bitParams& p);

void quantize_attention_cpu(const QuantizeAttentionParams& p);

}  // namespace forwardpass
