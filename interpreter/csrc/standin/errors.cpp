// The last error of a thread, and what errors are called.
#include <atomic>
#include <cstdio>
#include <mutex>
#include <set>
#include <string>

#include "driver.h"

namespace {

thread_local cudaError_t last = cudaSuccess;
std::atomic<cudaError_t> context_error{cudaSuccess};
// The text of this thread's last error where it has more to say than its code; null.
thread_local const char* last_words = nullptr;
thread_local cudaError_t last_words_of = cudaSuccess;

struct Row {
  cudaError_t error;
  const char *name, *driver_name, *text;
};
// Most codes are the driver's too; what cudart alone has is told to its callers as another (driver.h).
#define ROW(name, text) {name, #name, nullptr, text}
#define DRIVER_ROW(name, driver_name, text) {name, #name, #driver_name, text}
static_assert(int{CUDA_ERROR_INVALID_CLUSTER_SIZE} == int{cudaErrorInvalidClusterSize});
// Those that this library or launches give, and a few that programs ask about; the texts are cudart's.
constexpr Row kErrors[] = {
    DRIVER_ROW(cudaSuccess, CUDA_SUCCESS, "no error"),
    DRIVER_ROW(cudaErrorInvalidValue, CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    DRIVER_ROW(cudaErrorMemoryAllocation, CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    DRIVER_ROW(cudaErrorInitializationError, CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ROW(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    ROW(cudaErrorInvalidPitchValue, "invalid pitch argument"),
    ROW(cudaErrorInvalidSymbol, "invalid device symbol"),
    ROW(cudaErrorInvalidDevicePointer, "invalid device pointer"),
    ROW(cudaErrorInvalidMemcpyDirection, "invalid copy direction for memcpy"),
    ROW(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    ROW(cudaErrorMissingConfiguration, "__global__ function call is not configured"),
    ROW(cudaErrorInvalidDeviceFunction, "invalid device function"),
    DRIVER_ROW(cudaErrorNoDevice, CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    DRIVER_ROW(cudaErrorInvalidDevice, CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    DRIVER_ROW(cudaErrorInvalidKernelImage, CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    DRIVER_ROW(cudaErrorNoKernelImageForDevice, CUDA_ERROR_NO_BINARY_FOR_GPU,
               "no kernel image is available for execution on the device"),
    DRIVER_ROW(cudaErrorUnsupportedLimit, CUDA_ERROR_UNSUPPORTED_LIMIT, "limit is not supported on this architecture"),
    DRIVER_ROW(cudaErrorInvalidPtx, CUDA_ERROR_INVALID_PTX, "a PTX JIT compilation failed"),
    DRIVER_ROW(cudaErrorInvalidResourceHandle, CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    DRIVER_ROW(cudaErrorIllegalState, CUDA_ERROR_ILLEGAL_STATE,
               "the operation cannot be performed in the present state"),
    DRIVER_ROW(cudaErrorSymbolNotFound, CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    DRIVER_ROW(cudaErrorNotReady, CUDA_ERROR_NOT_READY, "device not ready"),
    DRIVER_ROW(cudaErrorIllegalAddress, CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    DRIVER_ROW(cudaErrorLaunchOutOfResources, CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES,
               "too many resources requested for launch"),
    DRIVER_ROW(cudaErrorLaunchTimeout, CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    DRIVER_ROW(cudaErrorPeerAccessNotEnabled, CUDA_ERROR_PEER_ACCESS_NOT_ENABLED, "peer access has not been enabled"),
    DRIVER_ROW(cudaErrorAssert, CUDA_ERROR_ASSERT, "device-side assert triggered"),
    DRIVER_ROW(cudaErrorIllegalInstruction, CUDA_ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    DRIVER_ROW(cudaErrorMisalignedAddress, CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    DRIVER_ROW(cudaErrorLaunchFailure, CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    DRIVER_ROW(cudaErrorCooperativeLaunchTooLarge, CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE,
               "too many blocks in cooperative launch"),
    DRIVER_ROW(cudaErrorNotPermitted, CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    DRIVER_ROW(cudaErrorNotSupported, CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    DRIVER_ROW(cudaErrorInvalidClusterSize, CUDA_ERROR_INVALID_CLUSTER_SIZE, "cluster misconfiguration"),
    DRIVER_ROW(cudaErrorStreamCaptureUnsupported, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
               "operation not permitted when stream is capturing"),
    DRIVER_ROW(cudaErrorStreamCaptureInvalidated, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED,
               "operation failed due to a previous error during capture"),
    DRIVER_ROW(cudaErrorStreamCaptureIsolation, CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
               "dependency created on uncaptured work in another stream"),
    DRIVER_ROW(cudaErrorStreamCaptureImplicit, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
               "operation would make the legacy stream depend on a capturing blocking stream"),
    DRIVER_ROW(cudaErrorCapturedEvent, CUDA_ERROR_CAPTURED_EVENT,
               "operation not permitted on an event last recorded in a capturing stream"),
    DRIVER_ROW(cudaErrorStreamCaptureWrongThread, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD,
               "attempt to terminate a thread-local capture sequence from another thread"),
    DRIVER_ROW(cudaErrorUnknown, CUDA_ERROR_UNKNOWN, "unknown error"),
};
#undef ROW
#undef DRIVER_ROW

const Row* find(cudaError_t error) {
  for (const Row& r : kErrors)
    if (r.error == error) return &r;
  return nullptr;
}

// Programs may keep what cudaGetErrorString returns.
const char* forever(const std::string& text) {
  static std::mutex mutex;
  static auto* all = new std::set<std::string>;
  const std::lock_guard lock(mutex);
  return all->insert(text).first->c_str();
}

bool ends_context(cudaError_t error) { return error == cudaErrorLaunchFailure || error == cudaErrorAssert; }

}  // namespace

namespace gpuless::standin {

bool errors_stick = false;

cudaError_t finish(int value) {
  auto error = static_cast<cudaError_t>(value);
  if (context_error) error = context_error;
  if (errors_stick && ends_context(error)) context_error = error;
  if (error) {
    last = last_words_of = error;
    const std::string why = gpuless_take_refusal(error);
    const Row* r = find(error);
    last_words = why.empty() || !r ? nullptr : forever(r->text + (": " + why));
  }
  return error;
}

cudaError_t refuse(cudaError_t error, const std::string& why) {
  gpuless_refuse(error, why.c_str());
  return finish(error);
}

SameLastError::SameLastError() : before(last) {}
SameLastError::~SameLastError() { last = before; }

cudaError_t unsupported(const char* what) {
  std::fprintf(stderr, "%s is not supported by gpuless\n", what);
  gpuless_log_incomplete((std::string(what) + " is not supported").c_str());
  gpuless_finding_clear();  // which cudaGetErrorString would take for the reason
  return finish(cudaErrorNotSupported);
}

}  // namespace gpuless::standin

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
  if (last_words && last_words_of == error) return last_words;
  const bool of_launch =
      ends_context(error) || error == cudaErrorNoKernelImageForDevice || error == cudaErrorNotSupported;
  if (of_launch && *gpuless_finding()) return gpuless_finding();
  const Row* r = find(error);
  return r ? r->text : "unrecognized error code";
}
CUresult cuGetErrorName(CUresult error, const char** name) {
  const Row* r = find(static_cast<cudaError_t>(error));
  *name = r ? r->driver_name : nullptr;
  return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult error, const char** text) {
  const Row* r = find(static_cast<cudaError_t>(error));
  *text = r && r->driver_name ? cudaGetErrorString(r->error) : nullptr;
  if (last_words && gpuless::standin::driver_code(last_words_of) == error) *text = last_words;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // extern "C"
