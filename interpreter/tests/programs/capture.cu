// Streams captured into graphs: what is kept, in which order it is done, and what a capture refuses, with which code.
// With an argument: a program that waits for its stream while it captures.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define CHECK(call)                                                                                           \
  do {                                                                                                        \
    cudaError_t error = (call);                                                                               \
    if (error != cudaSuccess) {                                                                               \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, cudaGetErrorName(error), cudaGetErrorString(error)); \
      std::exit(2);                                                                                           \
    }                                                                                                         \
  } while (0)

__global__ void scale(int* out, const int* in, int by) { out[threadIdx.x] = in[threadIdx.x] * by; }
__global__ void add_one(int* out) { ++out[threadIdx.x]; }

constexpr int kCount = 32;
constexpr size_t kBytes = kCount * sizeof(int);

struct Memory {
  int *in, *out, host[kCount];
  Memory() {
    CHECK(cudaMalloc(&in, kBytes));
    CHECK(cudaMalloc(&out, kBytes));
  }
  ~Memory() {
    CHECK(cudaFree(in));
    CHECK(cudaFree(out));
  }
  void set(int value) {
    for (int& h : host) h = value;
    CHECK(cudaMemcpy(in, host, kBytes, cudaMemcpyHostToDevice));
  }
  bool holds(int value) {
    int got[kCount];
    CHECK(cudaMemcpy(got, out, kBytes, cudaMemcpyDeviceToHost));
    for (int g : got)
      if (g != value) return false;
    return true;
  }
};

cudaStream_t stream(unsigned flags = cudaStreamDefault) {
  cudaStream_t s;
  CHECK(cudaStreamCreateWithFlags(&s, flags));
  return s;
}

// Kernels, copies, fills and host functions, with arguments as they were and memory as it is.
bool replays() {
  Memory m;
  const cudaStream_t s = stream();
  int calls = 0, by = 3, copied[kCount] = {};
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  cudaStreamCaptureStatus status;
  m.set(1);
  CHECK(cudaMemset(m.out, 0, kBytes));
  CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
  CHECK(cudaStreamIsCapturing(s, &status));
  bool right = status == cudaStreamCaptureStatusActive;
  CHECK(cudaMemsetAsync(m.out, 0xff, kBytes, s));
  scale<<<1, kCount, 0, s>>>(m.out, m.in, by);
  by = 1000;
  add_one<<<1, kCount, 0, s>>>(m.out);
  CHECK(cudaMemcpyAsync(copied, m.out, kBytes, cudaMemcpyDeviceToHost, s));
  CHECK(cudaLaunchHostFunc(s, [](void* n) { ++*static_cast<int*>(n); }, &calls));
  CHECK(cudaGetLastError());
  CHECK(cudaStreamEndCapture(s, &graph));
  CHECK(cudaStreamIsCapturing(s, &status));
  right &= status == cudaStreamCaptureStatusNone && m.holds(0) && calls == 0 && copied[0] == 0;
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  CHECK(cudaGraphDestroy(graph));
  for (int value : {1, 5}) {
    m.set(value);
    CHECK(cudaGraphLaunch(executable, s));
    CHECK(cudaStreamSynchronize(s));
    right &= m.holds(3 * value + 1) && copied[kCount - 1] == 3 * value + 1;
  }
  CHECK(cudaGraphExecDestroy(executable));
  CHECK(cudaStreamDestroy(s));
  return right && calls == 2;
}

// `call` while a stream is captured: its code, and whether the capture is then what it has to be.
template <class Call>
bool refuses(cudaError_t expected, unsigned flags, cudaStreamCaptureMode mode, Call call) {
  const cudaStream_t s = stream(flags);
  cudaGraph_t graph = nullptr;
  CHECK(cudaStreamBeginCapture(s, mode));
  const cudaError_t got = call(s), last = cudaGetLastError(), ended = cudaStreamEndCapture(s, &graph);
  const bool right = expected ? last == expected && ended == cudaErrorStreamCaptureInvalidated && !graph
                              : last == cudaSuccess && ended == cudaSuccess && graph;
  if (got != expected || !right) std::printf("%s, then %s\n", cudaGetErrorName(got), cudaGetErrorName(ended));
  cudaGetLastError();
  if (graph) CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(s));
  return got == expected && right;
}

bool refusals() {
  Memory m;
  cudaEvent_t before, within;
  CHECK(cudaEventCreate(&before));
  CHECK(cudaEventCreate(&within));
  CHECK(cudaEventRecord(before));
  void* p = nullptr;
  const cudaStream_t other = stream(cudaStreamNonBlocking);
  const auto kGlobal = cudaStreamCaptureModeGlobal, kRelaxed = cudaStreamCaptureModeRelaxed;
  const unsigned kBlocking = cudaStreamDefault, kFree = cudaStreamNonBlocking;
  const auto kNo = cudaErrorStreamCaptureUnsupported, kImplicit = cudaErrorStreamCaptureImplicit;
  const auto copy = [&](cudaStream_t) { return cudaMemcpy(m.out, m.in, kBytes, cudaMemcpyDeviceToDevice); };
  const auto allocate = [&](cudaStream_t) { return cudaMalloc(&p, 4); };
  bool right = refuses(kNo, kBlocking, kGlobal, allocate);
  right &= refuses(cudaSuccess, kBlocking, kRelaxed, allocate);
  right &= refuses(kNo, kBlocking, cudaStreamCaptureModeThreadLocal, allocate);
  right &= refuses(kNo, kFree, kGlobal, [&](cudaStream_t) { return cudaFree(p); });
  right &= refuses(kNo, kBlocking, kGlobal, [](cudaStream_t) { return cudaDeviceSynchronize(); });
  right &= refuses(kNo, kBlocking, kRelaxed, [](cudaStream_t) { return cudaDeviceSynchronize(); });
  right &= refuses(kNo, kBlocking, kRelaxed, [](cudaStream_t s) { return cudaStreamSynchronize(s); });
  right &= refuses(kNo, kBlocking, kGlobal, [](cudaStream_t s) { return cudaStreamQuery(s); });
  right &= refuses(cudaSuccess, kFree, kGlobal, [](cudaStream_t) { return cudaStreamQuery(nullptr); });
  right &= refuses(kImplicit, kBlocking, kRelaxed, [](cudaStream_t) { return cudaStreamQuery(nullptr); });
  right &= refuses(kImplicit, kBlocking, kGlobal, copy);
  right &= refuses(kNo, kFree, kGlobal, copy);
  right &= refuses(cudaSuccess, kFree, kRelaxed, copy);
  right &= refuses(kImplicit, kBlocking, kGlobal, [&](cudaStream_t) {
    add_one<<<1, kCount>>>(m.out);  // without its stream
    return cudaPeekAtLastError();
  });
  right &= refuses(kNo, kBlocking, kGlobal, [&](cudaStream_t) { return cudaEventQuery(before); });
  right &= refuses(cudaErrorCapturedEvent, kBlocking, kRelaxed, [&](cudaStream_t s) {
    CHECK(cudaEventRecord(within, s));
    return cudaEventSynchronize(within);
  });
  right &= refuses(cudaErrorStreamCaptureIsolation, kBlocking, kGlobal,
                   [&](cudaStream_t s) { return cudaStreamWaitEvent(s, before); });
  right &= refuses(cudaSuccess, kBlocking, kGlobal, [&](cudaStream_t s) {
    CHECK(cudaEventRecord(within, s));
    return cudaStreamWaitEvent(s, within);
  });
  right &= refuses(cudaErrorStreamCaptureInvalidated, kBlocking, kGlobal, [&](cudaStream_t s) {
    cudaFree(p);
    return cudaMemsetAsync(m.out, 0, kBytes, s);
  });
  right &= refuses(cudaSuccess, kBlocking, kGlobal, [&](cudaStream_t) {
    auto mode = cudaStreamCaptureModeRelaxed;
    CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    const cudaError_t error = allocate(nullptr);
    CHECK(cudaThreadExchangeStreamCaptureMode(&mode));
    return mode == cudaStreamCaptureModeRelaxed ? error : cudaErrorUnknown;
  });
  cudaGraph_t graph;
  right &= cudaStreamBeginCapture(nullptr, kGlobal) == kNo &&
           cudaStreamBeginCapture(cudaStreamLegacy, kGlobal) == kNo &&
           cudaStreamEndCapture(other, &graph) == cudaErrorIllegalState && !graph;
  cudaGetLastError();
  CHECK(cudaStreamDestroy(other));
  return right;
}

int main(int argc, char**) {
  if (argc > 1) {
    const cudaStream_t s = stream();
    Memory m;
    CHECK(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal));
    scale<<<1, kCount, 0, s>>>(m.out, m.in, 2);
    CHECK(cudaStreamSynchronize(s));
    std::printf("captured\n");
    return 0;
  }
  const bool replayed = replays(), refused = refusals();
  std::printf("replays: %s\nrefusals: %s\n%s\n", replayed ? "PASS" : "FAIL", refused ? "PASS" : "FAIL",
              replayed && refused ? "PASS" : "FAIL");
  return replayed && refused ? 0 : 1;
}
