#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/quantize_rows.h"
#include "cpu/vector.h"
#include "params/permute_quantize.h"

namespace forwardpass {
namespace {

template <class T>
void find_positions(const PermuteQuantizeParams& p) {
  const T* index = static_cast<const T*>(p.index);
  const auto valid = [&](int64_t i) { return index[i] >= 0 && index[i] < p.experts; };
  std::vector<int32_t> next(p.experts);
  for (int64_t i = 0; i < p.rows(); ++i)
    if (valid(i)) ++next[index[i]];
  int32_t rows = 0;
  for (int32_t e = 0; e < p.experts; ++e) {
    const int32_t first = rows;
    p.offs[e] = rows += next[e];
    next[e] = first;
  }
  for (int64_t i = 0; i < p.rows(); ++i) p.position[i] = valid(i) ? next[index[i]]++ : -1;
}

// Tokens' rows: quantised to the first of their places, copied to the others.
void quantize_tokens(const PermuteQuantizeParams& p, int64_t first_token, int64_t last_token) {
  const auto q = [&](int64_t row) { return static_cast<char*>(p.out.q) + row * p.out.q_stride; };
  const auto scale = [&](int64_t row, int64_t group) -> float& {
    return p.out.scale[row + group * p.out.scale_stride];
  };
  const int64_t groups = (p.out.columns + p.out.group - 1) / p.out.group, used = p.offs[p.experts - 1];
  for (int64_t token = first_token; token < last_token; ++token) {
    const char* x = static_cast<const char*>(p.x.data) + token * p.x.stride * size_of(p.x.dtype);
    const int64_t begin = token * p.choices, end = begin + p.choices;
    int64_t first = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = p.position[i];
      if (row < 0) continue;
      if (first < 0) {
        first = row;
        quantize_to_row(x, p.x.dtype, p.out, row);
      } else {
        std::memcpy(q(row), q(first), p.out.columns);
        for (int64_t group = 0; group < groups; ++group) scale(row, group) = scale(first, group);
      }
    }
    for (int64_t row = std::max(begin, used); row < end; ++row) {
      std::memset(q(row), 0, p.out.columns);
      for (int64_t group = 0; group < groups; ++group) scale(row, group) = 0;
    }
  }
}

}  // namespace

void permute_quantize_cpu(const PermuteQuantizeParams& p) {
  if (p.wide_index) {
    find_positions<int64_t>(p);
  } else {
    find_positions<int32_t>(p);
  }
  torch::stable::parallel_for(0, p.x.rows, cpu::grain(p.x.columns),
                              [&](int64_t first, int64_t last) { quantize_tokens(p, first, last); });
}

}  // namespace forwardpass
