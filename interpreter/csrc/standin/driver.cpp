// The driver's modules, functions, launches and tensor maps. A CUmodule is an image that was loaded, a CUfunction is
// what cudart's functions know a kernel by.
#include "driver.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

using namespace gpuless::standin;

namespace {

// The log that the options of cuModuleLoadDataEx ask for: what the interpreter says of a failure.
void write_logs(unsigned count, const CUjit_option* options, void** values, const char* error) {
  const auto size_of = [&](CUjit_option option) -> unsigned* {
    for (unsigned k = 0; k < count; ++k)
      if (options[k] == option) return reinterpret_cast<unsigned*>(&values[k]);
    return nullptr;
  };
  for (unsigned k = 0; k < count; ++k) {
    const bool errors = options[k] == CU_JIT_ERROR_LOG_BUFFER;
    if (!errors && options[k] != CU_JIT_INFO_LOG_BUFFER) continue;  // the others are about SASS
    unsigned* size = size_of(errors ? CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES : CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES);
    if (!size || !*size) continue;
    const int length = std::snprintf(static_cast<char*>(values[k]), *size, "%s", errors ? error : "");
    *size = std::min(*size, static_cast<unsigned>(length) + 1);
  }
}

CUresult load(void** image, const void* code, unsigned count = 0, const CUjit_option* options = nullptr,
              void** values = nullptr) {
  const CUresult error = driver([=] { return finish(gpuless_image_load(code, image)); });
  write_logs(count, options, values, error ? gpuless_finding() : "");
  return error;
}

CUresult kernel_of(void* image, const char* name, const void** host) {
  return driver([=] { return finish(gpuless_image_kernel(image, name, host)); });
}

CUresult launch_with(CUfunction f, const gpuless_launch_config& config, CUstream stream, void** parameters,
                     void** extra) {
  std::vector<void*> places;
  if (extra) {  // a buffer with all of them in place of pointers to each
    char* buffer = nullptr;
    for (; *extra != CU_LAUNCH_PARAM_END; extra += 2)
      if (*extra == CU_LAUNCH_PARAM_BUFFER_POINTER) buffer = static_cast<char*>(extra[1]);
    if (!buffer || parameters) return CUDA_ERROR_INVALID_VALUE;
    size_t offset, bytes;
    for (size_t k = 0; !cuFuncGetParamInfo(f, k, &offset, &bytes); ++k) places.push_back(buffer + offset);
    parameters = places.data();
  }
  return driver([&] { return launch(f, config, parameters, stream); });
}

// The same structures by other names.
static_assert(sizeof(CUlaunchAttribute) == sizeof(cudaLaunchAttribute));
static_assert(offsetof(CUlaunchAttribute, value) == offsetof(cudaLaunchAttribute, val));
cudaLaunchConfig_t config_of(const CUlaunchConfig& c) {
  cudaLaunchConfig_t config{};
  config.gridDim = {c.gridDimX, c.gridDimY, c.gridDimZ};
  config.blockDim = {c.blockDimX, c.blockDimY, c.blockDimZ};
  config.dynamicSmemBytes = c.sharedMemBytes;
  config.stream = c.hStream;
  config.attrs = reinterpret_cast<cudaLaunchAttribute*>(c.attrs);
  config.numAttrs = c.numAttrs;
  return config;
}

}  // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule* module, const void* code) { return load(reinterpret_cast<void**>(module), code); }
CUresult cuModuleLoadDataEx(CUmodule* module, const void* code, unsigned count, CUjit_option* options, void** values) {
  return load(reinterpret_cast<void**>(module), code, count, options, values);
}
CUresult cuModuleLoadFatBinary(CUmodule* module, const void* code) { return cuModuleLoadData(module, code); }
CUresult cuModuleLoad(CUmodule* module, const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::ostringstream text;
  text << file.rdbuf();
  return cuModuleLoadData(module, text.str().c_str());
}
CUresult cuModuleUnload(CUmodule module) {
  gpuless_image_unregister(module);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  return kernel_of(module, name, const_cast<const void**>(reinterpret_cast<void**>(f)));
}
CUresult cuModuleGetGlobal(CUdeviceptr* address, size_t* bytes, CUmodule module, const char* name) {
  return driver([=] {
    const void* host;
    void* begin = nullptr;
    int64_t size = 0;
    int error = gpuless_image_variable(module, name, &host);
    if (!error) error = gpuless_variable(host, &begin, &size);
    if (address) *address = reinterpret_cast<CUdeviceptr>(begin);
    if (bytes) *bytes = static_cast<size_t>(size);
    return finish(error);
  });
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* options, void** values, unsigned count,
                           CUlibraryOption*, void**, unsigned) {
  return load(reinterpret_cast<void**>(library), code, count, options, values);
}
CUresult cuLibraryUnload(CUlibrary library) { return cuModuleUnload(reinterpret_cast<CUmodule>(library)); }
CUresult cuLibraryGetModule(CUmodule* module, CUlibrary library) {
  *module = reinterpret_cast<CUmodule>(library);
  return CUDA_SUCCESS;
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
  return kernel_of(library, name, const_cast<const void**>(reinterpret_cast<void**>(kernel)));
}
CUresult cuKernelGetFunction(CUfunction* f, CUkernel kernel) {
  *f = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction f) {
  cudaFuncAttributes a;
  if (const CUresult error = driver([&] { return cudaFuncGetAttributes(&a, f); })) return error;
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = a.maxThreadsPerBlock;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = static_cast<int>(a.sharedSizeBytes);
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
      *value = static_cast<int>(a.constSizeBytes);
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      *value = static_cast<int>(a.localSizeBytes);
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = a.numRegs;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
      *value = a.ptxVersion;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      *value = a.binaryVersion;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      *value = a.maxDynamicSharedSizeBytes;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      *value = a.preferredShmemCarveout;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_CLUSTER_SIZE_MUST_BE_SET:
      *value = a.clusterDimMustBeSet;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH:
      *value = a.requiredClusterWidth;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_HEIGHT:
      *value = a.requiredClusterHeight;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_DEPTH:
      *value = a.requiredClusterDepth;
      return CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      *value = a.nonPortableClusterSizeAllowed;
      return CUDA_SUCCESS;
    default:
      return driver([] { return unsupported("cuFuncGetAttribute of this attribute"); });
  }
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) {
  return driver([=] { return cudaFuncSetAttribute(f, static_cast<cudaFuncAttribute>(attribute), value); });
}
CUresult cuFuncGetName(const char** name, CUfunction f) {
  return driver([=] { return cudaFuncGetName(name, f); });
}
CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t* offset, size_t* bytes) {
  int64_t at_offset = 0, size = 0;
  const CUresult error =
      driver([&] { return gpuless_kernel_parameter(f, static_cast<int>(index), &at_offset, &size); });
  if (error) return error;
  *offset = static_cast<size_t>(at_offset);
  if (bytes) *bytes = static_cast<size_t>(size);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** parameters,
                        void** extra) {
  return launch_with(f, gpuless::standin::config_of({grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared),
                     stream, parameters, extra);
}
CUresult cuLaunchCooperativeKernel(CUfunction f, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                                   unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                                   void** parameters) {
  return driver([=] {
    return cudaLaunchCooperativeKernel(f, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, parameters, shared,
                                       stream);
  });
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* from, CUfunction f, void** parameters, void** extra) {
  gpuless_launch_config config;
  if (const CUresult error = driver([&] { return read_config(config_of(*from), config); })) return error;
  return launch_with(f, config, from->hStream, parameters, extra);
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, CUfunction f, int threads, size_t shared,
                                                              unsigned flags) {
  return driver(
      [=] { return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, flags); });
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction f, int threads, size_t shared) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, f, threads, shared, 0);
}
// The largest block of those with which most threads are resident.
CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction f, CUoccupancyB2DSize shared_of,
                                          size_t shared, int limit) {
  int largest, multiprocessors;
  CUresult error = cuFuncGetAttribute(&largest, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, f);
  if (!error) error = cuDeviceGetAttribute(&multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 0);
  if (error) return error;
  if (limit > 0) largest = std::min(largest, limit);
  *grid = *block = 0;
  int most = 0;
  for (int threads = largest; threads > 0; threads = (threads - 1) / 32 * 32) {
    int blocks;
    error = cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, f, threads, shared_of ? shared_of(threads) : shared);
    if (error) return error;
    if (blocks * threads > most) most = blocks * threads, *grid = blocks * multiprocessors, *block = threads;
  }
  return CUDA_SUCCESS;
}
CUresult cuOccupancyAvailableDynamicSMemPerBlock(size_t* bytes, CUfunction f, int blocks, int threads) {
  return driver([=] { return cudaOccupancyAvailableDynamicSMemPerBlock(bytes, f, blocks, threads); });
}
CUresult cuOccupancyMaxPotentialClusterSize(int* size, CUfunction f, const CUlaunchConfig* from) {
  const cudaLaunchConfig_t config = config_of(*from);
  return driver([&] { return cudaOccupancyMaxPotentialClusterSize(size, f, &config); });
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction f, const CUlaunchConfig* from) {
  const cudaLaunchConfig_t config = config_of(*from);
  return driver([&] { return cudaOccupancyMaxActiveClusters(clusters, f, &config); });
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t));
  const int result = gpuless_tensor_map_encode_tiled(map, type, rank, address, reinterpret_cast<const uint64_t*>(sizes),
                                                     reinterpret_cast<const uint64_t*>(strides), box, element_strides,
                                                     interleave, swizzle, promotion, fill);
  if (result) std::fprintf(stderr, "cuTensorMapEncodeTiled: %s\n", gpuless_tensor_map_error());
  return static_cast<CUresult>(result);
}
CUresult cuTensorMapEncodeIm2col(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                 const cuuint64_t* sizes, const cuuint64_t* strides, const int* lower, const int* upper,
                                 cuuint32_t channels, cuuint32_t pixels, const cuuint32_t* element_strides,
                                 CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                 CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  const int result = gpuless_tensor_map_encode_im2col(
      map, type, rank, address, reinterpret_cast<const uint64_t*>(sizes), reinterpret_cast<const uint64_t*>(strides),
      lower, upper, channels, pixels, element_strides, interleave, swizzle, promotion, fill);
  if (result) std::fprintf(stderr, "cuTensorMapEncodeIm2col: %s\n", gpuless_tensor_map_error());
  return static_cast<CUresult>(result);
}

}  // extern "C"
