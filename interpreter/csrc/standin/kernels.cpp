// Attributes and occupancy of kernels.
#include <algorithm>

#include "standin.h"

using namespace gpuless::standin;

extern "C" {

cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      return finish(gpuless_kernel_allow_shared(host, value));
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      return finish(gpuless_kernel_allow_nonportable_clusters(host, value));
    case cudaFuncAttributePreferredSharedMemoryCarveout:
      if (value < -1 || value > 100)
        return refuse(cudaErrorInvalidValue, "a carve-out of " + std::to_string(value) + ": -1, or 0 to 100 per cent");
      return finish(cudaSuccess);
    case cudaFuncAttributeClusterSchedulingPolicyPreference:
      return finish(cudaSuccess);
    default:
      return unsupported("cudaFuncSetAttribute with this attribute");
  }
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* host) {
  gpuless_kernel_properties p;
  if (const int error = gpuless_kernel(host, &p)) return finish(error);
  const auto& device = *gpuless_device_get();
  *a = {};
  a->sharedSizeBytes = p.static_shared;
  a->constSizeBytes = p.constant;
  a->localSizeBytes = p.local;
  a->maxThreadsPerBlock = p.max_threads;
  a->numRegs = p.registers;
  a->ptxVersion = a->binaryVersion = device.major * 10 + device.minor;
  a->maxDynamicSharedSizeBytes = static_cast<int>(p.max_dynamic_shared);
  a->preferredShmemCarveout = -1;
  a->requiredClusterWidth = p.cluster[0];
  a->requiredClusterHeight = p.cluster[1];
  a->requiredClusterDepth = p.cluster[2];
  a->clusterDimMustBeSet = p.cluster[0] != 0;
  a->nonPortableClusterSizeAllowed = p.nonportable_clusters;
  return finish(cudaSuccess);
}

cudaError_t cudaFuncGetName(const char** name, const void* host) {
  gpuless_kernel_properties p;
  const int error = gpuless_kernel(host, &p);
  if (!error) *name = p.name;
  return finish(error);
}

cudaError_t cudaGetFuncBySymbol(cudaFunction_t* function, const void* host) {
  *function = reinterpret_cast<cudaFunction_t>(const_cast<void*>(host));
  return finish(cudaSuccess);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host, int threads,
                                                                   size_t shared, unsigned) {
  return finish(gpuless_occupancy(host, threads, static_cast<int64_t>(shared), blocks));
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* host, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, shared, 0);
}

cudaError_t cudaOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, const void* host, int blocks, int threads) {
  gpuless_kernel_properties p;
  int resident = 0;
  if (const int error = gpuless_kernel(host, &p)) return finish(error);
  if (const int error = gpuless_occupancy(host, threads, 0, &resident)) return finish(error);
  if (blocks < 1 || blocks > resident)
    return refuse(cudaErrorInvalidValue, std::to_string(blocks) + " blocks of a multiprocessor of " +
                                             gpuless_device_get()->arch + ", and 1 to " + std::to_string(resident) +
                                             " of this kernel fit");
  const auto& device = *gpuless_device_get();
  const int64_t each = device.shared_per_multiprocessor / blocks / 128 * 128 - device.shared_reserved_per_block;
  *bytes = static_cast<size_t>(std::min(each, device.shared_per_block_optin) - p.static_shared);
  return finish(cudaSuccess);
}

cudaError_t cudaOccupancyMaxPotentialClusterSize(int* size, const void* host, const cudaLaunchConfig_t* from) {
  gpuless_launch_config config;
  if (const cudaError_t error = read_config(*from, config)) return error;
  std::fill(config.cluster, config.cluster + 3, 1);
  int clusters;
  return finish(gpuless_cluster_occupancy(host, &config, size, &clusters));
}

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* host, const cudaLaunchConfig_t* from) {
  gpuless_launch_config config;
  if (const cudaError_t error = read_config(*from, config)) return error;
  int largest;
  return finish(gpuless_cluster_occupancy(host, &config, &largest, clusters));
}

}  // extern "C"
