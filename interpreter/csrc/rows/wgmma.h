#pragma once
// Warpgroup-level matrix products while they are under way, PTX ISA 9.7.15.
//
// Four warps issue one operation: the n-th wgmma.mma_async of each is the same operation, which can complete once all
// four have issued it, and in order. Until a warp has waited for it, the registers of D and of A in registers are in
// flight there: what D will be lives in an Accumulator, the registers themselves hold poison.
#include <deque>
#include <memory>
#include <vector>

#include "machine.h"
#include "matrix.h"
#include "rows/matrix_descriptor.h"

namespace gpuless {

// A decoded instruction. Instruction::option is 0, or 1 + the instruction that accesses one of its registers without a
// wgmma.fence in between (or 1 + the number of instructions, if there is no fence at all); the immediate is the
// operand.
struct WgmmaShape {
  Product exact, truncating;
  int n, k, d_registers;
  bool a_in_registers, a_transposed, b_transposed;
  bool scale_d_negated;
  const Statement* statement;  // for findings
};

bool same_shape(const WgmmaShape&, const WgmmaShape&);  // may follow each other on the same accumulators
bool is_wgmma_fence(const Instruction&);
// A finding where find_missing_wgmma_fences found one missing.
void require_wgmma_fence(const Warp&, const Instruction&);

// Completes what the warpgroup has issued up to an operation; false: not all of its warps have issued it yet.
bool complete_until(Warp&, uint64_t operation);

std::string place_of(const Warp&, const WgmmaShape&);  // "wgmma.mma_async... of file.cu:12"

// What the registers of D of one warp will hold. Later operations change it in place unless a moved register still
// stands for the earlier value.
struct Accumulator {
  explicit Accumulator(const WgmmaShape& shape);
  const WgmmaShape* shape;
  const Offset* registers = nullptr;  // those of D that stand for it
  bool moved = false;                 // not these alone, or not all of these any more
  uint64_t last = 0;                  // number of the operation that makes it final
  int references = 0;                 // registers of the warp that stand for it
  uint32_t* values;                   // [register][lane]

 private:
  std::unique_ptr<uint32_t[]> storage_;
};

// The registers of one warp that are in flight.
class RegistersInFlight {
 public:
  struct Entry {
    Offset offset;
    Accumulator* value;        // null: a register of A, which keeps its value
    int index;                 // within the accumulator
    bool alias;                // by a mov: no operation writes this register itself
    uint64_t last;             // of A: number of the last operation that reads it
    const WgmmaShape* reader;  // of A
  };
  bool empty() const { return entries_.empty(); }
  const Entry* find(Offset o) const {
    const uint32_t n = o / 64 < where_.size() ? where_[o / 64] : 0;
    return n ? &entries_[n - 1] : nullptr;
  }
  void reads(Offset, uint64_t operation, const WgmmaShape*);     // as A
  void stands_for(Offset, Accumulator*, int index, bool alias);  // replaces what it stood for
  std::shared_ptr<Accumulator> make(const WgmmaShape&, const Offset* registers);
  std::shared_ptr<Accumulator> share(const Accumulator*) const;
  void drop(Offset);
  // Fills in the registers whose last operation is this one or an earlier one. They are then no longer in flight.
  void land(uint64_t operation, uint8_t* registers);

 private:
  Entry& entry(Offset);
  void release(Accumulator*);
  std::vector<Entry> entries_;
  std::vector<uint16_t> where_;  // by offset / 64: 1 + position in entries_, 0: not in flight
  std::vector<std::shared_ptr<Accumulator>> values_;
};

struct Warpgroup;

struct WgmmaOperation final : Pending {
  WgmmaOperation() {}                       // not the compiler's, before which make_shared would fill 17 KB with zeros
  struct Part {                             // of one warp: 16 rows of D
    std::shared_ptr<Accumulator> from, to;  // null from: zeros
    Knowledge knowledge;
    alignas(64) uint32_t a[4][kLanes];  // its fragments, if A is in registers
  } part[4];
  const WgmmaShape* shape = nullptr;
  uint64_t number = 0;
  uint64_t a_descriptor = 0, b_descriptor = 0;
  bool scale_d = false;
  unsigned issued = 0;  // warps, one bit each
  Warpgroup* group = nullptr;
  Clock now = 0;  // of its reads of shared memory, in the warpgroup's series

  bool ready(Cta&) const override;
  void complete(Cta&) override;
};

struct Warpgroup {
  int first_warp;
  uint64_t completed = 0;                               // operations are numbered from 1
  std::deque<std::shared_ptr<WgmmaOperation>> pending;  // operation completed + 1 first
  int series = -1;                                      // they complete in order
};

// One instruction while registers are in flight: deferred when it is a plain mov of one. To touch one otherwise is a
// finding; where a read goes on behind it, it waits for the value, as it does on hardware.
Step run_in_flight(Warp&, const Instruction&, Mask);

struct Wgmma {  // of one warp
  std::shared_ptr<Warpgroup> group;
  RegistersInFlight flight;
  Frame* frame = nullptr;  // whose registers are in flight
  uint64_t issued = 0;
  Clock now = 0;    // of the operation issued last
  struct Group {    // wgmma-group: committed and not waited for
    uint64_t last;  // operation
    Clock now;
  };
  std::deque<Group> groups;
};

}  // namespace gpuless
