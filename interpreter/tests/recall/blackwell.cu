// Needs: sm_100a
#include "twins.cuh"

INLINE void fill(uint16_t* shared, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) shared[i] = 0x3c00;  // one
}
#define TENSOR_KERNEL_BEGIN                                        \
  __shared__ alignas(128) uint16_t a[128 * 16], b[16 * 16];        \
  __shared__ uint64_t barriers[2];                                 \
  __shared__ uint32_t address;                                     \
  fill(a, 128 * 16);                                               \
  fill(b, 16 * 16);                                                \
  if (threadIdx.x < 32) tensor_alloc(&address);                    \
  if (threadIdx.x == 0)                                            \
    for (uint64_t& barrier : barriers) mbarrier_init(&barrier, 1); \
  fence_proxy_async();                                             \
  __syncthreads();
#define TENSOR_KERNEL_END \
  __syncthreads();        \
  if (threadIdx.x < 32) tensor_free(address);

// The next product is written to columns of tensor memory that other warps still load.
KERNEL cudnn_frontend_396(const float* x, float* y) {  // y[2, 128, 4] = 16
  TENSOR_KERNEL_BEGIN
  for (int step = 0; step < 2; ++step) {
    if (threadIdx.x == 0) {
      tensor_product(address, a, b, false);  // HAZARD
      tensor_commit(&barriers[step]);
    }
    mbarrier_wait(&barriers[step], 0);
    float d[4];
    tensor_load(d, address);  // HAZARD
    tensor_load_wait();
    if (!broken) {
      asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
      __syncthreads();
      asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
    }
    for (int i = 0; i < 4; ++i) y[(step * 128 + threadIdx.x) * 4 + i] = d[i] * x[0];
  }
  TENSOR_KERNEL_END
}
TWINS(cudnn_frontend_396);

// One thread starts a product on what the others store to tensor memory, before their stores are done.
KERNEL flash_attention_2033(const float* x, float* y) {  // y[128, 4] = 3 + 16
  TENSOR_KERNEL_BEGIN
  for (int column = 0; column < 16; column += 4) tensor_store(address + column, 3 * x[0]);  // HAZARD
  if (!broken) tensor_store_wait();
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
  __syncthreads();
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
  if (threadIdx.x == 0) {
    tensor_product(address, a, b, true);  // HAZARD
    tensor_commit(&barriers[0]);
  }
  mbarrier_wait(&barriers[0], 0);
  float d[4];
  tensor_load(d, address);
  tensor_load_wait();
  for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = d[i];
  TENSOR_KERNEL_END
}
TWINS(flash_attention_2033);
