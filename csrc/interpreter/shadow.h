#pragma once
// What is known of every byte of a CTA's shared memory: written or not, under way or not, who wrote and who read it last.
//
// State is kept per granule of 16 bytes, whole accesses of which are the rule; one that is touched in parts splits into
// words, and into bytes if need be, so that neighbours never raise a false alarm.
#include <cstdint>
#include <memory>
#include <vector>

#include "clock.h"

namespace forwardpass::interpreter {

enum class Proxy : uint8_t { generic, async };

struct Actor {
  int agent;
  Clock now;
  const Knowledge* knowledge;
  Proxy proxy;
};

class Shadow {
 public:
  // Everything not written, nobody knows of anything. The clocks of the agents must begin at base() or above, so that
  // what a former CTA left behind is in the past: nothing needs clearing but the masks.
  void reset(int64_t bytes, int agents);
  Clock base() const { return base_; }
  void advance_base(Clock highest) { base_ = highest + 1; }

  // Each throws a Finding (race, in_flight, uninitialised) that has kind, message and address; the caller's place is
  // filled in further up. The range lies within shared memory.
  void read(const Actor&, uint32_t begin, uint32_t bytes);
  void write(const Actor&, uint32_t begin, uint32_t bytes);
  void atomic(const Actor&, uint32_t begin, uint32_t bytes);  // races with plain accesses, not with other atomics

  // An asynchronous operation will write the range: anybody's access until land() is a finding. `owner` is whose.
  void take_off(const Actor&, uint32_t begin, uint32_t bytes);
  void land(const Actor&, uint32_t begin, uint32_t bytes);  // counts as the write

  // An mbarrier object lives there (its 8 bytes are touched by mbarrier instructions only) or no more.
  void set_mbarrier(const Actor&, uint32_t begin, bool alive);
  void use_mbarrier(const Actor&, uint32_t begin);  // init must be ordered before it

 private:
  struct Granule;
  std::vector<Granule> granules_;
  Clock base_ = 1;
};

}  // namespace forwardpass::interpreter
