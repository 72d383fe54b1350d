// The driver's devices and contexts, and its functions by name.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "driver.h"

using namespace gpuless::standin;

struct CUctx_st {
  unsigned flags;
};

namespace {

std::vector<CUcontext>& contexts() {  // of the thread; the current one is the last
  thread_local std::vector<CUcontext> stack;
  return stack;
}

CUresult make_context(CUcontext* context, CUdevice device) {
  if (const CUresult error = driver([=] { return cudaSetDevice(device); })) return error;
  contexts().push_back(the_context());
  *context = the_context();
  return CUDA_SUCCESS;
}

// The private table that NVIDIA's cudart asks for when a process first uses it.
constexpr unsigned char kTableOfCudart[16] = {0x6b, 0xd5, 0xfb, 0x6c, 0x5b, 0xf4, 0xe7, 0x4a,
                                              0x89, 0x87, 0xd9, 0x39, 0x12, 0xfd, 0x9d, 0xf9};

// A library with a cudart of its own is told by cudart "named symbol not found" alone: this says why, and what to do.
void refuse_cudart(const void* caller) {
  Dl_info library{};
  const bool known = dladdr(caller, &library) && library.dli_fname;
  const std::string why = std::string("NVIDIA's cudart in ") + (known ? library.dli_fname : "this program") +
                          " needs private tables of NVIDIA's driver, which gpuless does not have: give gpuless the "
                          "kernel's PTX (gpuless.Module) or its CUDA source (python -m gpuless verify)";
  std::fprintf(stderr, "gpuless: %s\n", why.c_str());
  gpuless_log_incomplete(why.c_str());
}

}  // namespace

namespace gpuless::standin {

CUcontext the_context() {
  static CUctx_st context{};
  return &context;
}

}  // namespace gpuless::standin

extern "C" {

CUresult cuInit(unsigned flags) {
  if (flags) return CUDA_ERROR_INVALID_VALUE;
  int count;
  return driver([&] { return cudaGetDeviceCount(&count); });
}
CUresult cuDriverGetVersion(int* version) {
  return driver([=] { return cudaDriverGetVersion(version); });
}

CUresult cuDeviceGetCount(int* count) {
  return driver([=] { return cudaGetDeviceCount(count); });
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return driver([=] { return cudaSetDevice(ordinal); });
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  return driver([=] { return cudaDeviceGetAttribute(value, static_cast<cudaDeviceAttr>(attribute), device); });
}
CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  cudaDeviceProp p;
  const CUresult error = driver([&] { return cudaGetDeviceProperties(&p, device); });
  if (!error) std::snprintf(name, static_cast<size_t>(length), "%s", p.name);
  return error;
}
CUresult cuDeviceTotalMem(size_t* bytes, CUdevice device) {
  cudaDeviceProp p;
  const CUresult error = driver([&] { return cudaGetDeviceProperties(&p, device); });
  if (!error) *bytes = p.totalGlobalMem;
  return error;
}
CUresult cuDeviceComputeCapability(int* major, int* minor, CUdevice device) {
  const CUresult error = cuDeviceGetAttribute(major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  return error ? error : cuDeviceGetAttribute(minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
}
CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
  return driver([=] { return cudaDeviceGetPCIBusId(id, length, device); });
}
CUresult cuDeviceGetUuid(CUuuid* uuid, CUdevice device) {
  *uuid = {};
  return driver([=] { return cudaSetDevice(device); });
}
CUresult cuDeviceCanAccessPeer(int* can, CUdevice device, CUdevice peer) {
  return driver([=] { return cudaDeviceCanAccessPeer(can, device, peer); });
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = the_context();
  return driver([=] { return cudaSetDevice(device); });
}
CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  return driver([=] { return cudaSetDevice(device); });
}
CUresult cuDevicePrimaryCtxReset(CUdevice device) {
  return driver([=] { return cudaSetDevice(device); });
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return driver([=] { return cudaSetDevice(device); });
}
// cuCtxCreate by the names that the headers of CUDA 12 and 13 give it: their arguments differ.
CUresult create_context_12(CUcontext*, unsigned, CUdevice) asm("cuCtxCreate_v2");
CUresult create_context_12(CUcontext* context, unsigned, CUdevice device) { return make_context(context, device); }
CUresult create_context_13(CUcontext*, void*, unsigned, CUdevice) asm("cuCtxCreate_v4");
CUresult create_context_13(CUcontext* context, void* parameters, unsigned, CUdevice device) {
  if (parameters) return driver([] { return unsupported("cuCtxCreate with parameters"); });
  return make_context(context, device);
}
CUresult cuCtxDestroy(CUcontext) {
  if (!contexts().empty()) contexts().pop_back();
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = contexts().empty() ? nullptr : contexts().back();
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  if (!contexts().empty()) contexts().pop_back();
  if (context) contexts().push_back(context);
  return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext context) {
  if (!context) return CUDA_ERROR_INVALID_VALUE;
  contexts().push_back(context);
  return CUDA_SUCCESS;
}
CUresult cuCtxPopCurrent(CUcontext* context) {
  if (contexts().empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (context) *context = contexts().back();
  contexts().pop_back();
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice* device) {
  return driver([=] { return cudaGetDevice(device); });
}
CUresult cuCtxSynchronize() { return driver(cudaDeviceSynchronize); }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  return driver([=] { return cudaDeviceSetLimit(static_cast<cudaLimit>(limit), value); });
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  return driver([=] { return cudaDeviceGetLimit(value, static_cast<cudaLimit>(limit)); });
}
CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  return driver([=] { return cudaDeviceGetStreamPriorityRange(least, greatest); });
}

// gpuless has none of the driver's private tables. NVRTC asks for one if cuInit succeeds, does without, and crashes if
// this function is missing. NVIDIA's cudart cannot do without its own.
CUresult cuGetExportTable(const void** table, const CUuuid* id) {
  if (!std::memcmp(id->bytes, kTableOfCudart, sizeof kTableOfCudart)) refuse_cudart(__builtin_return_address(0));
  *table = nullptr;
  return CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetProcAddress(const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* status) {
  *function = driver_function(name);
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;  // without words: cuda-bindings asks for all of 500 names
}

}  // extern "C"

void* gpuless::standin::driver_function(const char* name) {
  struct Row {
    const char* name;
    void* function;
  };
  // The macros of cuda.h give a name its version, but not where it becomes a text.
#define ROW(name)                        \
  {                                      \
    #name, reinterpret_cast<void*>(name) \
  }
  static const Row rows[] = {
      ROW(cuInit),
      ROW(cuDriverGetVersion),
      ROW(cuGetErrorName),
      ROW(cuGetErrorString),
      ROW(cuGetProcAddress),
      ROW(cuGetExportTable),
      ROW(cuDeviceGet),
      ROW(cuDeviceGetCount),
      ROW(cuDeviceGetAttribute),
      ROW(cuDeviceGetName),
      ROW(cuDeviceTotalMem),
      ROW(cuDeviceGetPCIBusId),
      ROW(cuDeviceGetUuid),
      ROW(cuDeviceCanAccessPeer),
      ROW(cuDevicePrimaryCtxRetain),
      ROW(cuDevicePrimaryCtxRelease),
      ROW(cuDevicePrimaryCtxReset),
      ROW(cuDevicePrimaryCtxGetState),
      ROW(cuCtxDestroy),
      ROW(cuCtxGetCurrent),
      ROW(cuCtxSetCurrent),
      ROW(cuCtxPushCurrent),
      ROW(cuCtxPopCurrent),
      ROW(cuCtxGetDevice),
      ROW(cuCtxSynchronize),
      ROW(cuCtxSetLimit),
      ROW(cuCtxGetLimit),
      ROW(cuCtxGetStreamPriorityRange),
      ROW(cuModuleLoad),
      ROW(cuModuleLoadData),
      ROW(cuModuleLoadDataEx),
      ROW(cuModuleLoadFatBinary),
      ROW(cuModuleUnload),
      ROW(cuModuleGetFunction),
      ROW(cuModuleGetGlobal),
      ROW(cuLibraryLoadData),
      ROW(cuLibraryUnload),
      ROW(cuLibraryGetKernel),
      ROW(cuLibraryGetModule),
      ROW(cuKernelGetFunction),
      ROW(cuLinkCreate),
      ROW(cuLinkAddData),
      ROW(cuLinkAddFile),
      ROW(cuLinkComplete),
      ROW(cuLinkDestroy),
      ROW(cuFuncGetAttribute),
      ROW(cuFuncSetAttribute),
      ROW(cuFuncGetName),
      ROW(cuFuncGetParamInfo),
      ROW(cuLaunchKernel),
      ROW(cuLaunchKernelEx),
      ROW(cuLaunchCooperativeKernel),
      ROW(cuLaunchHostFunc),
      ROW(cuOccupancyMaxActiveBlocksPerMultiprocessor),
      ROW(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags),
      ROW(cuOccupancyMaxPotentialBlockSize),
      ROW(cuOccupancyAvailableDynamicSMemPerBlock),
      ROW(cuOccupancyMaxPotentialClusterSize),
      ROW(cuOccupancyMaxActiveClusters),
      ROW(cuTensorMapEncodeTiled),
      ROW(cuTensorMapEncodeIm2col),
      ROW(cuMemAlloc),
      ROW(cuMemAllocAsync),
      ROW(cuMemAllocPitch),
      ROW(cuMemAllocManaged),
      ROW(cuMemAllocHost),
      ROW(cuMemHostAlloc),
      ROW(cuMemFree),
      ROW(cuMemFreeAsync),
      ROW(cuMemFreeHost),
      ROW(cuMemHostRegister),
      ROW(cuMemHostUnregister),
      ROW(cuMemHostGetDevicePointer),
      ROW(cuMemGetInfo),
      ROW(cuMemGetAddressRange),
      ROW(cuPointerGetAttribute),
      ROW(cuMemcpy),
      ROW(cuMemcpyAsync),
      ROW(cuMemcpyHtoD),
      ROW(cuMemcpyHtoDAsync),
      ROW(cuMemcpyDtoH),
      ROW(cuMemcpyDtoHAsync),
      ROW(cuMemcpyDtoD),
      ROW(cuMemcpyDtoDAsync),
      ROW(cuMemcpy2D),
      ROW(cuMemcpy2DAsync),
      ROW(cuMemsetD8),
      ROW(cuMemsetD8Async),
      ROW(cuMemsetD16),
      ROW(cuMemsetD16Async),
      ROW(cuMemsetD32),
      ROW(cuMemsetD32Async),
      ROW(cuStreamCreate),
      ROW(cuStreamCreateWithPriority),
      ROW(cuStreamDestroy),
      ROW(cuStreamSynchronize),
      ROW(cuStreamQuery),
      ROW(cuStreamWaitEvent),
      ROW(cuStreamGetFlags),
      ROW(cuStreamGetPriority),
      ROW(cuStreamGetCtx),
      ROW(cuStreamBeginCapture),
      ROW(cuStreamEndCapture),
      ROW(cuStreamIsCapturing),
      ROW(cuGraphInstantiateWithFlags),
      ROW(cuGraphLaunch),
      ROW(cuGraphDestroy),
      ROW(cuGraphExecDestroy),
      ROW(cuEventCreate),
      ROW(cuEventDestroy),
      ROW(cuEventRecord),
      ROW(cuEventRecordWithFlags),
      ROW(cuEventQuery),
      ROW(cuEventSynchronize),
      ROW(cuEventElapsedTime),
  };
#undef ROW
  for (const Row& r : rows)
    if (!std::strcmp(r.name, name)) return r.function;
  return nullptr;
}
