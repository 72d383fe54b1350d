#pragma once
// The order of attention_8bit's keys in a block, by their scales, and which of them share one: what the quantising pass
// makes of their magnitudes, and the layout of operands that are given of their scales. python/forwardpass/ops/
// attention_8bit/reference.py has the rule.
#include "device/fragments.cuh"
#include "kernels/attention/int8_operands.h"

namespace forwardpass {

// What the threads of a block share of its keys.
struct SharedKeys {
  float largest[kInt8Keys], inverse[kInt8Keys], scale[kInt8Keys];
  alignas(16) uint32_t bits[kInt8Keys];
  alignas(16) uint32_t rank[kInt8Keys];
  uint8_t slot[kInt8Keys], key[kInt8Keys];  // where a key is, and which key is there
};
// Of magnitudes, by which keys are put in order: NaN comes last, and then what is behind the last key.
constexpr uint32_t kNan = 0x7f800000, kBehind = 0x7fffffff;
__device__ inline uint32_t order_bits(float x, bool inside) {
  return !inside ? kBehind : fabsf(x) < INFINITY ? __float_as_uint(fabsf(x)) : kNan;
}
// Four threads have a key, of which `bits` are, and compare it with a quarter of the others each. What they make of it
// all four store.
constexpr int kKeyThreads = 4;
__device__ inline int ordered_key() { return static_cast<int>(threadIdx.x) / kKeyThreads; }

// How many keys come before a thread's, where equal ones keep their order, and the largest of its group that is no NaN.
// Called by all threads, four for each key, behind a barrier.
struct GroupOf {
  uint32_t rank = 0;
  float largest = 0;
  __device__ GroupOf(SharedKeys& s, uint32_t bits) {
    const int key = ordered_key();
    s.bits[key] = bits;
    __syncthreads();
    each_other(s, [&](int i, uint32_t other, uint32_t) { rank += other < bits || (other == bits && i < key); });
    rank = sum_of_group(rank);
    s.rank[key] = rank;
    __syncthreads();
    each_other(s, [&](int, uint32_t other, uint32_t its_rank) {
      const bool shares = its_rank / kInt8Group == rank / kInt8Group && other < kNan;
      largest = fmaxf(largest, shares ? __uint_as_float(other) : 0);
    });
    largest = over_group(largest, fmaxf);
  }

 private:
  // f(i, bits, rank): of a quarter of the keys. The four threads read neighbouring words.
  template <class F>
  __device__ static void each_other(const SharedKeys& s, F f) {
#pragma unroll 1
    for (int n = 0; n < kInt8Keys / 4 / kKeyThreads; ++n) {
      const int i = (n * kKeyThreads + static_cast<int>(threadIdx.x) % kKeyThreads) * 4;
      const auto bits = *reinterpret_cast<const uint4*>(s.bits + i), rank = *reinterpret_cast<const uint4*>(s.rank + i);
      f(i, bits.x, rank.x), f(i + 1, bits.y, rank.y), f(i + 2, bits.z, rank.z), f(i + 3, bits.w, rank.w);
    }
  }
};

// Puts a block's keys where the kernel has them, by their scales in shared memory, and writes these.
__device__ inline void place_keys(const Int8Operands& to, SharedKeys& s, int64_t block, int keys) {
  if (!to.grouped) {
    const int key = static_cast<int>(threadIdx.x);
    if (key < kInt8Keys) s.slot[key] = s.key[key] = key, *to.k_scale(block, key) = s.scale[key];
    __syncthreads();
    return;
  }
  const int key = ordered_key();
  const bool inside = key < keys;
  const float scale = s.scale[key];
  const GroupOf group(s, order_bits(scale, inside));
  // A scale that is its group's is 1 exactly; of a group of zeros all are.
  const float factor = inside && (scale != 0 || group.largest != 0) ? __fdiv_rn(scale, group.largest) : 1;
  const int slot = int8_slot(static_cast<int>(group.rank));
  s.slot[key] = slot, s.key[slot] = key;
  to.order(block)[slot] = key;
  *to.k_scale(block, slot) = factor;
  if (group.rank % kInt8Group == 0) *to.group_scale(block, group.rank / kInt8Group) = group.largest;
  const bool uneven = __syncthreads_or(factor != 1);
  if (threadIdx.x == 0) *to.uneven(block) = uneven;
}

}  // namespace forwardpass
