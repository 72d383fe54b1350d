// Needs: sm_90a
// Pipelines of a producer and a consumer warp, which are right: compute-sanitizer's racecheck calls the first one a
// hazard (flash-attention's AI/RACECHECK_TMA_HAZARD.md).
#include "twins.cuh"

template <typename Load>
INLINE void pipeline(float* y, Load load) {  // y[4, 32] = what is loaded, twice
  __shared__ alignas(128) float stages[2][32];
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0)
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_init(&full[stage], 1);
      mbarrier_init(&empty[stage], 1);
    }
  fence_mbarrier_init();
  __syncthreads();
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int block = 0; block < 4; ++block) {
    const int stage = block % 2, round = block / 2;
    if (threadIdx.x < 32) {
      mbarrier_wait(&empty[stage], round & 1 ^ 1);
      if (lane == 0) {
        mbarrier_arrive_expect_tx(&full[stage], 128);
        load(stages[stage], block, &full[stage]);
      }
      __syncwarp();
    } else {
      mbarrier_wait(&full[stage], round & 1);
      y[block * 32 + lane] = 2 * stages[stage][lane];
      __syncwarp();
      if (lane == 0) mbarrier_arrive(&empty[stage]);
    }
  }
}

extern "C" __global__ void bulk_pipeline(const float* x, float* y) {
  pipeline(y, [=](float* stage, int block, uint64_t* full) { bulk_load(stage, x + block * 32, 128, full); });
}

extern "C" __global__ void tensor_pipeline(const __grid_constant__ TensorMap x, float* y) {  // boxes of 1 x 32
  pipeline(y, [&](float* stage, int block, uint64_t* full) { tma_load(stage, x, 0, block, full); });
}
