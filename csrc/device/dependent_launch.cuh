#pragma once
// Programmatic dependent launches: a kernel that is launched so may begin before the kernels before it in the stream
// have ended. Its launch and what it does until ptx::wait_for_earlier_kernels then take no time of their own. That wait
// comes before the first access to memory that those kernels read or write, in every thread that has any.
#include <cuda_runtime.h>

namespace forwardpass {

// Whether this file's code for a device of this architecture has the wait: it is the highest that was compiled and that
// the device can run, and there is no wait before sm_90. Not inline, as files are compiled for different architectures.
[[maybe_unused]] static bool waits_for_earlier_kernels(int arch) {
  for (const int compiled : {__CUDA_ARCH_LIST__})
    if (compiled >= 900 && compiled <= arch * 10) return true;
  return false;
}

struct Launch {
  int64_t grid;
  int block, shared = 0, cluster = 0;  // 0: the kernel has none
  bool dependent = false;
};

// f(the launch as cudart takes it)
template <class F>
cudaError_t with_config(const Launch& l, cudaStream_t stream, F f) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned count = 0;
  if (l.dependent) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (l.cluster) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(l.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(l.grid);
  config.blockDim = static_cast<unsigned>(l.block);
  config.dynamicSmemBytes = static_cast<size_t>(l.shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  const cudaError_t error = f(config);
  if (error) cudaGetLastError();  // which would else return it once more, to the next kernel's launch by <<<…>>>
  return error;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), const Launch& l, cudaStream_t stream,
                          const Arguments&... arguments) {
  return with_config(l, stream, [&](const auto& config) { return cudaLaunchKernelEx(&config, kernel, arguments...); });
}

}  // namespace forwardpass
