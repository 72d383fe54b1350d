// Streams and events: whatever is put into a stream is done at once, so that waiting for one is nothing, and an event's
// time is the host's clock when it was recorded.
#include <chrono>

#include "standin.h"

using namespace forwardpass::standin;
using Clock = std::chrono::steady_clock;

struct CUstream_st {
  unsigned flags;
  int priority;
};
struct CUevent_st {
  unsigned flags;
  bool recorded = false;
  Clock::time_point time = {};
};

extern "C" {

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = new CUstream_st{flags, priority};
  return finish(cudaSuccess);
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, cudaStreamDefault, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread)
    return finish(cudaErrorInvalidResourceHandle);
  delete stream;
  return finish(cudaSuccess);
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return finish(cudaSuccess); }
cudaError_t cudaStreamQuery(cudaStream_t) { return finish(cudaSuccess); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return finish(cudaSuccess); }
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = stream > cudaStreamPerThread ? stream->flags : cudaStreamDefault;
  return finish(cudaSuccess);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream > cudaStreamPerThread ? stream->priority : 0;
  return finish(cudaSuccess);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return finish(cudaSuccess);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return finish(cudaSuccess);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  function(data);
  return finish(cudaSuccess);
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  function(stream, cudaSuccess, data);
  return finish(cudaSuccess);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new CUevent_st{flags};
  return finish(cudaSuccess);
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  if (!event) return finish(cudaErrorInvalidResourceHandle);
  delete event;
  return finish(cudaSuccess);
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned) {
  if (!event) return finish(cudaErrorInvalidResourceHandle);
  event->recorded = true;
  event->time = Clock::now();
  return finish(cudaSuccess);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return finish(event ? cudaSuccess : cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return finish(event ? cudaSuccess : cudaErrorInvalidResourceHandle); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  for (const cudaEvent_t event : {start, end})
    if (!event || !event->recorded || (event->flags & cudaEventDisableTiming))
      return finish(cudaErrorInvalidResourceHandle);
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return finish(cudaSuccess);
}

cudaError_t cudaDeviceSynchronize() { return finish(cudaSuccess); }

}  // extern "C"

ALSO(cudaStreamSynchronize_ptsz, cudaStreamSynchronize);
ALSO(cudaStreamQuery_ptsz, cudaStreamQuery);
ALSO(cudaStreamWaitEvent_ptsz, cudaStreamWaitEvent);
ALSO(cudaStreamGetFlags_ptsz, cudaStreamGetFlags);
ALSO(cudaStreamGetPriority_ptsz, cudaStreamGetPriority);
ALSO(cudaStreamIsCapturing_ptsz, cudaStreamIsCapturing);
ALSO(cudaLaunchHostFunc_ptsz, cudaLaunchHostFunc);
ALSO(cudaStreamAddCallback_ptsz, cudaStreamAddCallback);
ALSO(cudaEventRecord_ptsz, cudaEventRecord);
ALSO(cudaEventRecordWithFlags_ptsz, cudaEventRecordWithFlags);
