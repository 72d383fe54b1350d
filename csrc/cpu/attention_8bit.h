#pragma once
#include "params/attention.h"

namespace forwardpass {

// attention_8bit on a CPU: as AttentionParams says, with float32 and any head dims too. The integers are those of
// python/forwardpass/ops/attention_8bit/reference.py. The bits of a row depend on that row and on its keys only.
void attention_8bit_cpu(const AttentionParams& p, bool rotates);

}  // namespace forwardpass
