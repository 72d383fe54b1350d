#pragma once
// The mbarrier object (ISA 9.7.13.15): phases of expected arrivals and transaction bytes. Its state lives here and not
// in the 8 bytes of shared memory, which the shadow reserves for it.
#include <cstdint>

#include "explore/trace.h"
#include "machine.h"

namespace gpuless {

struct MBarrier {
  static constexpr int64_t kMaxCount = (1 << 20) - 1;  // of arrivals, and of transaction bytes in either direction

  uint32_t address;
  int initialiser;  // the agent
  uint64_t published =
      0;              // by fence.mbarrier_init: known to those who have waited for this phase of the cluster's barrier
  uint32_t expected;  // arrivals of a phase, from the next one on
  uint32_t pending;   // arrivals that this phase still lacks
  int64_t transactions = 0;  // bytes expected and not complete
  uint64_t phase = 0;
  Knowledge gathering, completed;  // what the arrivals of this phase, and of the one before it, knew

  MBarrier(uint32_t address, uint32_t count, int initialiser)
      : address(address), initialiser(initialiser), expected(count), pending(count) {}

  // As mbarrier.init has left it. Triton's compiler leaves such of barriers whose use it has optimised away.
  bool untouched() const { return phase == 0 && pending == expected && !transactions; }

  // Each throws a Finding of kind mbarrier where the ISA's limits are passed, and ends the phase where it is complete.
  void arrive(Cta&, uint32_t count, bool drop = false);
  void expect_transactions(Cta&, int64_t bytes);
  void complete_transactions(Cta&, int64_t bytes);
  void touch(Cta&, Touch) const;  // in an order that is explored

 private:
  void settle(Cta&);
};

// Of what happens to such an object.
constexpr const char* kNobodyCame = "; nothing has arrived or waited there since, so hardware does not mind";

// The object at an offset of shared memory; a Finding where there is none.
MBarrier& mbarrier_at(Cta&, uint32_t address);
// The same for an instruction of the warp, which the object's init must be ordered before. In another CTA the use must
// end before that CTA exits, unless it is not `released`: who waits for such an arrival learns only that it happened.
MBarrier& use_mbarrier(Warp&, Cta&, uint32_t address, bool released = true);

}  // namespace gpuless
