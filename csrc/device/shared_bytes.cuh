#pragma once
// A kernel with dynamic shared memory carries its size in its name, by a last template parameter that nobody passes:
//
//   template <class Config, class = SharedBytesOf<Config>>
//   __global__ void __launch_bounds__(Config::kThreads) gemm_kernel(GemmParams p);
//   if (auto e = allow_shared<gemm_kernel<Config>>(sizeof(typename Config::SharedStorage))) return e;
//   gemm_kernel<Config><<<grid, Config::kThreads, sizeof(typename Config::SharedStorage), stream>>>(p);
//
// A cubin has no other place for what a launch adds. From the name tests/gates/gates.py takes the kernel's shared
// memory and its blocks per SM; profilers show it too.
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace forwardpass {

template <unsigned Bytes>
struct SharedBytes {};

template <class Config>
using SharedBytesOf = SharedBytes<sizeof(typename Config::SharedStorage)>;

// Lets a kernel have more than the 48 KB that need no permission. Asked for once on each device, as each call goes to
// the driver.
template <auto* Kernel>
cudaError_t allow_shared(size_t bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit a device; beyond the 64th it is asked for each time
  int device = 0;
  if (auto e = cudaGetDevice(&device)) return e;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return cudaSuccess;
  if (auto e = cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)))
    return e;
  allowed.fetch_or(bit, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace forwardpass
