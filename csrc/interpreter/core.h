#pragma once
// What is one per process: the device, the options, the storage that kernels may touch, the counters, the last finding.
#include <string>
#include <vector>

#include "interpreter.h"
#include "machine.h"

namespace forwardpass::interpreter {

// A cudaError_t. Checks the configuration against the device as a launch does, runs the grid, keeps a finding for
// fpi_finding(). `parameters` is the kernel's .param area.
int launch(const Module&, const Code&, const fpi_launch_config&, std::vector<uint8_t> parameters);

// Keeps it for fpi_finding() and returns the error that a launch with it returns, cudaErrorLaunchFailure.
int report(const Finding&);

// Storage that is registered now; kernels that run hold the lock shared.
Memory& storage();

}  // namespace forwardpass::interpreter
