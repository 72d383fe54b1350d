// The driver's memory, streams, events and graphs.
#include <cstring>

#include "driver.h"

using namespace gpuless::standin;

namespace {

template <class T>
CUresult fill(CUdeviceptr to, T value, size_t count, CUstream stream) {
  return driver([=] {
    const auto begin = reinterpret_cast<T*>(to);
    const bool fits = to % sizeof(T) == 0 && gpuless_storage_find(begin, static_cast<int64_t>(count * sizeof(T)));
    if (count && !fits) return finish(cudaErrorInvalidValue);
    const T repeated = static_cast<T>(static_cast<T>(-1) / 0xff * (value & 0xff));  // the low byte in each byte
    return enqueue(stream, [=] {
      if (value == repeated) return finish(gpuless_fill(begin, value & 0xff, static_cast<int64_t>(count * sizeof(T))));
      for (size_t i = 0; i < count; ++i) begin[i] = value;
      return finish(cudaSuccess);
    });
  });
}
template <class T>
CUresult fill_at_once(CUdeviceptr to, T value, size_t count) {
  const CUresult error = driver(legacy_refused_by_capture);
  return error ? error : fill(to, value, count, CU_STREAM_LEGACY);
}

// The driver allocates no empty memory.
template <class F>
CUresult allocate(size_t bytes, F call) {
  return bytes ? driver(call) : CUDA_ERROR_INVALID_VALUE;
}

CUresult copy_2d(const CUDA_MEMCPY2D* c, CUstream stream) {
  const auto place = [](CUmemorytype type, const void* host, CUdeviceptr device) {
    return type == CU_MEMORYTYPE_HOST ? static_cast<const char*>(host) : reinterpret_cast<const char*>(device);
  };
  if (c->srcMemoryType == CU_MEMORYTYPE_ARRAY || c->dstMemoryType == CU_MEMORYTYPE_ARRAY)
    return driver([] { return unsupported("cuMemcpy2D from or to a CUarray"); });
  const auto kind = [&] {
    if (c->srcMemoryType == CU_MEMORYTYPE_UNIFIED || c->dstMemoryType == CU_MEMORYTYPE_UNIFIED)
      return cudaMemcpyDefault;
    if (c->srcMemoryType == CU_MEMORYTYPE_HOST)
      return c->dstMemoryType == CU_MEMORYTYPE_HOST ? cudaMemcpyHostToHost : cudaMemcpyHostToDevice;
    return c->dstMemoryType == CU_MEMORYTYPE_HOST ? cudaMemcpyDeviceToHost : cudaMemcpyDeviceToDevice;
  }();
  const char* from = place(c->srcMemoryType, c->srcHost, c->srcDevice) + c->srcY * c->srcPitch + c->srcXInBytes;
  const char* to = place(c->dstMemoryType, c->dstHost, c->dstDevice) + c->dstY * c->dstPitch + c->dstXInBytes;
  return driver([&] {
    return cudaMemcpy2DAsync(const_cast<char*>(to), c->dstPitch, from, c->srcPitch, c->WidthInBytes, c->Height, kind,
                             stream);
  });
}

CUresult attribute_of(CUdeviceptr address, CUpointer_attribute attribute, void* value) {
  cudaPointerAttributes a;
  cudaPointerGetAttributes(&a, pointer(address));
  if (a.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  void* begin = pointer(address);
  int kind;
  const int64_t bytes = gpuless_allocation(begin, &begin, &kind);
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      *static_cast<CUcontext*>(value) = the_context();
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      *static_cast<unsigned*>(value) = a.type == cudaMemoryTypeHost ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *static_cast<CUdeviceptr*>(value) = address;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      *static_cast<void**>(value) = a.hostPointer;
      return a.hostPointer ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      *static_cast<unsigned*>(value) = a.type == cudaMemoryTypeManaged;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(value) = 0;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      *static_cast<CUdeviceptr*>(value) = reinterpret_cast<CUdeviceptr>(begin);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      *static_cast<size_t*>(value) = static_cast<size_t>(bytes);
      return CUDA_SUCCESS;
    default:
      return driver([] { return unsupported("cuPointerGetAttribute of this attribute"); });
  }
}

}  // namespace

extern "C" {

CUresult cuMemAlloc(CUdeviceptr* address, size_t bytes) {
  return allocate(bytes, [=] { return cudaMalloc(reinterpret_cast<void**>(address), bytes); });
}
CUresult cuMemAllocAsync(CUdeviceptr* address, size_t bytes, CUstream stream) {
  return allocate(bytes, [=] { return cudaMallocAsync(reinterpret_cast<void**>(address), bytes, stream); });
}
CUresult cuMemAllocPitch(CUdeviceptr* address, size_t* pitch, size_t width, size_t height, unsigned) {
  return allocate(width * height,
                  [=] { return cudaMallocPitch(reinterpret_cast<void**>(address), pitch, width, height); });
}
CUresult cuMemAllocManaged(CUdeviceptr* address, size_t bytes, unsigned flags) {
  return allocate(bytes, [=] { return cudaMallocManaged(reinterpret_cast<void**>(address), bytes, flags); });
}
CUresult cuMemAllocHost(void** host, size_t bytes) {
  return allocate(bytes, [=] { return cudaMallocHost(host, bytes); });
}
CUresult cuMemHostAlloc(void** host, size_t bytes, unsigned flags) {
  return allocate(bytes, [=] { return cudaHostAlloc(host, bytes, flags); });
}
CUresult cuMemFree(CUdeviceptr address) {
  return driver([=] { return cudaFree(pointer(address)); });
}
CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream) {
  return driver([=] { return cudaFreeAsync(pointer(address), stream); });
}
CUresult cuMemFreeHost(void* host) {
  return driver([=] { return cudaFreeHost(host); });
}
CUresult cuMemHostRegister(void* host, size_t bytes, unsigned flags) {
  return driver([=] { return cudaHostRegister(host, bytes, flags); });
}
CUresult cuMemHostUnregister(void* host) {
  return driver([=] { return cudaHostUnregister(host); });
}
CUresult cuMemHostGetDevicePointer(CUdeviceptr* address, void* host, unsigned flags) {
  return driver([=] { return cudaHostGetDevicePointer(reinterpret_cast<void**>(address), host, flags); });
}
CUresult cuMemGetInfo(size_t* free, size_t* total) {
  return driver([=] { return cudaMemGetInfo(free, total); });
}
CUresult cuMemGetAddressRange(CUdeviceptr* begin, size_t* bytes, CUdeviceptr address) {
  void* first;
  int kind;
  const int64_t size = gpuless_allocation(pointer(address), &first, &kind);
  if (!size) return CUDA_ERROR_NOT_FOUND;
  if (begin) *begin = reinterpret_cast<CUdeviceptr>(first);
  if (bytes) *bytes = static_cast<size_t>(size);
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr address) {
  return attribute_of(address, attribute, value);
}

CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return driver([=] { return cudaMemcpyAsync(pointer(to), pointer(from), bytes, cudaMemcpyDefault, stream); });
}
CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
  return driver([=] { return cudaMemcpyAsync(pointer(to), from, bytes, cudaMemcpyHostToDevice, stream); });
}
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return driver([=] { return cudaMemcpyAsync(to, pointer(from), bytes, cudaMemcpyDeviceToHost, stream); });
}
CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return driver([=] { return cudaMemcpyAsync(pointer(to), pointer(from), bytes, cudaMemcpyDeviceToDevice, stream); });
}
CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return driver([=] { return cudaMemcpy(pointer(to), pointer(from), bytes, cudaMemcpyDefault); });
}
CUresult cuMemcpyHtoD(CUdeviceptr to, const void* from, size_t bytes) {
  return driver([=] { return cudaMemcpy(pointer(to), from, bytes, cudaMemcpyHostToDevice); });
}
CUresult cuMemcpyDtoH(void* to, CUdeviceptr from, size_t bytes) {
  return driver([=] { return cudaMemcpy(to, pointer(from), bytes, cudaMemcpyDeviceToHost); });
}
CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
  return driver([=] { return cudaMemcpy(pointer(to), pointer(from), bytes, cudaMemcpyDeviceToDevice); });
}
CUresult cuMemcpy2DAsync(const CUDA_MEMCPY2D* copy, CUstream stream) { return copy_2d(copy, stream); }
CUresult cuMemcpy2D(const CUDA_MEMCPY2D* copy) {
  const CUresult error = driver(legacy_refused_by_capture);
  return error ? error : copy_2d(copy, CU_STREAM_LEGACY);
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}
CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}
CUresult cuMemsetD8(CUdeviceptr to, unsigned char value, size_t count) { return fill_at_once(to, value, count); }
CUresult cuMemsetD16(CUdeviceptr to, unsigned short value, size_t count) { return fill_at_once(to, value, count); }
CUresult cuMemsetD32(CUdeviceptr to, unsigned value, size_t count) { return fill_at_once(to, value, count); }

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
  return driver([=] { return cudaStreamCreateWithPriority(stream, flags, priority); });
}
CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
  return driver([=] { return cudaStreamCreateWithFlags(stream, flags); });
}
CUresult cuStreamDestroy(CUstream stream) {
  return driver([=] { return cudaStreamDestroy(stream); });
}
CUresult cuStreamSynchronize(CUstream stream) {
  return driver([=] { return cudaStreamSynchronize(stream); });
}
CUresult cuStreamQuery(CUstream stream) {
  return driver([=] { return cudaStreamQuery(stream); });
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  return driver([=] { return cudaStreamWaitEvent(stream, event, flags); });
}
CUresult cuStreamGetFlags(CUstream stream, unsigned* flags) {
  return driver([=] { return cudaStreamGetFlags(stream, flags); });
}
CUresult cuStreamGetPriority(CUstream stream, int* priority) {
  return driver([=] { return cudaStreamGetPriority(stream, priority); });
}
CUresult cuStreamGetCtx(CUstream, CUcontext* context) {
  *context = the_context();
  return CUDA_SUCCESS;
}
CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
  return driver([=] { return cudaLaunchHostFunc(stream, function, data); });
}
CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  return driver([=] { return cudaStreamBeginCapture(stream, static_cast<cudaStreamCaptureMode>(mode)); });
}
CUresult cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  return driver([=] { return cudaStreamEndCapture(stream, graph); });
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return driver([=] { return cudaStreamIsCapturing(stream, reinterpret_cast<cudaStreamCaptureStatus*>(status)); });
}
CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long flags) {
  return driver([=] { return cudaGraphInstantiateWithFlags(executable, graph, flags); });
}
CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  return driver([=] { return cudaGraphLaunch(executable, stream); });
}
CUresult cuGraphDestroy(CUgraph graph) {
  return driver([=] { return cudaGraphDestroy(graph); });
}
CUresult cuGraphExecDestroy(CUgraphExec executable) {
  return driver([=] { return cudaGraphExecDestroy(executable); });
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
  return driver([=] { return cudaEventCreateWithFlags(event, flags); });
}
CUresult cuEventDestroy(CUevent event) {
  return driver([=] { return cudaEventDestroy(event); });
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
  return driver([=] { return cudaEventRecord(event, stream); });
}
CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
  return driver([=] { return cudaEventRecordWithFlags(event, stream, flags); });
}
CUresult cuEventQuery(CUevent event) {
  return driver([=] { return cudaEventQuery(event); });
}
CUresult cuEventSynchronize(CUevent event) {
  return driver([=] { return cudaEventSynchronize(event); });
}
CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
  return driver([=] { return cudaEventElapsedTime(milliseconds, start, end); });
}

}  // extern "C"

#ifdef cuEventElapsedTime  // CUDA 13's name for it is another
#undef cuEventElapsedTime
ALSO(cuEventElapsedTime, cuEventElapsedTime_v2);
#endif
