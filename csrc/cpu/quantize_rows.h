#pragma once
// Quantisation of rows by the thread that calls: the second half of every quantising op on the CPU.
#include "params/quantize.h"

namespace forwardpass {

// Rows from `first` to `last` of quantize_cpu. Compiled in quantize_cpu.cpp alone: behind each of 21 activations and
// dtypes it took 100 s.
void quantize_rows(const QuantizeParams& p, int64_t first, int64_t last);

// A row of a float dtype, to row `row` of out.
inline void quantize_to_row(const void* x, Dtype dtype, const QuantizedRows& out, int64_t row) {
  quantize_rows({{x, dtype, 1, out.columns, 0}, out}, row, row + 1);
}

}  // namespace forwardpass
