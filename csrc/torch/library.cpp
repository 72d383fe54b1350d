#include "torch/library.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <mutex>
#include <vector>

namespace forwardpass {
namespace {

struct Library {
  std::string path;
  void* handle = nullptr;
  std::mutex mutex;
};
Library libraries[2];  // [interpreted]
std::atomic<bool> poisons_outputs{false};

using StorageHook = void(const void* data, int64_t bytes, const char* name, int read_only);
thread_local StorageHook* storage_hook = nullptr;
thread_local bool keeps_tensors = false;
thread_local std::vector<torch::stable::Tensor> kept_tensors;

}  // namespace

void set_library(int64_t interpreted, std::string path) {
  Library& library = libraries[interpreted != 0];
  std::lock_guard lock(library.mutex);
  library.path = std::move(path);
}

void set_poison(bool on) { poisons_outputs = on; }
bool poison() { return poisons_outputs.load(std::memory_order_relaxed); }

void set_storage_hook(int64_t address) { storage_hook = reinterpret_cast<StorageHook*>(address); }
void keep_storage(bool on) {
  keeps_tensors = on;
  if (!on) kept_tensors.clear();
}
void report_storage(const torch::stable::Tensor& t) {
  if (keeps_tensors) kept_tensors.push_back(t);
  int64_t bytes;
  if (storage_hook && aoti_torch_get_storage_size(t.get(), &bytes) == AOTI_TORCH_SUCCESS)
    storage_hook(t.const_data_ptr(), bytes, "output or workspace", 0);
}

void* library_function(Backend backend, const char* name) {
  Library& library = libraries[backend == Backend::interpreted];
  std::lock_guard lock(library.mutex);
  if (!library.handle) {
    STD_TORCH_CHECK(!library.path.empty(),
                    backend == Backend::interpreted
                        ? "CPU tensors reach CUDA kernels through the interpreter only, and it is not enabled"
                        : "this build has no CUDA kernels; `forwardpass doctor` says why");
    // RTLD_LOCAL: both libraries may be open at once and export the same names.
    library.handle = dlopen(library.path.c_str(), RTLD_NOW | RTLD_LOCAL);
    STD_TORCH_CHECK(library.handle, "cannot load ", library.path, ": ", dlerror());
  }
  void* f = dlsym(library.handle, name);
  STD_TORCH_CHECK(f, name, " is not in ", library.path);
  return f;
}

void* current_stream(int32_t device) {
  using Get = AOTITorchError(int32_t, void**);
  static auto get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return torch_cuda ? reinterpret_cast<Get*>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(get, "this torch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "no current CUDA stream on device ", device);
  return stream;
}

Device device_of(Backend backend, const torch::stable::Tensor& x) {
  constexpr const char* kName = "forwardpass_device";
  static LibraryFunction<int(Device*)> query(kName);
  Device device{};
  if (backend == Backend::interpreted) {  // the interpreted GPU may change between calls
    check_cuda(backend, kName, query.of(backend)(&device));
    return device;
  }
  constexpr int kCached = 64;
  static std::atomic<Device> cache[kCached];
  static_assert(std::atomic<Device>::is_always_lock_free);
  const int32_t index = x.get_device_index();
  if (index < kCached && (device = cache[index].load(std::memory_order_relaxed)).arch) return device;
  torch::stable::accelerator::DeviceGuard guard(index);
  check_cuda(backend, kName, query.of(backend)(&device));
  if (index < kCached) cache[index].store(device, std::memory_order_relaxed);
  return device;
}

RelaxedCapture::RelaxedCapture(Backend backend) {
  constexpr int kRelaxed = 2;  // cudaStreamCaptureModeRelaxed
  static LibraryFunction<Exchange> exchange("forwardpass_capture_mode");
  exchange_ = exchange.of(backend);
  before_ = exchange_(kRelaxed);
}

void check_cuda(Backend backend, const char* name, int error) {
  if (error == 0) return;
  using Text = const char*(int);
  auto text = reinterpret_cast<Text*>(library_function(backend, "forwardpass_error_string"));
  STD_TORCH_CHECK(false, name, ": CUDA error ", error, " (", text(error), ")");
}

}  // namespace forwardpass
