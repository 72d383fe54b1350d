#pragma once
// Stages of shared memory between one thread that loads by TMA and the warps that use what it loaded.
#include "device/ptx_sm90a.cuh"

namespace forwardpass {

// What comes out of a shuffle is not computed again in a loop; if it is one lane's, it is known to be uniform.
template <class T>
__device__ inline T kept(T x, int from = 0) {
  return __shfl_sync(0xffffffff, x, from);
}

// Where one side is in the ring of stages.
template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

// In shared memory: a stage is full when its bytes have arrived, and empty when each reader has said so.
template <int Stages>
struct StageBarriers {
  uint64_t full[Stages], empty[Stages];
  __device__ void init(int readers) {
#pragma unroll
    for (int i = 0; i < Stages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&full[i]), 1);
      ptx::mbarrier_init(ptx::shared_address(&empty[i]), readers);
    }
  }
};

// One side's, in registers.
template <int Stages>
struct Stage : Ring<Stages> {
  uint32_t full;

  __device__ explicit Stage(const StageBarriers<Stages>& b) : full(ptx::shared_address(b.full)) {}
  // The one that loads: its thread may write, and says how many bytes will arrive at the mbarrier that is returned.
  __device__ uint32_t fill(int bytes) const {
    await(full + (Stages + this->stage) * 8, this->parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full + this->stage * 8, bytes);
    return full + this->stage * 8;
  }
  // The readers': a warp may read, and has read.
  __device__ void wait() const { await(full + this->stage * 8, this->parity); }
  __device__ void release(int stage) const { ptx::mbarrier_arrive(full + (Stages + stage) * 8, threadIdx.x % 32 == 0); }

 private:
  __device__ static void await(uint32_t barrier, uint32_t parity) {
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
    }
  }
};

}  // namespace forwardpass
