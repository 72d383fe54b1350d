// What the occupancy calls say, against the formulas in CUDA's own cuda_occupancy.h.
#include <cuda_occupancy.h>
#include <cuda_runtime.h>

#include <cstdio>

template <int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) bounded(float* x) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = 0;
  x[threadIdx.x] = shared[threadIdx.x];
}

int differences = 0, comparisons = 0;

void compare(void (*kernel)(float*)) {
  cudaDeviceProp properties;
  cudaFuncAttributes attributes;
  cudaGetDeviceProperties(&properties, 0);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(properties.sharedMemPerBlockOptin));
  cudaFuncGetAttributes(&attributes, kernel);
  cudaOccDeviceProp device(properties);
  cudaOccFuncAttributes function(attributes);
  function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  function.maxDynamicSharedSizeBytes = properties.sharedMemPerBlockOptin;
  for (int threads = 1; threads <= attributes.maxThreadsPerBlock; threads += 31) {
    for (size_t bytes = 0; bytes <= properties.sharedMemPerBlockOptin; bytes += 3333) {
      cudaOccDeviceState state;
      cudaOccResult expected;
      int blocks = -1;
      cudaOccError status =
          cudaOccMaxActiveBlocksPerMultiprocessor(&expected, &device, &function, &state, threads, bytes);
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
      ++comparisons;
      if (status == CUDA_OCC_SUCCESS && blocks == expected.activeBlocksPerMultiprocessor) continue;
      if (!differences++)
        std::printf("%d threads of %d registers, %zu bytes: %d blocks, not %d\n", threads, attributes.numRegs, bytes,
                    expected.activeBlocksPerMultiprocessor, blocks);
    }
  }
}

int main() {
  compare(bounded<1024, 1>);
  compare(bounded<512, 2>);
  compare(bounded<256, 3>);
  compare(bounded<384, 1>);
  compare(bounded<96, 5>);
  compare(bounded<32, 24>);
  std::printf("%d of %d differ\n", differences, comparisons);
  std::printf("%s\n", differences ? "FAIL" : "PASS");
  return differences != 0;
}
