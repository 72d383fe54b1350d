#pragma once
// What the instructions of asynchronous operations share.
#include <cstring>
#include <string>

#include "../machine.h"

namespace gpuless {

// What bytes hold while an operation is on its way to write them: a NaN of every float format, -1 of every integer.
constexpr int kPoison = 0xff;

inline bool checked(const Cta& cta) { return cta.launch->options.checks; }

// A finding of an operation that completes, when no instruction runs: Cta::complete knows the place.
[[noreturn]] inline void fault(Kind kind, std::string message, uint64_t address) {
  throw finding_at(kind, std::move(message), address);
}

// The address operand of a row, bound with Bind::address.
struct Place {
  int64_t displacement = 0;
  bool wide = false, generic = false;  // generic: no state space in the opcode
  bool cluster = false;                // .shared::cluster: may be of another CTA
  int operand = 0;                     // of the instruction

  void read(const Warp& w, const Instruction& i, uint64_t out[kLanes]) const {
    w.addresses(i, operand, displacement, wide, out);
  }
};

// The lanes of a mask whose address is that of the first, most often all.
inline Mask equal_lanes(const uint64_t address[kLanes], Mask mask) {
  const uint64_t first = address[__builtin_ctz(mask)];
  Mask equal = 0;
  for (int l = 0; l < kLanes; ++l) equal |= Mask{address[l] == first} << l;
  return equal & mask;
}

// A range of shared memory within bounds and aligned.
struct SharedRange {
  Cta* cta;
  uint32_t offset;
};
inline SharedRange shared_at(Warp& w, const Place& place, uint64_t address, uint64_t bytes, uint32_t alignment,
                             int lane, const char* what) {
  if (place.generic) {
    if ((address & kWindowMask) != kSharedWindow) {
      w.fail_at(Kind::illegal, std::string(what) + " must lie in shared memory; this generic address does not", lane,
                address);
    }
    address -= kSharedWindow;
  }
  if (address % alignment) {
    w.fail_at(Kind::misaligned, std::string(what) + " must be aligned to " + std::to_string(alignment) + " bytes", lane,
              address);
  }
  Cta& cta = shared_range(w, address, bytes, place.cluster, Use::read, lane);
  return {&cta, static_cast<uint32_t>(shared_offset_of(address))};
}
// The same of the CTA's own.
inline uint32_t shared_offset(Warp& w, const Place& place, uint64_t address, uint64_t bytes, uint32_t alignment,
                              int lane, const char* what) {
  return shared_at(w, place, address, bytes, alignment, lane, what).offset;
}

// The operation itself as it accesses memory; messages name the line that issued it.
inline Actor acting(const Pending& p, Actor actor) {
  actor.line = static_cast<uint32_t>(p.code->statements[p.instruction->index]->line);
  return actor;
}
// One that completes, which advances the clock of its series: who has waited for one does not know of those that
// complete after it. What the issuer knew was asked of it when it was issued.
inline Actor completing(const Pending& p, int series, Proxy proxy = Proxy::async) {
  return acting(p, {series, p.cta->cluster->advance(series), nullptr, proxy, 0, {}});
}

// What waiting for an operation teaches: its own accesses up to then, and nothing of what its issuer knew. Those of the
// async proxy need no proxy fence, which the shadow knows.
inline Knowledge learnt(int agent, Clock time) {
  Knowledge k;
  k.seen.set(agent, time);
  return k;
}

}  // namespace gpuless
