// Streams, events and graphs: whatever is put into a stream is done at once, so that waiting for one is nothing, and an
// event's time is the host's clock when it was recorded. What is put into a stream that is captured is done, in the
// same order, when the graph is launched; one stream is captured, none that waits for its events.
#include <chrono>

#include "standin.h"

using namespace gpuless::standin;
using Clock = std::chrono::steady_clock;

struct CUstream_st {
  unsigned flags;
  int priority;
};
struct CUevent_st {
  unsigned flags;
  bool recorded = false;
  Clock::time_point time = {};
  cudaStream_t captured_in = nullptr;  // recorded last while this one was captured
};

namespace {

bool is_captured(cudaStream_t stream) {
  int status = cudaStreamCaptureStatusNone;
  return gpuless_capturing() && !gpuless_capture_status(stream, &status) && status != cudaStreamCaptureStatusNone;
}

// Of calls that ask for an event: an error where it is none, or is one in a graph.
cudaError_t check(cudaEvent_t event) {
  if (!event) return finish(cudaErrorInvalidResourceHandle);
  if (!event->captured_in) return finish(cudaSuccess);
  gpuless_capture_refuses(gpuless_waits_for_stream, event->captured_in);
  return finish(cudaErrorCapturedEvent);
}

}  // namespace

namespace gpuless::standin {

cudaError_t keep_or_do(cudaStream_t stream, Work work) {
  const gpuless_work owned{[](void* w) { return static_cast<int>((*static_cast<Work*>(w))()); },
                           [](void* w) { delete static_cast<Work*>(w); }, new Work(work)};
  int captured = 0;
  if (const int error = gpuless_capture_keep(stream, &owned, &captured)) return finish(error);
  return captured ? finish(cudaSuccess) : work();
}

cudaError_t refused_by_capture() { return finish(gpuless_capture_refuses(gpuless_unsafe, nullptr)); }
cudaError_t legacy_refused_by_capture() {
  const int implicit = gpuless_capture_refuses(gpuless_waits_for_stream, cudaStreamLegacy);
  return implicit ? finish(implicit) : refused_by_capture();
}

}  // namespace gpuless::standin

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
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return finish(gpuless_capture_refuses(gpuless_waits_for_stream, stream));
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  return finish(gpuless_capture_refuses(gpuless_waits_for_stream, stream));
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (!event) return finish(cudaErrorInvalidResourceHandle);
  if (event->captured_in && event->captured_in != stream) {
    gpuless_capture_refuses(gpuless_waits_for_stream, event->captured_in);
    return unsupported("a capture of more than one stream");
  }
  return finish(event->recorded ? gpuless_capture_refuses(gpuless_waits_for_event, stream) : cudaSuccess);
}
cudaError_t cudaStreamGetFlags(cudaStream_t stream, unsigned* flags) {
  *flags = stream > cudaStreamPerThread ? stream->flags : cudaStreamDefault;
  return finish(cudaSuccess);
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream > cudaStreamPerThread ? stream->priority : 0;
  return finish(cudaSuccess);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  int value = 0;
  const int error = gpuless_capture_status(stream, &value);
  *status = static_cast<cudaStreamCaptureStatus>(value);
  return finish(error);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const bool blocking = stream <= cudaStreamPerThread || !(stream->flags & cudaStreamNonBlocking);
  return finish(gpuless_capture_begin(stream, mode, blocking));
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return finish(gpuless_capture_end(stream, reinterpret_cast<void**>(graph)));
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  *mode = static_cast<cudaStreamCaptureMode>(gpuless_capture_mode(*mode));
  return finish(cudaSuccess);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = nullptr;
  if (!graph) return finish(cudaErrorInvalidValue);
  *executable = static_cast<cudaGraphExec_t>(gpuless_graph_copy(graph));
  return finish(*executable ? cudaSuccess : cudaErrorMemoryAllocation);
}
// By an asm label, as headers declare it with other arguments; no alias, as TileLang needs it from _cudart.so.
cudaError_t instantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long) asm("cudaGraphInstantiate");
cudaError_t instantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(executable, graph, flags);
}
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t) {
  return finish(executable ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  if (!executable) return finish(cudaErrorInvalidValue);
  if (is_captured(stream)) return unsupported("a graph within a graph");
  return enqueue(stream, [=] { return finish(gpuless_graph_launch(executable)); });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  gpuless_graph_release(graph);
  return finish(cudaSuccess);
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  gpuless_graph_release(executable);
  return finish(cudaSuccess);
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return finish(cudaSuccess);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return enqueue(stream, [=] {
    function(data);
    return finish(cudaSuccess);
  });
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data, unsigned) {
  if (const int error = gpuless_capture_refuses(gpuless_waits_for_stream, stream)) return finish(error);
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
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  if (!event) return finish(cudaErrorInvalidResourceHandle);
  event->captured_in = is_captured(stream) ? stream : nullptr;
  event->recorded = !event->captured_in;
  event->time = Clock::now();
  return finish(cudaSuccess);
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const cudaError_t error = check(event);
  return error ? error : refused_by_capture();
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  const cudaError_t error = check(event);
  return error ? error : refused_by_capture();
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  for (const cudaEvent_t event : {start, end}) {
    if (event && event->captured_in) return check(event);
    if (!event || !event->recorded || (event->flags & cudaEventDisableTiming))
      return finish(cudaErrorInvalidResourceHandle);
  }
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return finish(cudaSuccess);
}

cudaError_t cudaDeviceSynchronize() { return finish(gpuless_capture_refuses(gpuless_waits_for_device, nullptr)); }

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
