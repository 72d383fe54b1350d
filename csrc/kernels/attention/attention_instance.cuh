#pragma once
// Which instance of the attention kernels a call needs.
#include "device/dispatch.h"
#include "params/attention.h"

namespace forwardpass {

// What the kernels are compiled for. T: dtype of q, k, v and out; D, V: columns of q and k, and of v; Modified: with
// score modifiers (mask, ALiBi or softcap).
template <Dtype T, int D, int V, bool Modified>
struct AttentionInstance {
  static constexpr Dtype kT = T;
  static constexpr int kD = D, kV = V;
  static constexpr bool kModified = Modified;
};

// Calls launch with the AttentionInstance of the smallest compiled head dims that hold p's. Each is a kernel: tile
// sizes follow from its head dims, by what shared memory and registers hold.
template <Dtype T, bool Modified, class Launch>
cudaError_t launch_head_dim(const AttentionParams& p, Launch launch) {
  if (p.value_dim < p.head_dim) return launch(AttentionInstance<T, 192, 128, Modified>());
  if (p.head_dim <= 64) return launch(AttentionInstance<T, 64, 64, Modified>());
  if (p.head_dim <= 96) return launch(AttentionInstance<T, 96, 96, Modified>());
  if (p.head_dim <= 128) return launch(AttentionInstance<T, 128, 128, Modified>());
  if (p.head_dim <= 192) return launch(AttentionInstance<T, 192, 192, Modified>());
  return launch(AttentionInstance<T, 256, 256, Modified>());
}
template <class Launch>
cudaError_t launch_instance(const AttentionParams& p, Launch launch) {
  const bool modified = p.softcap > 0 || p.alibi_slopes || p.mask.kind != AttentionMaskKind::none;
  return dispatch<Dtype::f16, Dtype::bf16>(p.dtype, [&](auto T) {
    return modified ? launch_head_dim<T(), true>(p, launch) : launch_head_dim<T(), false>(p, launch);
  });
}

}  // namespace forwardpass
