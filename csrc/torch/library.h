#pragma once
// The kernel libraries: opened on first use, independent of each other, and never linked to the torch side.
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <string>

#include "params/device.h"

namespace forwardpass {

// cpu: the functions of csrc/cpu. cuda: _kernels.so on the tensor's device and its current stream. interpreted: the
// same objects in _kernels_interpreted.so on CPU tensors.
enum class Backend { cpu, cuda, interpreted };

// cudaStreamPerThread. The legacy default stream cannot be captured, so that work put there by mistake is noticed.
inline void* const kInterpretedStream = reinterpret_cast<void*>(2);

void set_library(int64_t interpreted, std::string path);

// For tests: outputs are filled with NaN or -1 before a kernel sees them, so that an element that it does not write is
// noticed.
void set_poison(bool on);
bool poison();

// The interpreter accepts only pointers into storage that it knows: what this thread allocates is reported to the
// function at this address, gpuless_storage_add of gpuless.h, until it is set to 0.
void set_storage_hook(int64_t address);
void report_storage(const torch::stable::Tensor&);

// For tests: while it is on, nothing that this thread allocates is freed, as torch keeps what was allocated during the
// capture of a CUDA graph.
void keep_storage(bool on);

// The function `name` of a kernel library; throws, with the reason, if there is none.
void* library_function(Backend backend, const char* name);

// The same, looked up once in each library.
template <class F>
class LibraryFunction {
 public:
  constexpr explicit LibraryFunction(const char* name) : name_(name) {}
  F* of(Backend backend) {
    std::atomic<F*>& known = functions_[static_cast<int>(backend)];
    F* f = known.load(std::memory_order_acquire);
    if (!f) known = f = reinterpret_cast<F*>(library_function(backend, name_));
    return f;
  }

 private:
  const char* name_;
  std::atomic<F*> functions_[3] = {nullptr, nullptr, nullptr};
};

// The GPU of x, or the interpreted one.
Device device_of(Backend backend, const torch::stable::Tensor& x);

// The current stream of a CUDA device, looked up in the libtorch_cuda that the process already has.
void* current_stream(int32_t device);

// While it lives, a capture of a CUDA graph does not forbid what a kernel's first launch does besides: CUDA loads its
// module then, and allocates for it, which torch.cuda.graph's captures forbid as they forbid cudaMalloc. torch's own
// allocator does the same.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(Backend backend);
  ~RelaxedCapture() { exchange_(before_); }
  RelaxedCapture(const RelaxedCapture&) = delete;

 private:
  using Exchange = int(int mode);
  Exchange* exchange_;
  int before_;
};

// Throws "name: CUDA error N (text)" unless error, the cudaError_t that function `name` returned, is 0.
void check_cuda(Backend backend, const char* name, int error);

}  // namespace forwardpass
