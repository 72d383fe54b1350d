#pragma once
// A kernel with dynamic shared memory carries its size in its name, by a last template parameter that nobody passes:
//
//   template <class Config, class = SharedBytesOf<Config>>
//   __global__ void __launch_bounds__(Config::kThreads) gemm_kernel(GemmParams p);
//   gemm_kernel<Config><<<grid, Config::kThreads, sizeof(typename Config::SharedStorage), stream>>>(p);
//
// A cubin has no other place for what a launch adds. From the name tests/gates.py takes the kernel's shared memory and
// its blocks per SM; profilers show it too.

namespace forwardpass {

template <unsigned Bytes>
struct SharedBytes {};

template <class Config>
using SharedBytesOf = SharedBytes<sizeof(typename Config::SharedStorage)>;

}  // namespace forwardpass
