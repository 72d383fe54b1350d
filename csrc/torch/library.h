#pragma once
// Kernel libraries: opened on first use, apart from each other, and never linked to the torch side.
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "params/device.h"

namespace forwardpass {

// cpu: the functions of csrc/cpu. cuda: _kernels.so on the tensor's device and its current stream. interpreted: the
// same objects in _kernels_interpreted.so on CPU tensors.
enum class Backend { cpu, cuda, interpreted };

// cudaStreamPerThread: the legacy stream cannot be captured, and whatever is put into that one by mistake shows.
inline void* const kInterpretedStream = reinterpret_cast<void*>(2);

void set_library(int64_t interpreted, std::string path);

// For tests: outputs are filled with NaN or -1 before a kernel sees them, so that an element nobody wrote shows.
void set_poison(bool on);
bool poison();

// The interpreter accepts pointers into storage that it knows: what this thread allocates is reported to the function
// at this address, fpi_storage_add of interpreter/interpreter.h, until it is set to 0.
void set_storage_hook(int64_t address);
void report_storage(const torch::stable::Tensor&);

// For tests: until it is off again, nothing that this thread allocates is freed, as torch keeps for a CUDA graph what
// was allocated while it was captured.
void keep_storage(bool on);

// The function `name` of a kernel library; throws with the reason where there is none.
void* library_function(Backend backend, const char* name);

// The same, looked for once in each library.
template <class F>
class LibraryFunction {
 public:
  constexpr explicit LibraryFunction(const char* name) : name_(name) {}
  F* of(Backend backend) {
    F*& f = found_[static_cast<int>(backend)];  // a race writes the same value twice
    if (!f) f = reinterpret_cast<F*>(library_function(backend, name_));
    return f;
  }

 private:
  const char* name_;
  F* found_[3] = {};
};

// The GPU of x, or the one that is interpreted.
Device device_of(Backend backend, const torch::stable::Tensor& x);

// The current stream of a CUDA device, looked up in the libtorch_cuda that the process already has.
void* current_stream(int32_t device);

// Throws "name: CUDA error N (text)" unless error is 0, a cudaError_t that the function of that name returned.
void check_cuda(Backend backend, const char* name, int error);

}  // namespace forwardpass
