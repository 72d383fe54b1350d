#pragma once
// A pipeline of stages in shared memory: one producer thread fills them by TMA, the consumer warps use them.
#include "device/ptx_sm90a.cuh"

namespace forwardpass {

// x as lane `from` has it, in every lane: a warp-uniform broadcast. The compiler does not recompute the result of a
// shuffle inside a loop; and if it is one lane's value, the compiler knows that it is uniform.
template <class T>
__device__ inline T uniform(T x, int from = 0) {
  return __shfl_sync(0xffffffff, x, from);
}

// The stage that one side is at, and the parity of its barriers' current phase.
template <int Stages>
struct PipelineState {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if constexpr (Stages == 2) {  // two instructions, not four
      stage ^= 1, parity ^= stage ^ 1;
    } else {
      if (++stage == Stages) stage = 0, parity ^= 1;
    }
  }
};

// In shared memory, the empty barriers behind the full ones. A stage is full when its bytes have arrived, and a part of
// it is empty when every consumer has arrived.
template <int Stages, int Parts = 1>
struct PipelineBarriers {
  uint64_t full[Stages], empty[Parts][Stages];
  __device__ void init(int consumers) {
#pragma unroll
    for (int i = 0; i < Stages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&full[i]), 1);
#pragma unroll
      for (auto& part : empty) ptx::mbarrier_init(ptx::shared_address(&part[i]), consumers);
    }
  }
};

constexpr int kBarrierBytes = sizeof(uint64_t);

// One side of a pipeline, in registers: the producer's or a consumer's.
template <int Stages, int Parts = 1>
struct Pipeline : PipelineState<Stages> {
  uint32_t barriers;

  __device__ explicit Pipeline(const PipelineBarriers<Stages, Parts>& b) : barriers(ptx::shared_address(b.full)) {}
  // The producer: waits until the stage's first part is empty and announces `bytes`, of all parts, to its full barrier,
  // which is returned for the TMA loads.
  __device__ uint32_t acquire(int bytes) const {
    wait_empty();
    return announce(bytes);
  }
  // The same in two steps: what the thread writes between them is for the consumers too.
  __device__ void wait_empty(int part = 0) const { await(empty(this->stage, part), this->parity ^ 1); }
  __device__ uint32_t announce(int bytes) const {
    ptx::mbarrier_arrive_expect_tx(full(this->stage), bytes);
    return full(this->stage);
  }
  // The consumers: a warp waits until the stage is full, and arrives at its empty barrier once it has read it.
  __device__ void wait_full() const { await(full(this->stage), this->parity); }
  __device__ void release(int stage) const { ptx::mbarrier_arrive(empty(stage), threadIdx.x % 32 == 0); }
  __device__ uint32_t full(int stage) const { return barriers + stage * kBarrierBytes; }

 private:
  __device__ uint32_t empty(int stage, int part = 0) const {
    return barriers + ((1 + part) * Stages + stage) * kBarrierBytes;
  }
  __device__ static void await(uint32_t barrier, uint32_t parity) {
    while (!ptx::mbarrier_try_wait(barrier, parity)) {
    }
  }
};

}  // namespace forwardpass
