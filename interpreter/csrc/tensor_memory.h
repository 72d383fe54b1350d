#pragma once
// Tensor memory (PTX ISA 9.7.16.1): 128 lanes by 512 columns of 32 bits in each CTA, what of it is allocated, and the
// shadow of its cells.
//
// Cells lie as multiply() has its accumulators (matrix.h), by 16 lanes and 8 columns, so that a product whose columns
// begin at a multiple of 8 is added in place.
//
// To the shadow a cell is a byte: the 16 lanes of a column are a granule, those of the columns after it the next ones.
#include <cstdint>
#include <string>
#include <vector>

#include "shadow.h"

namespace gpuless {

struct Warp;

struct TensorAddress {  // as instructions have it: the lane in the upper half, the column in the lower
  explicit TensorAddress(uint32_t bits) : lane(bits >> 16), column(bits & 0xffff) {}
  uint32_t lane, column;
};

class TensorMemory {
 public:
  static constexpr uint32_t kRows = 128, kColumns = 512, kGroup = 16;  // kRows: the ISA's lanes; kGroup of them

  TensorMemory() : cells_(kRows * kColumns), blocks_(kColumns) {}
  void begin(const Cta&);  // for a CTA that has none yet
  void forget() { shadow_.forget(); }

  uint32_t& cell(uint32_t lane, uint32_t column) { return cells_[index_of(lane, column)]; }
  // The accumulators of 16 lanes, from a column on that is a multiple of 8.
  uint32_t* tiles(uint32_t lane, uint32_t column) { return &cells_[index_of(lane, column)]; }

  // Allocated are columns, for all lanes. allocate: the first one, or -1 where there is no room.
  int allocate(uint32_t columns, const Code* by, uint32_t pc);
  void release(uint32_t first, uint32_t columns);  // throws a Finding where that is no allocation
  // A Finding where the columns are not allocated, or not all of them by one instruction.
  void require(uint32_t first, uint32_t columns, const char* what) const;
  void require_free(const Cta&) const;  // a Finding where something is left, at the instruction that allocated it

  // The accesses of an actor to the cells of `lanes` lanes, a multiple of 16, by `columns` columns.
  void access(const Actor&, uint32_t lane, uint32_t lanes, uint32_t column, uint32_t columns, Use);
  // Products write, and `accumulates`: read what is there, which then must have been written.
  void write(const Actor&, uint32_t lane, uint32_t lanes, uint32_t column, uint32_t columns, bool accumulates);
  void forget(uint32_t column, uint32_t columns);  // nothing is written there any more

  bool may_allocate = true;  // no relinquish_alloc_permit so far
  uint64_t pair_turns = 0;   // of its allocations and releases that a pair of CTAs makes together
  Knowledge released;        // what was known to those who released columns

 private:
  static uint32_t index_of(uint32_t lane, uint32_t column) {
    const uint32_t block = lane / kGroup * kColumns / 8 + column / 8, row = lane % kGroup;
    return block * 128 + (row / 8 * 2 + column % 2) * 32 + row % 8 * 4 + column % 8 / 2;
  }
  std::vector<uint32_t> cells_;
  struct Block {
    const Code* by = nullptr;  // that allocated the column, and where
    uint32_t pc = 0, first = 0, columns = 0;
  };
  std::vector<Block> blocks_;  // by column
  Shadow shadow_;
};

// The CTA's, from its first allocation on; a Finding where there was none.
TensorMemory& tensor_memory(Cta&);
// The last thread has exited: a Finding where something is still allocated.
void check_tensor_memory_at_end(const Cta&);

}  // namespace gpuless
