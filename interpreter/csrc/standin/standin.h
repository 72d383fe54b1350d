#pragma once
// cudart's names, forwarded to libgpuless.so. Linked into each image, hidden: never dynamic symbols, as a CUDA torch
// has the real ones in the global scope. What cudart has and these files have not is a link error that names it.
#include <cuda_runtime.h>

#include <functional>
#include <string>

#include "cudart.h"

// The same function under the name that --default-stream=per-thread gives it.
#define ALSO(alias, name) asm(".globl " #alias "\n.hidden " #alias "\n.set " #alias ", " #name)

namespace gpuless::standin {

// Keeps an error for cudaGetLastError and returns it. In a program (program.cpp) a kernel that failed has ended the
// context, as on a GPU: every later call returns its error. Python raises instead and goes on.
cudaError_t finish(int error);
extern bool errors_stick;

// The same with the words for cudaGetErrorString: what was asked for, and what the limit is.
cudaError_t refuse(cudaError_t error, const std::string& why);

// Says on stderr what is not supported; cudaErrorNotSupported.
cudaError_t unsupported(const char* what);

// Keeps cudaGetLastError() as it is, for what is called while this lives.
struct SameLastError {
  SameLastError();
  ~SameLastError();
  cudaError_t before;
};

// A function of the driver by its name without a version; null: it is none of those that are here.
void* driver_function(const char* name);

// What is put into a stream: done at once, or kept for a graph where the stream is captured.
using Work = std::function<cudaError_t()>;
cudaError_t keep_or_do(cudaStream_t, Work);
template <class F>
cudaError_t enqueue(cudaStream_t stream, F work) {
  return gpuless_capturing() ? keep_or_do(stream, work) : work();
}
// The error with which a capture that is under way refuses a call, and ends; cudaSuccess. Calls that allocate, free or
// may wait; those that do so in the legacy stream; those that wait for a stream, or for all of the device.
cudaError_t refused_by_capture();
cudaError_t legacy_refused_by_capture();

gpuless_launch_config config_of(dim3 grid, dim3 block, size_t shared);
cudaError_t launch(const void* host, const gpuless_launch_config&, void** args, cudaStream_t);
// Grid, block, cluster and the rest of a cudaLaunchConfig_t.
cudaError_t read_config(const cudaLaunchConfig_t&, gpuless_launch_config&);

}  // namespace gpuless::standin
