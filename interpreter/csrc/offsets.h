#pragma once
// Offsets that are computed in 32 bits, overflow, and reach an address.
//
// blockIdx.x * stride is right up to 2^31 elements. Beyond, the product wraps, is widened, and the address is another
// one: a tensor that is large enough shows it, and its neighbours in memory hide it. A wrap alone is no fault, as
// hashes and random numbers live on it. So the decoder looks for 32-bit sums, products and shifts whose value may
// become part of a 64-bit address by a widening and by sums, products and shifts alone: what is masked, divided or
// compared on the way is another number. These compute in 64 bits beside 32. Where a result does not fit, its exact
// value follows the register from then on, and the finding is an access to an address that was made with another value.
//
// PTX does not tell signed arithmetic from unsigned, so an exact value is kept for both ways of reading the registers
// that it was computed from, and a widened value that equals one of them is right.
//
// Launch::growth, how many times larger tensors may become, has every such value followed: what grows with them and
// then does not fit is the finding.
#include <unordered_map>

#include "machine.h"

namespace gpuless {

// Fills in Code::offset_uses, and replaces the handlers of the arithmetic. Before share_registers.
void find_offset_uses(Code&);

class WrappedOffsets {  // of one warp
 public:
  bool empty() const { return entries_.empty(); }
  // Called before an instruction runs: reports addresses that are wrong, and follows the values.
  void before(Warp&, const Instruction&, Mask);
  // By an instruction that has not run yet.
  void computed(const Warp&, const Instruction&, Mask, const int64_t exact[kLanes]);

 private:
  struct Value {
    int64_t exact, otherwise;  // of signed registers and unsigned ones; of a 64-bit register: what is exact, what it is
  };
  struct Entry {
    Mask lanes = 0;
    uint32_t line = 0;           // of the PTX, whose result did not fit
    bool zero_extended = false;  // of a 64-bit register
    Value values[kLanes];
    void add(int lane, Value, const Entry& origin);
  };
  const Entry* find(const Warp&, Offset) const;
  Value narrow(const Warp&, const Instruction&, int source, int lane) const;
  Entry follow(const Warp&, const Instruction&, Mask) const;
  void follow_narrow(const Warp&, const Instruction&, int lane, Entry&) const;
  void follow_widening(const Warp&, const Instruction&, int sources, int lane, Entry&) const;
  void follow_wide(const Warp&, const Instruction&, int first, int lane, Entry&) const;
  void set(const Warp&, Offset, Mask, const Entry&);
  void check(Warp&, Offset address, Mask) const;
  void report(Warp&, const Entry&, int lane, uint64_t address) const;

  std::unordered_map<uint64_t, Entry> entries_;  // by depth of the frame and offset
  Mask followed_ = 0;                            // lanes of the instruction that before() has computed already
};

}  // namespace gpuless
