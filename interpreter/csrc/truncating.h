#pragma once
// The truncating fp8 accumulator behind matrix.h's functions, with panels of its own: [element of K][row] for A and
// [tile][element of K][columns 0 2 4 6 1 3 5 7] for B, each entry a significand and an exponent.
#include "matrix.h"

namespace gpuless {

void truncating_expand_a(const Product&, const Fragment* fragments, PanelA&);
void truncating_expand_b(const Product&, const Fragment* fragments, int tiles, PanelB&);
void truncating_multiply(const Product&, const PanelA&, const PanelB&, int tiles, uint32_t* sums);

}  // namespace gpuless
