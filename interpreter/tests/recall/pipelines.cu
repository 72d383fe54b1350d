// Needs: sm_90a
#include "twins.cuh"

INLINE void init_barriers(uint64_t* barriers, int n, int arrivals) {
  if (threadIdx.x == 0)
    for (int i = 0; i < n; ++i) mbarrier_init(&barriers[i], arrivals);
  fence_mbarrier_init();
  __syncthreads();
}

// All wait for bulk groups, but they belong to the one thread that issued them: the others fill a buffer that TMA
// reads.
KERNEL transformer_engine_3417(const float* x, float* y) {  // y[4, 128] = x[4, 128] + 1
  __shared__ alignas(128) float buffers[2][128];
  for (int tile = 0; tile < 4; ++tile) {
    float* buffer = buffers[tile % 2];
    buffer[threadIdx.x] = x[tile * 128 + threadIdx.x] + 1;  // HAZARD
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) bulk_store(y + tile * 128, buffer, 512);  // HAZARD
    bulk_commit();
    bulk_wait_read<1>();
    if (!broken) __syncthreads();
  }
  if (threadIdx.x == 0) bulk_wait<0>();
}
TWINS(transformer_engine_3417);

// A consumer waits at the barrier of its first stage, in every stage: from the second on it reads what has not come.
KERNEL tensorrt_llm_15338(const float* x, float* y) {  // x[4, 128]; y[128] = sums over the four
  __shared__ alignas(128) float stages[4][128];
  __shared__ uint64_t full[4];
  init_barriers(full, 4, 1);
  if (threadIdx.x == 0)
    for (int stage = 0; stage < 4; ++stage) {
      mbarrier_arrive_expect_tx(&full[stage], 512);
      bulk_load(stages[stage], x + stage * 128, 512, &full[stage]);  // HAZARD
    }
  float sum = 0;
  for (int stage = 0; stage < 4; ++stage) {
    mbarrier_wait(broken ? &full[0] : &full[stage], 0);
    sum += stages[stage][threadIdx.x];  // HAZARD
  }
  y[threadIdx.x] = sum;
}
TWINS(tensorrt_llm_15338);

// Every thread looks at a number that the leader publishes; the leader writes the next one while others still look.
KERNEL tensorrt_llm_18339(const float* x, float* y) {  // y[128] = x[0] + x[1] + x[2]
  __shared__ float published;
  float sum = 0;
  for (int phase = 0; phase < 3; ++phase) {
    if (threadIdx.x == 0) published = x[phase];  // HAZARD
    __syncthreads();
    sum += published;  // HAZARD
    if (!broken) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
TWINS(tensorrt_llm_18339);

// One piece of shared memory holds an input, then the result; the next input is loaded while TMA still stores the
// result.
KERNEL mkernel_18(const float* x, float* y) {  // y[3, 128] = x[3, 128] + 1
  __shared__ alignas(128) float tile[128];
  __shared__ uint64_t full;
  init_barriers(&full, 1, 1);
  for (int task = 0; task < 3; ++task) {
    if (threadIdx.x == 0) {
      if (!broken) bulk_wait_read<0>();
      mbarrier_arrive_expect_tx(&full, 512);
      bulk_load(tile, x + task * 128, 512, &full);  // HAZARD
    }
    mbarrier_wait(&full, task & 1);
    tile[threadIdx.x] += 1;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      bulk_store(y + task * 128, tile, 512);  // HAZARD
      bulk_commit();
    }
  }
  if (threadIdx.x == 0) bulk_wait<0>();
}
TWINS(mkernel_18);

// The last wait of each tile does not turn the parity: in the second tile all waits are off by one.
KERNEL helion_3621(const float* x, float* y) {  // x[2 tiles, 2 steps, 128]; y[2, 128] = sums over steps
  __shared__ alignas(128) float stage[128];
  __shared__ uint64_t barriers[2];
  uint64_t *full = &barriers[0], *empty = &barriers[1];
  if (threadIdx.x == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 128);
  }
  fence_mbarrier_init();
  __syncthreads();
  if (threadIdx.x >= 128) {  // the producer: a warp, of which a lane works
    for (int step = 0; threadIdx.x == 128 && step < 4; ++step) {
      mbarrier_wait(empty, step & 1 ^ 1);
      mbarrier_arrive_expect_tx(full, 512);
      bulk_load(stage, x + step * 128, 512, full);  // HAZARD
    }
    return;
  }
  int parity = 0;
  for (int tile = 0; tile < 2; ++tile) {
    float sum = 0;
    for (int step = 0; step < 2; ++step) {
      mbarrier_wait(full, parity);  // HAZARD
      if (!broken || step != 1) parity ^= 1;
      sum += stage[threadIdx.x];  // HAZARD
      mbarrier_arrive(empty);     // HAZARD
    }
    y[tile * 128 + threadIdx.x] = sum;
  }
}
TWINS(helion_3621);

// A tensor map in global memory is changed for the next group, while a load through it may still be under way.
INLINE void publish(TensorMap* map, const TensorMap* shared) {
  asm volatile(
      "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::"l"(
          map),
      "r"(shared_address(shared))
      : "memory");
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}
KERNEL deepgemm_343(const __grid_constant__ TensorMap first, const float* second, TensorMap* map,
                    float* y) {  // y[2, 256]
  __shared__ alignas(128) float tiles[2][256];
  __shared__ alignas(128) TensorMap shared;
  __shared__ uint64_t full[2];
  reinterpret_cast<int*>(&shared)[threadIdx.x] = reinterpret_cast<const int*>(&first)[threadIdx.x];
  init_barriers(full, 2, 1);
  for (int group = 0; group < 2; ++group) {
    if (group == 1 && threadIdx.x == 0) {
      if (!broken) mbarrier_wait(&full[0], 0);
      asm volatile(
          "tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(shared_address(&shared)),
          "l"(second)
          : "memory");
    }
    __syncwarp();
    publish(map, &shared);  // HAZARD
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(&full[group], 1024);
      tma_load(tiles[group], *map, 0, 0, &full[group]);  // HAZARD
    }
  }
  for (int group = 0; group < 2; ++group) {
    mbarrier_wait(&full[group], 0);
    for (int i = threadIdx.x; i < 256; i += 32) y[group * 256 + i] = tiles[group][i];
  }
}
TWINS_OF(deepgemm_343, const __grid_constant__ TensorMap, const float*, TensorMap*, float*);

// One thread initialises an mbarrier, and the others use it at once.
KERNEL triton_2040(const float* x, float* y) {  // y[128] = x[128]
  __shared__ uint64_t barrier;
  if (threadIdx.x == 0) mbarrier_init(&barrier, 128);  // HAZARD
  if (!broken) __syncthreads();
  mbarrier_arrive(&barrier);  // HAZARD
  mbarrier_wait(&barrier, 0);
  y[threadIdx.x] = x[threadIdx.x];
}
TWINS(triton_2040);
