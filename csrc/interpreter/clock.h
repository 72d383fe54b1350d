#pragma once
// Happens-before. An agent is whoever touches memory on its own: a warp, or an asynchronous operation under way. Each
// has a clock that advances when it releases something; a vector clock says how far one knows every agent.
// Flanagan and Freund, FastTrack (PLDI 2009), with the async proxy of the PTX memory model (ISA 8) on top.
#include <algorithm>
#include <cstdint>

namespace forwardpass::interpreter {

using Clock = uint32_t;
constexpr int kMaxWarps = 32, kAsyncAgents = 15, kMaxAgents = kMaxWarps + kAsyncAgents + 1;
// The grids launched before this one, which a programmatic dependent launch may overtake: seen is 1 once they are known
// to have ended (griddepcontrol.wait, or an ordinary launch), 0 before.
constexpr int kGridAgent = kMaxAgents - 1;

struct alignas(32) VectorClock {
  Clock at[kMaxAgents] = {};
  void join(const VectorClock& other) {
    for (int i = 0; i < kMaxAgents; ++i) at[i] = std::max(at[i], other.at[i]);
  }
};

// What a synchronisation carries from one agent to another. A generic write that another agent knows of through `seen`
// may be touched by the async proxy only once `proxied` covers it too: fence.proxy.async sets proxied to seen.
struct Knowledge {
  VectorClock seen, proxied;
  void join(const Knowledge& other) {
    seen.join(other.seen);
    proxied.join(other.proxied);
  }
};

}  // namespace forwardpass::interpreter
