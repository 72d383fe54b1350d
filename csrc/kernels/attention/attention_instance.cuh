#pragma once
// Which instance of the attention kernels a call needs.
#include <type_traits>

#include "device/dispatch.h"
#include "params/attention.h"

namespace forwardpass {

// What the kernels are compiled for.
struct AttentionInstance {
  Dtype dtype;              // of q, k, v and out
  int head_dim, value_dim;  // columns of q and k, and of v; value_dim is at most head_dim
  bool modified;            // with score modifiers: mask, ALiBi or softcap
};

// Calls launch with the AttentionInstance, a constant, of the smallest compiled head dims that hold p's. Each is a
// kernel: tile sizes follow from its head dims, by what shared memory and registers hold.
template <Dtype kDtype, bool kModified, class Launch>
cudaError_t launch_head_dim(const AttentionParams& p, Launch launch) {
  const auto dims = [&]<int kHeadDim, int kValueDim = kHeadDim>() {
    constexpr AttentionInstance kInstance{
        .dtype = kDtype, .head_dim = kHeadDim, .value_dim = kValueDim, .modified = kModified};
    return launch(std::integral_constant<AttentionInstance, kInstance>());
  };
  if (p.value_dim < p.head_dim) return dims.template operator()<192, 128>();
  if (p.head_dim <= 64) return dims.template operator()<64>();
  if (p.head_dim <= 96) return dims.template operator()<96>();
  if (p.head_dim <= 128) return dims.template operator()<128>();
  if (p.head_dim <= 192) return dims.template operator()<192>();
  return dims.template operator()<256>();
}
template <class Launch>
cudaError_t launch_instance(const AttentionParams& p, Launch launch) {
  const bool modified = p.softcap > 0 || p.alibi_slopes || p.mask.kind != AttentionMaskKind::none;
  return dispatch<Dtype::f16, Dtype::bf16>(p.dtype, [&](auto T) {
    return modified ? launch_head_dim<T(), true>(p, launch) : launch_head_dim<T(), false>(p, launch);
  });
}

}  // namespace forwardpass
