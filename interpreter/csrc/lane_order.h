#pragma once
// Happens-before among the lanes of one warp. To the shadow a warp is one agent, whose accesses follow each other; its
// lanes are threads of their own, though, that nothing orders but bar.warp.sync, a barrier, or what one of them
// releases and another acquires. To execute one instruction together, be it shfl.sync or ldmatrix, orders no memory: of
// what is .sync the ISA says so of barriers alone (9.7.13.1 to 9.7.13.3).
//
// A lane's access is as old as the warp's clock was, which grows whenever the warp releases something. What the warp
// did up to `floor` is known to all of its lanes. Where only some of them have met (a mask that names half a warp, one
// thread that waits for an mbarrier) each lane knows of each other one up to a clock of its own.
//
// What one lane releases counts as what the whole warp had done by then, here as between warps.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <memory>

#include "clock.h"
#include "program.h"

namespace gpuless {

// The lanes that touch a range of bytes. Each of them touches the whole range; or it is spread over them, so that the
// n-th lane touches the n-th of as many equal parts.
struct LaneSet {
  Mask lanes = 0;
  uint32_t spread = false;  // as wide as lanes: the set is one register
  bool operator==(const LaneSet& other) const { return lanes == other.lanes && spread == other.spread; }
  // log2 of the number of bytes that a lane touches in a range of 1 << shift.
  int part_shift(int shift) const { return spread ? shift - __builtin_ctz(__builtin_popcount(lanes)) : shift; }
  // The lanes that touch the 1 << size_shift bytes from `offset` on, if each lane has 1 << part_shift bytes.
  LaneSet part(int part_shift, uint32_t offset, int size_shift) const {
    if (!spread) return *this;
    const uint32_t count = size_shift > part_shift ? 1u << (size_shift - part_shift) : 1;
    return {_pdep_u32(((1u << count) - 1) << (offset >> part_shift), lanes), count > 1};
  }
};

class LaneOrder {
 public:
  void begin(Clock past) {
    floor_ = past;
    divided_ = false;
  }
  // The lanes meet now: each knows what all of them have done and knew.
  void meet(Mask lanes, Mask live, Clock now);
  // The lanes learn what the warp had done when it released at `clock`.
  void learn(Mask lanes, Mask live, Clock clock);
  Clock floor() const { return floor_; }

  struct Clash {
    int lane = -1, other = -1;  // -1: none
    uint16_t bytes = 0;         // where
  };
  // Which of 1 << shift bytes, that `before` touched at a clock above the floor, `now` touches unordered with it.
  // `write`: `before` wrote them. Lanes that wrote a byte together know what is there.
  Clash clash(LaneSet before, Clock clock, LaneSet now, int shift, bool write) const;

 private:
  Mask unknown(int lane, Mask others, Clock clock) const;  // of the others, whose accesses the lane does not know
  void divide();

  Clock floor_ = 0;
  bool divided_ = false;  // known_ holds more than the floor
  using Known = std::array<std::array<Clock, kLanes>, kLanes>;
  std::unique_ptr<Known> known_;  // [lane][other lane]
};

// Who accesses a range of shared memory on behalf of a warp, lane by lane. Without `agent` the lanes are not looked at.
struct LaneRange {
  int agent = -1;      // of the warp
  Clock floor = ~0u;   // of its order
  uint32_t begin = 0;  // of the range
  int part_shift = 0;  // log2 of a lane's bytes, where they are spread
  LaneSet set;
  const LaneOrder* order = nullptr;

  void place(uint32_t from, LaneSet lanes) {
    begin = from;
    set = lanes;
  }
  LaneSet of(uint32_t address, int shift) const { return set.part(part_shift, address - begin, shift); }
};

}  // namespace gpuless
