#pragma once
// What is one per process: the device, the options, the storage that kernels may touch, the counters, the last finding.
#include <string>
#include <vector>

#include "interpreter.h"
#include "machine.h"

namespace forwardpass::interpreter {

// Values of cudaError_t, which are part of CUDA's ABI.
namespace cuda {
constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kInvalidSymbol = 13,
              kInvalidDeviceFunction = 98, kNoDevice = 100, kNoKernelImageForDevice = 209, kAssert = 710,
              kLaunchFailure = 719, kCooperativeLaunchTooLarge = 720, kNotSupported = 801, kInvalidClusterSize = 912;
}

// A cudaError_t. Checks the configuration against the device as a launch does, runs the grid, keeps a finding for
// fpi_finding(). `parameters` is the kernel's .param area, `largest_cluster` what the kernel may be launched with.
int launch(const Module&, const Code&, const fpi_launch_config&, std::vector<uint8_t> parameters, int largest_cluster);

// Keeps it for fpi_finding(), tells who wants to know (fpi_on_finding), and returns the error that a launch with it
// returns: by default cudaErrorLaunchFailure, or cudaErrorAssert for an assertion of the kernel's own.
int report(const Finding&);
int report(const Finding&, int error);

// Storage that is registered now; kernels that run hold the lock shared.
Memory& storage();

}  // namespace forwardpass::interpreter
