// Streams that are captured into graphs: what a real one refuses meanwhile is refused, with its code, and what is put
// into the stream is kept, in order, until the graph is launched. CUDA programming guide, "Creating a Graph Using
// Stream Capture", "Prohibited and Unhandled Operations"; cudaStreamBeginCapture and
// cudaThreadExchangeStreamCaptureMode.
#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "core.h"
#include "cudart.h"

using gpuless::guarded;
using gpuless::cuda::kInvalidValue;
using gpuless::cuda::kSuccess;

namespace {

enum Error {  // of cudaError_t, those of captures
  kIllegalState = 401,
  kUnsupported = 900,
  kInvalidated = 901,
  kIsolation = 905,
  kImplicit = 906,
  kWrongThread = 908
};
enum Mode { kGlobal, kThreadLocal, kRelaxed };

struct Work {
  gpuless_work work;
  ~Work() { work.forget(work.data); }
};
using Graph = std::vector<std::shared_ptr<Work>>;

struct Capture {
  void* stream;
  int mode;
  bool blocking, invalid;  // blocking: waits for the legacy stream, and that one for it
  std::thread::id thread;
  Graph graph;
};

std::mutex mutex;
std::vector<Capture>& captures() {
  static auto* all = new std::vector<Capture>;
  return *all;
}
std::atomic<int> under_way{0};
thread_local int thread_mode = kGlobal;

bool is_legacy(const void* stream) { return reinterpret_cast<uintptr_t>(stream) <= 1; }

Capture* find(const void* stream) {
  for (Capture& c : captures())
    if (c.stream == stream) return &c;
  return nullptr;
}

template <class Which>
int invalidate(Which which, int error) {
  int result = kSuccess;
  for (Capture& c : captures())
    if (which(c)) c.invalid = true, result = error;
  return result;
}

// The legacy stream waits for every blocking one, which a graph cannot say.
int use_legacy() {
  return invalidate([](const Capture& c) { return c.blocking; }, kImplicit);
}

}  // namespace

extern "C" {

int gpuless_capture_begin(void* stream, int mode, int blocking) {
  return guarded([&]() -> int {
    const std::lock_guard lock(mutex);
    if (mode < kGlobal || mode > kRelaxed) return kInvalidValue;
    if (is_legacy(stream)) return kUnsupported;
    if (find(stream)) return kIllegalState;
    captures().push_back({stream, mode, blocking != 0, false, std::this_thread::get_id(), {}});
    ++under_way;
    return kSuccess;
  });
}

int gpuless_capture_end(void* stream, void** graph) {
  return guarded([&]() -> int {
    const std::lock_guard lock(mutex);
    *graph = nullptr;
    Capture* c = find(stream);
    if (!c) return kIllegalState;
    if (c->mode != kRelaxed && c->thread != std::this_thread::get_id()) return kWrongThread;
    const bool invalid = c->invalid;
    if (!invalid) *graph = new Graph(std::move(c->graph));
    captures().erase(captures().begin() + (c - captures().data()));
    --under_way;
    return invalid ? kInvalidated : kSuccess;
  });
}

int gpuless_capture_status(void* stream, int* status) {
  *status = 0;
  if (!under_way) return kSuccess;
  const std::lock_guard lock(mutex);
  if (is_legacy(stream)) return use_legacy();
  if (const Capture* c = find(stream)) *status = c->invalid ? 2 : 1;
  return kSuccess;
}

int gpuless_capture_mode(int mode) {
  std::swap(mode, thread_mode);
  return mode;
}

int gpuless_capturing(void) { return under_way; }

int gpuless_capture_keep(void* stream, const gpuless_work* work, int* captured) {
  return guarded([&]() -> int {
    const std::shared_ptr<Work> owned(new Work{*work});
    const std::lock_guard lock(mutex);
    *captured = 0;
    if (is_legacy(stream)) return use_legacy();
    Capture* c = find(stream);
    if (!c) return kSuccess;
    if (c->invalid) return kInvalidated;
    *captured = 1;
    c->graph.push_back(owned);
    return kSuccess;
  });
}

int gpuless_capture_refuses(int what, void* stream) {
  if (!under_way) return kSuccess;
  const std::lock_guard lock(mutex);
  const auto self = std::this_thread::get_id();
  switch (what) {
    case gpuless_waits_for_stream:
      if (is_legacy(stream)) return use_legacy();
      return invalidate([&](const Capture& c) { return c.stream == stream; }, kUnsupported);
    case gpuless_waits_for_device:
      return invalidate([](const Capture&) { return true; }, kUnsupported);
    case gpuless_waits_for_event:
      return invalidate([&](const Capture& c) { return c.stream == stream; }, kIsolation);
    default:
      if (thread_mode == kRelaxed) return kSuccess;
      return invalidate(
          [&](const Capture& c) {
            return c.thread == self ? c.mode != kRelaxed : c.mode == kGlobal && thread_mode == kGlobal;
          },
          kUnsupported);
  }
}

void* gpuless_graph_copy(const void* graph) {
  return guarded<void*>(nullptr, [&] { return new Graph(*static_cast<const Graph*>(graph)); });
}
void gpuless_graph_release(void* graph) { delete static_cast<Graph*>(graph); }
int gpuless_graph_launch(const void* graph) {
  for (const auto& w : *static_cast<const Graph*>(graph))
    if (const int error = w->work.run(w->work.data)) return error;
  return kSuccess;
}

}  // extern "C"
