// The functions of c10::cuda and at::cuda that an extension's launch code calls, for the interpreted GPU: one device,
// and one stream that does everything at once. Linked into each extension instead of libc10_cuda and libtorch_cuda.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <ostream>
#include <string>

namespace c10::cuda {

namespace {
CUDAStream only_stream(DeviceIndex device) {
  TORCH_CHECK(device == -1 || device == 0, "the interpreted GPU is cuda:0, not cuda:", static_cast<int>(device));
  return CUDAStream(CUDAStream::UNCHECKED, Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)));
}
}  // namespace

DeviceIndex device_count() noexcept { return 1; }
DeviceIndex device_count_ensure_non_zero() { return 1; }
DeviceIndex current_device() { return 0; }
void set_device(DeviceIndex device, const bool) { only_stream(device); }
void device_synchronize() { C10_CUDA_CHECK(cudaDeviceSynchronize()); }
void warn_or_error_on_sync() {}
cudaError_t GetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t GetDevice(DeviceIndex* device) { return *device = 0, cudaSuccess; }
cudaError_t SetDevice(DeviceIndex device, const bool) { return cudaSetDevice(device); }
cudaError_t MaybeSetDevice(DeviceIndex device) { return cudaSetDevice(device); }
DeviceIndex ExchangeDevice(DeviceIndex device) { return set_device(device), 0; }
DeviceIndex MaybeExchangeDevice(DeviceIndex device) { return set_device(device), 0; }
bool hasPrimaryContext(DeviceIndex) { return true; }
std::optional<DeviceIndex> getDeviceIndexWithPrimaryContext() { return 0; }

// A stream is 0, the legacy one: its work is done when the call that launched it returns.
cudaStream_t CUDAStream::stream() const { return nullptr; }
bool CUDAStream::query() const { return true; }
void CUDAStream::synchronize() const { C10_CUDA_CHECK(cudaStreamSynchronize(stream())); }
CUDAStream getDefaultCUDAStream(DeviceIndex device) { return only_stream(device); }
CUDAStream getCurrentCUDAStream(DeviceIndex device) { return only_stream(device); }
CUDAStream getStreamFromPool(const bool, DeviceIndex device) { return only_stream(device); }
CUDAStream getStreamFromPool(const int, DeviceIndex device) { return only_stream(device); }
CUDAStream getStreamFromExternal(cudaStream_t, DeviceIndex device) { return only_stream(device); }
void setCurrentCUDAStream(CUDAStream) {}
std::ostream& operator<<(std::ostream& out, const CUDAStream& s) { return out << s.unwrap(); }

void c10_cuda_check_implementation(const int32_t error, const char* file, const char* function, const uint32_t line,
                                   const bool) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // as torch, which clears it
  throw c10::Error({function, file, line},
                   std::string("CUDA error: ") + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

namespace CUDACachingAllocator {
std::atomic<CUDAAllocator*> allocator{nullptr};
}

}  // namespace c10::cuda

namespace at::cuda {

cudaDeviceProp* getDeviceProperties(c10::DeviceIndex device) {
  TORCH_CHECK(device == 0, "the interpreted GPU is cuda:0, not cuda:", static_cast<int>(device));
  static cudaDeviceProp properties = [] {
    cudaDeviceProp p;
    C10_CUDA_CHECK(cudaGetDeviceProperties(&p, 0));
    return p;
  }();
  return &properties;
}
cudaDeviceProp* getCurrentDeviceProperties() { return getDeviceProperties(0); }
int warp_size() { return 32; }
bool canDeviceAccessPeer(c10::DeviceIndex, c10::DeviceIndex) { return false; }

}  // namespace at::cuda
