#pragma once
// What is one per process: the device, the options, the storage that kernels may touch, the counters, the last finding.
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "machine.h"
#include "profile.h"

namespace gpuless {

// Values of cudaError_t, which are part of CUDA's ABI.
namespace cuda {
constexpr int kSuccess = 0, kInvalidValue = 1, kMemoryAllocation = 2, kInvalidConfiguration = 9, kInvalidSymbol = 13,
              kInvalidDeviceFunction = 98, kNoDevice = 100, kInvalidKernelImage = 200, kNoKernelImageForDevice = 209,
              kInvalidPtx = 218, kSymbolNotFound = 500, kLaunchTimeout = 702, kAssert = 710, kLaunchFailure = 719,
              kLaunchOutOfResources = 701, kCooperativeLaunchTooLarge = 720, kNotSupported = 801,
              kInvalidClusterSize = 912, kUnknown = 999;
}

// The kernel's .param area.
using ArgumentBytes = std::function<std::vector<uint8_t>(const Code&)>;

// A cudaError_t. Checks the configuration against the device as a launch does and runs the grid. `largest_cluster` is
// what the kernel may be launched with. Throws a finding that is an error of it; others are kept
// (gpuless_findings_json).
int launch(Module&, const std::string& kernel, const gpuless_launch_config&, const ArgumentBytes&, int largest_cluster);

// Keeps it for gpuless_finding(), tells who wants to know (gpuless_on_finding), and returns the error that a launch
// with it returns: by default cudaErrorLaunchFailure, or cudaErrorAssert for an assertion of the kernel's own.
int report(const Finding&);
int report(const Finding&, int error);

// Keeps why a call is refused, which whoever tells of the error asks for (gpuless_take_refusal), and returns the error.
int refuse(int error, std::string why);

// Called in a catch block of the C API: keeps the exception as report() does. An exception that is no Finding, such as
// std::bad_alloc, becomes a finding of kind unsupported.
int report_caught() noexcept;

// The body of each function of the C API that can fail: no exception leaves the library, the function returns `failed`,
// or the cudaError_t.
template <class T, class F>
T guarded(T failed, F body) noexcept {
  try {
    return body();
  } catch (...) {
    report_caught();
    return failed;
  }
}
template <class F>
int guarded(F body) noexcept {
  try {
    if constexpr (std::is_void_v<decltype(body())>) {
      body();
      return cuda::kSuccess;
    } else {
      return body();
    }
  } catch (...) {
    return report_caught();
  }
}

// Storage that is registered now; kernels that run hold the lock shared.
Memory& storage();

}  // namespace gpuless
