// activation_quantize: 2 or 4 bytes in per element of q, twice that if gated, 1 out; see device/quantize_rows.cuh.
#include "device/activation.cuh"
#include "device/dispatch.h"
#include "device/quantize_rows.cuh"
#include "params/activation_quantize.h"

namespace forwardpass {

template <Dtype D, bool kRotates>
__global__ void __launch_bounds__(RowsConfig::kMaxWidth)
    activation_quantize_kernel(ActivationQuantizeParams p, RowsLaunch l, bool aligned) {
  ptx::launch_dependents();
  const Segment s(l, p.out, kRotates);
  auto x = static_cast<const cuda_t<D>*>(p.x.data) + s.row * p.x.stride;  // [columns] or [2 columns]
  const bool gated = is_gated(p.activation);
  const int64_t to_up = p.interleaved ? 8 : p.out.columns;
  const auto offset_of = [&](int column) {  // column of x, or of the gate in x; the up's is to_up further
    const int64_t c = s.begin + column;
    return p.interleaved ? c + (c & ~int64_t{7}) : c;
  };
  SegmentValues values(s, [&](int base, Chunk& v) {
    Chunk up;
    load_chunk(v, x, s, base, aligned, offset_of);
    if (gated) load_chunk(up, x + to_up, s, base, aligned, offset_of);
    for_each_vector(s, base, [&](int i, int, int) {
      activate(p.activation, v[i]);
      if (gated) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) v[i][j] = __fmul_rn(v[i][j], up[i][j]);
      }
    });
  });
  quantize_segment<kRotates>(values, s, p.out);
}

}  // namespace forwardpass

int forwardpass_activation_quantize(const forwardpass::ActivationQuantizeParams* p, void* stream) {
  using namespace forwardpass;
  const RowsLaunch l = rows_launch(p->x.rows, p->out);
  const int64_t size = size_of(p->x.dtype);
  const bool whole = l.groups == 1 || p->out.group % kVec == 0;  // no vector spans two interleaved blocks of 8
  const bool aligned = aligned16(p->x.data, p->x.stride * size, p->out.group * size, l.groups) &&
                       (p->interleaved ? whole : !is_gated(p->activation) || p->out.columns * size % 16 == 0);
  return dispatch<Dtype::f32, Dtype::f16, Dtype::bf16>(p->x.dtype, [&](auto D) {
    return dispatch<false, true>(p->out.rotation != 0, [&](auto rotates) {
      activation_quantize_kernel<D(), rotates()><<<l.grid(), l.block, 0, cudaStream_t(stream)>>>(*p, l, aligned);
      return cudaGetLastError();
    });
  });
}
