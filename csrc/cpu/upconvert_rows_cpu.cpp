#include "cpu/upconvert_rows.h"
#include "cpu/vector.h"
#include "params/gemm.h"

namespace forwardpass {
namespace {

template <class V, Dtype D>
INLINE void upconvert(const UpconvertRowsParams& p) {
  const int64_t k = p.b.columns, blocks = ceil_div(k, kScaleBlock);
  for (int64_t row = p.first; row < p.last; ++row) {
    auto b = static_cast<const int8_t*>(p.b.data) + row * p.b.stride;
    float* out = p.out + (row - p.first) * k;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t begin = block * kScaleBlock, end = std::min(begin + kScaleBlock, k);
      const float scale = p.block_scale ? p.block_scale[row * blocks + block] : 1.0f;
      cpu::for_each_vector<V>(
          begin, end, VECTOR_BODY(&) { cpu::store<Dtype::f32>(cpu::load<V, D>(b, c, n) * scale, out, c, n); });
    }
  }
}

}  // namespace

void upconvert_rows(const UpconvertRowsParams& p) {
  cpu::with_vectors(VECTOR_CODE {
    if (p.b.dtype == Dtype::i8) return upconvert<V, Dtype::i8>(p);
    upconvert<V, Dtype::e4m3>(p);
  });
}

}  // namespace forwardpass
