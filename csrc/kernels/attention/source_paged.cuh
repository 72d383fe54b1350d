#pragma once
// Keys and values of a cache, paged or contiguous, whose lengths and pages only the device knows: a Source of prefill
// on mma.sync. Pages have any number of tokens: each row of a block of keys has a place of its own. A thread finds one
// row's, a block ahead, and all threads copy by the places in shared memory.
#include "kernels/attention/source_dense.cuh"

namespace forwardpass {

template <class Config>
class PagedSource {
 public:
  // Where the keys and values of a block are, in bytes from the cache's first. The values' place is read while that of
  // the block before is written. One thread computes a key's; by all that copy it the loop has 12 % more instructions.
  struct Shared {
    int64_t k[Config::kN], v[2][Config::kN];
  };

  template <class Arguments>
  __device__ PagedSource(const Arguments& a, Shared& s, const AttentionTile& tile, int) : p_(a.p), s_(s), tile_(tile) {
    static_assert(Config::kN <= Config::kThreads);
  }
  static DenseSteps steps(const AttentionParams&) { return {}; }
  __device__ void begin(int block) {
    look_up(block), keep(block);
    __syncthreads();
  }
  // Begins to load where the block's keys are, as loads take long.
  __device__ void look_up(int block) {
    const int key = key_of(block);
    if (key < tile_.keys) first_ = p_.cache.first_of(tile_.batch, key);
  }
  __device__ void keep(int block) {
    const int key = key_of(block);
    if (threadIdx.x >= Config::kN) return;
    const bool has_page = key < tile_.keys && first_ >= 0;
    const int row = p_.cache.block_table ? key % p_.cache.page : key, head = tile_.kv_head(p_);
    const auto place = [&](const AttentionTensor& t) {
      return has_page ? (first_ * t.batch + row * t.row + head * t.head) * 2 : kNone;
    };
    s_.k[threadIdx.x] = place(p_.k), s_.v[block & 1][threadIdx.x] = place(p_.v);
  }
  // A key without a page is NaN: so are the scores of all rows that see it, and what follows from them.
  template <bool kWhole>
  __device__ void copy_k(uint16_t* shared, int, int keys, int columns) const {
    copy<kWhole, true, Config::kHeadDim>(shared, p_.k, s_.k, keys, columns);
  }
  template <bool kWhole>
  __device__ void copy_v(uint16_t* shared, int block, int keys, int columns) const {
    copy<kWhole, false, Config::kValueDim>(shared, p_.v, s_.v[block & 1], keys, columns);
  }
  __device__ void step_back() const {}

 private:
  __device__ static int key_of(int block) {
    return threadIdx.x < Config::kN ? block * Config::kN + static_cast<int>(threadIdx.x) : INT32_MAX;
  }
  template <bool kWhole, bool kNan, int kColumns>
  __device__ void copy(uint16_t* shared, const AttentionTensor& t, const int64_t* rows, int keys, int columns) const {
    using P = Panels<kColumns>;
    using Share = CopyShare<P::kRowBytes, Config::kN, Config::kThreads>;
    const uint32_t to = ptx::shared_address(shared) + Share::offset();
    const auto column = static_cast<const char*>(t.data) + Share::chunk() * 16;
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      const int row = Share::row() + i * Share::kStep;
      const int64_t place = rows[row];
      const bool inside = kWhole || row < keys;
#pragma unroll
      for (int panel = 0; panel < P::kCount; ++panel) {
        const int offset = (panel * Config::kN + i * Share::kStep) * P::kRowBytes;
        const bool has_column = inside && panel * P::kPanel + Share::chunk() * 8 < columns;
        if (kNan && inside && place < 0)
          *reinterpret_cast<uint4*>(reinterpret_cast<char*>(shared) + Share::offset() + offset) = {kNans, kNans, kNans,
                                                                                                   kNans};
        else
          ptx::cp_async_16(to + offset, column + place + panel * P::kRowBytes, has_column && place >= 0 ? 16 : 0);
      }
    }
    ptx::cp_async_commit();
  }
  static constexpr uint32_t kNans = 0x7fff7fff;  // of fp16 and of bf16
  static constexpr int64_t kNone = -16;          // a multiple of what is copied together: nothing is read there

  const AttentionParams& p_;
  Shared& s_;
  const AttentionTile& tile_;
  int first_ = -1;
};

}  // namespace forwardpass
