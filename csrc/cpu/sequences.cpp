#include "cpu/sequences.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>

namespace forwardpass {

int64_t known_before(const int32_t* cu_seqlens, int64_t batch, int64_t total) {
  if (cu_seqlens[0] != 0) return 0;
  for (int64_t b = 0; b < batch; ++b) {
    if (cu_seqlens[b + 1] < cu_seqlens[b]) return std::max<int64_t>(b - 1, 0);
    if (cu_seqlens[b + 1] > total) return b;
  }
  return batch;
}

float float_at(const void* data, int64_t i, Dtype dtype) {
  if (dtype == Dtype::f32) return static_cast<const float*>(data)[i];
  if (dtype == Dtype::f16) return static_cast<const torch::headeronly::Half*>(data)[i];
  return static_cast<const torch::headeronly::BFloat16*>(data)[i];
}

int64_t known_sequences(const AttentionParams& p) {
  return std::min(known_before(p.cu_seqlens_q, p.batch, p.rows), known_before(p.cu_seqlens_k, p.batch, p.keys));
}

void fill_unknown(const AttentionParams& p, int64_t known) {
  const int64_t first = known > 0 ? p.cu_seqlens_q[known] : 0, row = int64_t{p.heads} * p.value_dim,
                count = p.rows - first;
  if (p.dtype == Dtype::f32) {
    std::fill_n(static_cast<float*>(p.out) + first * row, count * row, NAN);
  } else {
    constexpr uint16_t kHalfNan = 0x7e00, kBfloatNan = 0x7fc0;
    std::fill_n(static_cast<uint16_t*>(p.out) + first * row, count * row,
                p.dtype == Dtype::f16 ? kHalfNan : kBfloatNan);
  }
  for (int64_t h = 0; p.lse && h < p.heads; ++h) std::fill_n(p.lse + h * p.rows + first, count, NAN);
}

}  // namespace forwardpass
