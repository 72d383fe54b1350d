#include "cpu/attention_8bit.h"
#include "torch/check.h"

namespace forwardpass {

void attention_8bit_cpu(const AttentionParams&, bool) { STD_TORCH_CHECK(false, "attention_8bit: to be written"); }

}  // namespace forwardpass
