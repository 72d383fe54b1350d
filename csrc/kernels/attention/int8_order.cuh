#pragma once
// The order of attention_8bit's keys in a block, by their scales, and which of them share one: what the quantising pass
// makes of their magnitudes, and the layout of operands that are given of their scales. python/forwardpass/ops/
// attention_8bit/reference.py has the rule.
#include "kernels/attention/int8_operands.h"

namespace forwardpass {

// What the threads of a block share of its keys.
struct SharedKeys {
  float largest[kInt8Keys], inverse[kInt8Keys], scale[kInt8Keys];
  uint32_t bits[kInt8Keys];
  int rank[kInt8Keys];
  uint8_t slot[kInt8Keys], key[kInt8Keys];  // where a key is, and which key is there
};
// Of magnitudes, by which keys are put in order: NaN comes last, and then what is behind the last key.
constexpr uint32_t kNan = 0x7f800000, kBehind = 0x7fffffff;
__device__ inline uint32_t order_bits(float x, bool inside) {
  return !inside ? kBehind : fabsf(x) < INFINITY ? __float_as_uint(fabsf(x)) : kNan;
}
// Each of 64 threads has a key, of which `bits` are. Returns how many come before it, and the largest of its group that
// is no NaN. Equal ones keep their order. Called by all threads.
struct GroupOf {
  int rank;
  float largest;
  __device__ GroupOf(SharedKeys& s, uint32_t bits) {
    const int key = static_cast<int>(threadIdx.x);
    const bool has_key = key < kInt8Keys;
    __syncthreads();  // all have read what was there
    if (has_key) s.bits[key] = bits;
    __syncthreads();
    rank = 0, largest = 0;
    if (has_key) {
#pragma unroll 2
      for (int i = 0; i < kInt8Keys; ++i) rank += s.bits[i] < bits || (s.bits[i] == bits && i < key);
      s.rank[key] = rank;
    }
    __syncthreads();
    if (!has_key) return;
    // Over all keys: the group's own, in the order of ranks, would be read from banks that others read too.
#pragma unroll 2
    for (int i = 0; i < kInt8Keys; ++i)
      if (s.rank[i] / kInt8Group == rank / kInt8Group && s.bits[i] < kNan)
        largest = fmaxf(largest, __uint_as_float(s.bits[i]));
  }
};

// Puts a block's keys where the kernel has them, by their scales in shared memory, and writes these.
__device__ inline void place_keys(const Int8Operands& to, SharedKeys& s, int64_t block, int keys) {
  const int key = static_cast<int>(threadIdx.x);
  if (!to.grouped) {
    if (key < kInt8Keys) s.slot[key] = s.key[key] = key, *to.k_scale(block, key) = s.scale[key];
    __syncthreads();
    return;
  }
  const bool has_key = key < kInt8Keys, inside = key < keys;
  const float scale = has_key ? s.scale[key] : 0;
  const GroupOf group(s, order_bits(scale, inside));
  // A scale that is its group's is 1 exactly; of a group of zeros all are.
  const float factor = inside && (scale != 0 || group.largest != 0) ? __fdiv_rn(scale, group.largest) : 1;
  if (has_key) {
    const int slot = int8_slot(group.rank);
    s.slot[key] = slot, s.key[slot] = key;
    to.order(block)[slot] = key;
    *to.k_scale(block, slot) = factor;
    if (group.rank % kInt8Group == 0) *to.group_scale(block, group.rank / kInt8Group) = group.largest;
  }
  const bool uneven = __syncthreads_or(has_key && factor != 1);
  if (key == 0) *to.uneven(block) = uneven;
}

}  // namespace forwardpass
