#include "tensor_memory.h"

#include <algorithm>

#include "machine.h"

namespace gpuless {

void TensorMemory::begin(const Cta& cta) {
  shadow_.reset(cta, kRows * kColumns, Shadow::Space::tensor);
  std::fill(blocks_.begin(), blocks_.end(), Block());
  std::fill(cells_.begin(), cells_.end(), 0xffffffff);  // NaN, -1
  may_allocate = true;
  pair_turns = 0;
  released = Knowledge();
}

int TensorMemory::allocate(uint32_t columns, const Code* by, uint32_t pc) {
  for (uint32_t first = 0; first + columns <= kColumns; first += columns) {
    const auto begin = blocks_.begin() + first;
    if (std::any_of(begin, begin + columns, [](const Block& b) { return b.by; })) continue;
    std::fill_n(begin, columns, Block{by, pc, first, columns});
    return static_cast<int>(first);
  }
  return -1;
}

void TensorMemory::release(uint32_t first, uint32_t columns) {
  const Block block = first < kColumns ? blocks_[first] : Block();
  if (!block.by || block.first != first || block.columns != columns) {
    throw finding_at(
        Kind::illegal,
        "tcgen05.dealloc of " + std::to_string(columns) + " columns from " + std::to_string(first) + " on: " +
            (block.by
                 ? "allocated are " + std::to_string(block.columns) + " from " + std::to_string(block.first) + " on"
                 : "nothing is allocated there"),
        first);
  }
  std::fill_n(blocks_.begin() + first, columns, Block());
}

void TensorMemory::require(uint32_t first, uint32_t columns, const char* what) const {
  const Block block = first < kColumns ? blocks_[first] : Block();
  if (block.by && first + columns <= block.first + block.columns) return;
  throw finding_at(Kind::out_of_bounds,
                   std::string(what) + " has columns " + std::to_string(first) + " to " +
                       std::to_string(first + columns - 1) + " of tensor memory, " +
                       (block.by ? "beyond its allocation of columns " + std::to_string(block.first) + " to " +
                                       std::to_string(block.first + block.columns - 1)
                                 : "which are not allocated"),
                   first);
}

void TensorMemory::require_free(const Cta& cta) const {
  const auto left = std::find_if(blocks_.begin(), blocks_.end(), [](const Block& b) { return b.by; });
  if (left == blocks_.end()) return;
  Finding f = finding_at(Kind::illegal,
                         "the block ends with these " + std::to_string(left->columns) +
                             " columns of tensor memory still allocated: tcgen05.dealloc must free them",
                         left->first);
  cta.place(f, *left->by, left->pc);
  throw f;
}

void TensorMemory::access(const Actor& actor, uint32_t lane, uint32_t lanes, uint32_t column, uint32_t columns,
                          Use use) {
  for (uint32_t group = lane / kGroup; group < (lane + lanes) / kGroup; ++group) {
    shadow_.access(actor, (group * kColumns + column) * kGroup, columns * kGroup, use);
  }
}

void TensorMemory::write(const Actor& actor, uint32_t lane, uint32_t lanes, uint32_t column, uint32_t columns,
                         bool accumulates) {
  for (uint32_t group = lane / kGroup; accumulates && group < (lane + lanes) / kGroup; ++group) {
    if (!shadow_.written((group * kColumns + column) * kGroup, columns * kGroup)) {
      access(actor, lane, lanes, column, columns, Use::read);
    }
  }
  access(actor, lane, lanes, column, columns, Use::write);
}

void TensorMemory::forget(uint32_t column, uint32_t columns) {
  for (uint32_t group = 0; group < kRows / kGroup; ++group) {
    shadow_.store_undefined((group * kColumns + column) * kGroup, columns * kGroup);
  }
}

TensorMemory& tensor_memory(Cta& cta) {
  if (!cta.has_tensor_memory) {
    throw finding_at(Kind::out_of_bounds, "tensor memory is accessed with none allocated: tcgen05.alloc comes first",
                     0);
  }
  return *cta.tensor_memory;
}

void check_tensor_memory_at_end(const Cta& cta) {
  if (cta.has_tensor_memory && cta.launch->options.checks) cta.tensor_memory->require_free(cta);
}

}  // namespace gpuless
