#pragma once
// The rows of experts on a CPU: each one's, those of none, and those of which it is unknown whose they are, as
// ops/common/experts.py defines them.
#include <algorithm>
#include <cstring>

#include "cpu/row_chunks.h"
#include "params/gemm.h"

namespace forwardpass {

// Rows of the output from `first` to `last`, which no expert has: zeros, or NaN if whose they are is unknown.
inline void fill_rows(const GemmParams& p, int64_t first, int64_t last, bool unknown) {
  const Epilogue& e = p.epilogue;
  const int64_t bytes = p.columns() / (is_gated(e.activation) ? 2 : 1) * size_of(e.out_dtype);
  const uint32_t word = unknown ? nan_word(e.out_dtype) : 0;
  for (int64_t r = first; r < last; ++r) {
    auto* out = static_cast<uint8_t*>(rows_from(e, r).out);
    if (!unknown) std::memset(out, 0, bytes);
    for (int64_t i = 0; unknown && i < bytes; ++i) out[i] = static_cast<uint8_t>(word >> i % 4 * 8);
  }
}

// How many of the `rows`, which are sorted by expert, come before those of which it is unknown whose they are.
inline int64_t known_rows(const Groups& g, int64_t rows) {
  int64_t before = 0;
  for (int64_t e = 0; e < g.experts; ++e) {
    const int64_t end = g.ends[e];
    if (end < before || end > rows) return std::max<int64_t>(std::min(end, before), 0);
    before = end;
  }
  return rows;
}

// f(expert, its first row, the row behind its last) for each that has some. Fills the rows that none has.
template <class F>
void for_each_expert(const GemmParams& p, F f) {
  const Groups& g = p.groups;
  const int64_t known = g.sorted ? known_rows(g, p.a.rows) : 0;
  int64_t end = 0;
  for (int64_t e = 0; e < g.experts; ++e) {
    if (g.sorted) {
      const int64_t begin = end;
      end = std::max(end, std::min<int64_t>(g.ends[e], known));
      if (begin < end) f(e, begin, end);
    } else {
      const int64_t begin = e * g.room, count = g.ends[e];
      const bool wrong = count < 0 || count > g.room;
      if (!wrong && count > 0) f(e, begin, begin + count);
      fill_rows(p, wrong ? begin : begin + count, begin + g.room, wrong);
    }
  }
  if (g.sorted) fill_rows(p, end, p.a.rows, known < p.a.rows);
}

}  // namespace forwardpass
