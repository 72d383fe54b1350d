// The last error of a thread, and what errors are called.
#include <atomic>
#include <cstdio>

#include "standin.h"

namespace {

thread_local cudaError_t last = cudaSuccess;
std::atomic<cudaError_t> context_error{cudaSuccess};

struct Row {
  cudaError_t error;
  const char *name, *text;
};
#define ROW(name, text) {name, #name, text}
// Those that this library or launches give, and a few that programs ask about; the texts are cudart's.
constexpr Row kErrors[] = {
    ROW(cudaSuccess, "no error"),
    ROW(cudaErrorInvalidValue, "invalid argument"),
    ROW(cudaErrorMemoryAllocation, "out of memory"),
    ROW(cudaErrorInitializationError, "initialization error"),
    ROW(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ROW(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    ROW(cudaErrorInvalidSymbol, "invalid device symbol"),
    ROW(cudaErrorInvalidDevicePointer, "invalid device pointer"),
    ROW(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    ROW(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    ROW(cudaErrorMissingConfiguration, "__global__ function call is not configured"),
    ROW(cudaErrorInvalidDeviceFunction, "invalid device function"),
    ROW(cudaErrorNoDevice, "no CUDA-capable device is detected"),
    ROW(cudaErrorInvalidDevice, "invalid device ordinal"),
    ROW(cudaErrorInvalidKernelImage, "device kernel image is invalid"),
    ROW(cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"),
    ROW(cudaErrorUnsupportedLimit, "limit is not supported on this architecture"),
    ROW(cudaErrorInvalidPtx, "a PTX JIT compilation failed"),
    ROW(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    ROW(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    ROW(cudaErrorSymbolNotFound, "named symbol not found"),
    ROW(cudaErrorNotReady, "device not ready"),
    ROW(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    ROW(cudaErrorLaunchOutOfResources, "too many resources requested for launch"),
    ROW(cudaErrorLaunchTimeout, "the launch timed out and was terminated"),
    ROW(cudaErrorPeerAccessNotEnabled, "peer access has not been enabled"),
    ROW(cudaErrorAssert, "device-side assert triggered"),
    ROW(cudaErrorIllegalInstruction, "an illegal instruction was encountered"),
    ROW(cudaErrorMisalignedAddress, "misaligned address"),
    ROW(cudaErrorLaunchFailure, "unspecified launch failure"),
    ROW(cudaErrorCooperativeLaunchTooLarge, "too many blocks in cooperative launch"),
    ROW(cudaErrorNotPermitted, "operation not permitted"),
    ROW(cudaErrorNotSupported, "operation not supported"),
    ROW(cudaErrorInvalidClusterSize, "cluster misconfiguration"),
    ROW(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    ROW(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    ROW(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    ROW(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream"),
    ROW(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    ROW(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread"),
    ROW(cudaErrorUnknown, "unknown error"),
};
#undef ROW

const Row* find(cudaError_t error) {
  for (const Row& r : kErrors)
    if (r.error == error) return &r;
  return nullptr;
}

bool ends_context(cudaError_t error) { return error == cudaErrorLaunchFailure || error == cudaErrorAssert; }

}  // namespace

namespace forwardpass::standin {

bool errors_stick = false;

cudaError_t finish(int value) {
  auto error = static_cast<cudaError_t>(value);
  if (context_error) error = context_error;
  if (errors_stick && ends_context(error)) context_error = error;
  if (error) last = error;
  return error;
}

cudaError_t unsupported(const char* what) {
  std::fprintf(stderr, "%s is not supported by the forwardpass interpreter\n", what);
  fpi_finding_clear();  // which cudaGetErrorString would take for the reason
  return finish(cudaErrorNotSupported);
}

}  // namespace forwardpass::standin

extern "C" {

cudaError_t cudaPeekAtLastError() { return context_error ? context_error.load() : last; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = cudaPeekAtLastError();
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  const Row* r = find(error);
  return r ? r->name : "unrecognized error code";
}
// A launch that failed has more to say than cudart has a text for: the finding.
const char* cudaGetErrorString(cudaError_t error) {
  const bool of_launch =
      ends_context(error) || error == cudaErrorNoKernelImageForDevice || error == cudaErrorNotSupported;
  if (of_launch && *fpi_finding()) return fpi_finding();
  const Row* r = find(error);
  return r ? r->text : "unrecognized error code";
}

}  // extern "C"
