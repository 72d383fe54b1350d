#pragma once
// Which instance of the attention kernels a call needs.
#include "device/dispatch.h"
#include "params/attention.h"

namespace forwardpass {

// What is a kernel of its own. T: of q, k, v and out; D, V: columns of q and k, and of v; General: with mask, ALiBi or
// softcap.
template <Dtype T, int D, int V, bool General>
struct AttentionInstance {
  static constexpr Dtype kT = T;
  static constexpr int kD = D, kV = V;
  static constexpr bool kGeneral = General;
};

// launch(AttentionInstance) of the bucket in which p's head dims run.
template <Dtype T, bool General, class Launch>
cudaError_t launch_bucket(const AttentionParams& p, Launch launch) {
  if (p.value_dim < p.head_dim) return launch(AttentionInstance<T, 192, 128, General>());
  if (p.head_dim <= 64) return launch(AttentionInstance<T, 64, 64, General>());
  if (p.head_dim <= 96) return launch(AttentionInstance<T, 96, 96, General>());
  if (p.head_dim <= 128) return launch(AttentionInstance<T, 128, 128, General>());
  if (p.head_dim <= 192) return launch(AttentionInstance<T, 192, 192, General>());
  return launch(AttentionInstance<T, 256, 256, General>());
}
template <class Launch>
cudaError_t launch_instance(const AttentionParams& p, Launch launch) {
  const bool general = p.softcap > 0 || p.alibi_slopes || p.mask.kind != AttentionMaskKind::none;
  return dispatch<Dtype::f16, Dtype::bf16>(p.dtype, [&](auto T) {
    return general ? launch_bucket<T(), true>(p, launch) : launch_bucket<T(), false>(p, launch);
  });
}

}  // namespace forwardpass
