// Allocation, copies, fills and symbols. All memory is the host's, and every copy is done when its call returns, unless
// its stream is captured.
#include <cstdio>
#include <cstring>

#include "standin.h"

using namespace gpuless::standin;

namespace {

std::string address(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", pointer);
  return text;
}

cudaError_t allocate(void** pointer, size_t bytes, int kind) {
  *pointer = nullptr;
  if (const cudaError_t error = refused_by_capture()) return error;
  if (bytes == 0) return finish(cudaSuccess);
  *pointer = gpuless_allocate(static_cast<int64_t>(bytes), kind);
  if (!*pointer)
    return refuse(cudaErrorMemoryAllocation, std::to_string(bytes) + " bytes are asked for, and " +
                                                 std::to_string(gpuless_memory_free()) + " of the GPU's are left");
  return finish(cudaSuccess);
}

cudaError_t release(void* pointer) {
  if (const cudaError_t error = refused_by_capture()) return error;
  if (pointer && !gpuless_release(pointer))
    return refuse(cudaErrorInvalidValue,
                  address(pointer) + " is freed, where no allocation begins that is not freed yet");
  return finish(cudaSuccess);
}

bool on_device(const void* pointer, size_t bytes) { return gpuless_storage_find(pointer, static_cast<int64_t>(bytes)); }
cudaError_t refuse_outside(const void* pointer, size_t bytes) {
  return refuse(cudaErrorInvalidValue, std::to_string(bytes) + " bytes at " + address(pointer) +
                                           ", which are not all in one allocation of the GPU's memory");
}

// Rows of `width` bytes, in a stream; one row is a plain copy.
cudaError_t copy(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                 cudaMemcpyKind kind, cudaStream_t stream) {
  if (width == 0 || rows == 0) return finish(cudaSuccess);
  if (rows > 1 && (width > to_pitch || width > from_pitch)) return finish(cudaErrorInvalidPitchValue);
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault) return finish(cudaErrorInvalidMemcpyDirection);
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  const size_t to_bytes = to_pitch * (rows - 1) + width, from_bytes = from_pitch * (rows - 1) + width;
  if (to_device && !on_device(to, to_bytes)) return refuse_outside(to, to_bytes);
  if (from_device && !on_device(from, from_bytes)) return refuse_outside(from, from_bytes);
  return enqueue(stream, [=] {
    for (size_t r = 0; r < rows; ++r)
      std::memmove(static_cast<char*>(to) + r * to_pitch, static_cast<const char*>(from) + r * from_pitch, width);
    return finish(cudaSuccess);
  });
}

cudaError_t fill(void* to, size_t pitch, int value, size_t width, size_t rows, cudaStream_t stream) {
  if (width == 0 || rows == 0) return finish(cudaSuccess);
  if (rows > 1 && width > pitch) return finish(cudaErrorInvalidPitchValue);
  if (const size_t bytes = pitch * (rows - 1) + width; !on_device(to, bytes)) return refuse_outside(to, bytes);
  return enqueue(stream, [=] {
    int error = cudaSuccess;
    for (size_t r = 0; r < rows && !error; ++r)
      error = gpuless_fill(static_cast<char*>(to) + r * pitch, value, static_cast<int64_t>(width));
    return finish(error);
  });
}

// `bytes` of a variable from `offset` on, or null with the error kept.
char* symbol(const void* host, size_t offset, size_t bytes, cudaError_t* error) {
  void* address = nullptr;
  int64_t size = 0;
  *error = finish(gpuless_variable(host, &address, &size));
  if (*error) return nullptr;
  if (offset > static_cast<size_t>(size) || bytes > size - offset)
    *error = refuse(cudaErrorInvalidValue, std::to_string(bytes) + " bytes from " + std::to_string(offset) +
                                               " on of a variable that has " + std::to_string(size));
  return *error ? nullptr : static_cast<char*>(address) + offset;
}

}  // namespace

extern "C" {

cudaError_t cudaMalloc(void** p, size_t bytes) { return allocate(p, bytes, gpuless_memory_device); }
// A graph's own memory is not there: captured, these two are refused as the others are.
cudaError_t cudaMallocAsync(void** p, size_t bytes, cudaStream_t) { return allocate(p, bytes, gpuless_memory_device); }
cudaError_t cudaMallocHost(void** p, size_t bytes) { return allocate(p, bytes, gpuless_memory_host); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return allocate(p, bytes, gpuless_memory_host); }
cudaError_t cudaMallocManaged(void** p, size_t bytes, unsigned) { return allocate(p, bytes, gpuless_memory_managed); }
cudaError_t cudaMallocPitch(void** p, size_t* pitch, size_t width, size_t height) {
  *pitch = (width + 511) / 512 * 512;
  return allocate(p, *pitch * height, gpuless_memory_device);
}
cudaError_t cudaFree(void* p) { return release(p); }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return release(p); }
cudaError_t cudaFreeHost(void* p) { return release(p); }

cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
  if (const cudaError_t error = refused_by_capture()) return error;
  gpuless_storage_add(p, static_cast<int64_t>(bytes), "cudaHostRegister", 0);
  return finish(cudaSuccess);
}
cudaError_t cudaHostUnregister(void* p) {
  if (const cudaError_t error = refused_by_capture()) return error;
  gpuless_storage_remove(p);
  return finish(cudaSuccess);
}
cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  *device = host;
  return finish(on_device(host, 1) ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const auto* device = gpuless_device_get();
  if (!device) return finish(cudaErrorNoDevice);
  *free = static_cast<size_t>(gpuless_memory_free());
  *total = static_cast<size_t>(device->memory);
  return finish(cudaSuccess);
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
  void* begin;
  int kind = gpuless_memory_device;
  *a = {};
  if (gpuless_allocation(pointer, &begin, &kind) == 0 && !on_device(pointer, 1)) return finish(cudaSuccess);
  constexpr cudaMemoryType types[] = {cudaMemoryTypeDevice, cudaMemoryTypeHost, cudaMemoryTypeManaged};
  a->type = types[kind];
  a->devicePointer = const_cast<void*>(pointer);
  a->hostPointer = kind == gpuless_memory_device ? nullptr : const_cast<void*>(pointer);
  return finish(cudaSuccess);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, 0, from, 0, bytes, 1, kind, stream);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  const cudaError_t error = legacy_refused_by_capture();
  return error ? error : cudaMemcpyAsync(to, from, bytes, kind, cudaStreamLegacy);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                              cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, to_pitch, from, from_pitch, width, rows, kind, stream);
}
cudaError_t cudaMemcpy2D(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows,
                         cudaMemcpyKind kind) {
  const cudaError_t error = legacy_refused_by_capture();
  return error ? error : cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, width, rows, kind, cudaStreamLegacy);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return fill(to, 0, value, bytes, 1, stream);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const cudaError_t error = legacy_refused_by_capture();
  return error ? error : cudaMemsetAsync(to, value, bytes, cudaStreamLegacy);
}
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t rows, cudaStream_t stream) {
  return fill(to, pitch, value, width, rows, stream);
}
cudaError_t cudaMemset2D(void* to, size_t pitch, int value, size_t width, size_t rows) {
  const cudaError_t error = legacy_refused_by_capture();
  return error ? error : cudaMemset2DAsync(to, pitch, value, width, rows, cudaStreamLegacy);
}

cudaError_t cudaMemcpyToSymbolAsync(const void* host, const void* from, size_t bytes, size_t offset, cudaMemcpyKind,
                                    cudaStream_t stream) {
  cudaError_t error;
  char* to = symbol(host, offset, bytes, &error);
  if (!to) return error;
  return enqueue(stream, [=] {
    std::memmove(to, from, bytes);
    return finish(cudaSuccess);
  });
}
cudaError_t cudaMemcpyToSymbol(const void* host, const void* from, size_t bytes, size_t offset, cudaMemcpyKind kind) {
  const cudaError_t error = legacy_refused_by_capture();
  return error ? error : cudaMemcpyToSymbolAsync(host, from, bytes, offset, kind, cudaStreamLegacy);
}
cudaError_t cudaMemcpyFromSymbolAsync(void* to, const void* host, size_t bytes, size_t offset, cudaMemcpyKind,
                                      cudaStream_t stream) {
  cudaError_t error;
  const char* from = symbol(host, offset, bytes, &error);
  if (!from) return error;
  return enqueue(stream, [=] {
    std::memmove(to, from, bytes);
    return finish(cudaSuccess);
  });
}
cudaError_t cudaMemcpyFromSymbol(void* to, const void* host, size_t bytes, size_t offset, cudaMemcpyKind kind) {
  const cudaError_t error = legacy_refused_by_capture();
  return error ? error : cudaMemcpyFromSymbolAsync(to, host, bytes, offset, kind, cudaStreamLegacy);
}
cudaError_t cudaGetSymbolAddress(void** address, const void* host) {
  int64_t bytes;
  return finish(gpuless_variable(host, address, &bytes));
}
cudaError_t cudaGetSymbolSize(size_t* size, const void* host) {
  void* address;
  int64_t bytes = 0;
  const int error = gpuless_variable(host, &address, &bytes);
  *size = static_cast<size_t>(bytes);
  return finish(error);
}

}  // extern "C"

ALSO(cudaMallocAsync_ptsz, cudaMallocAsync);
ALSO(cudaFreeAsync_ptsz, cudaFreeAsync);
ALSO(cudaMemcpy_ptds, cudaMemcpy);
ALSO(cudaMemcpyAsync_ptsz, cudaMemcpyAsync);
ALSO(cudaMemcpy2D_ptds, cudaMemcpy2D);
ALSO(cudaMemcpy2DAsync_ptsz, cudaMemcpy2DAsync);
ALSO(cudaMemset_ptds, cudaMemset);
ALSO(cudaMemsetAsync_ptsz, cudaMemsetAsync);
ALSO(cudaMemset2D_ptds, cudaMemset2D);
ALSO(cudaMemset2DAsync_ptsz, cudaMemset2DAsync);
ALSO(cudaMemcpyToSymbol_ptds, cudaMemcpyToSymbol);
ALSO(cudaMemcpyToSymbolAsync_ptsz, cudaMemcpyToSymbolAsync);
ALSO(cudaMemcpyFromSymbol_ptds, cudaMemcpyFromSymbol);
ALSO(cudaMemcpyFromSymbolAsync_ptsz, cudaMemcpyFromSymbolAsync);
