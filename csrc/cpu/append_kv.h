#pragma once
#include "params/append_kv.h"

namespace forwardpass::cpu {

// append_kv on the calling thread, of tokens from `begin` to `end`: those of all sequences, one after another.
void append(const AppendKvParams& p, int64_t begin, int64_t end);

}  // namespace forwardpass::cpu
