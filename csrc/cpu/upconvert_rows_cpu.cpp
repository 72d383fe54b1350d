#include "cpu/upconvert_rows.h"
#include "cpu/vector.h"
#include "params/gemm.h"

namespace forwardpass {
namespace {

template <Dtype D>
INLINE void widen(const UpconvertedRows& p) {
  const int64_t k = p.w.columns, blocks = ceil_div(k, kScaleBlock);
  for (int64_t row = p.first; row < p.last; ++row) {
    auto w = static_cast<const int8_t*>(p.w.data) + row * p.w.stride;
    float* out = p.out + (row - p.first) * k;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kScaleBlock, end = std::min(begin + kScaleBlock, k);
      const float scale = p.block_scale ? p.block_scale[row * blocks + block] : 1.0f;
      cpu::for_each_vector(
          begin, end, VECTOR_BODY(&) { cpu::store<Dtype::f32>(cpu::load<D>(w, c, n) * scale, out, c, n); });
    }
  }
}

}  // namespace

CLONES void upconvert_rows(const UpconvertedRows& p) {
  if (p.w.dtype == Dtype::i8) return widen<Dtype::i8>(p);
  widen<Dtype::e4m3>(p);
}

}  // namespace forwardpass
