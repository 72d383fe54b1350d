// quantize: bytes per element 2 or 4 in, 1 out; see device/quantize_rows.cuh.
#include "device/dispatch.h"
#include "device/quantize_rows.cuh"
#include "params/quantize.h"

namespace forwardpass {

template <Dtype D, bool kRotates>
__global__ void __launch_bounds__(RowsConfig::kMaxWidth) quantize_kernel(QuantizeParams p, RowsLaunch l, bool aligned) {
  ptx::launch_dependents();
  const Segment s(l, p.out, kRotates);
  auto x = static_cast<const cuda_t<D>*>(p.x.data) + s.row * p.x.stride + s.begin;  // [length]
  SegmentValues values(s, [&](int base, Chunk& v) { load_chunk(v, x, s, base, aligned); });
  quantize_segment<kRotates>(values, s, p.out);
}

}  // namespace forwardpass

int forwardpass_quantize(const forwardpass::QuantizeParams* p, void* stream) {
  using namespace forwardpass;
  const RowsLaunch l = rows_launch(p->x.rows, p->out);
  const int64_t size = size_of(p->x.dtype);
  const bool aligned = aligned16(p->x.data, p->x.stride * size, p->out.group * size, l.groups);
  return dispatch<Dtype::f32, Dtype::f16, Dtype::bf16>(p->x.dtype, [&](auto D) {
    return dispatch<false, true>(p->out.rotation != 0, [&](auto rotates) {
      quantize_kernel<D(), rotates()><<<l.grid(), l.block, 0, cudaStream_t(stream)>>>(*p, l, aligned);
      return cudaGetLastError();
    });
  });
}
