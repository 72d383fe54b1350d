#pragma once
// What attention and attention_8bit share on a CPU: which sequences there are, and elements of any dtype.
#include "params/attention.h"

namespace forwardpass {

// data[i], of f32, f16 or bf16.
float float_at(const void* data, int64_t i, Dtype dtype);

// How many of `batch` packed sequences there are before cu_seqlens [batch + 1] fall or lead beyond `total` rows.
int64_t known_before(const int32_t* cu_seqlens, int64_t batch, int64_t total);

// Of packed sequences: how many there are, from the first one on, before cu_seqlens fall or lead beyond the rows of q
// or k. Of two numbers that fall either may be wrong: neither sequence that ends there is known.
int64_t known_sequences(const AttentionParams& p);

// NaN in the rows of all packed sequences but the first `known` ones.
void fill_unknown(const AttentionParams& p, int64_t known);

}  // namespace forwardpass
