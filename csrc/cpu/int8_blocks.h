#pragma once
// The int8 product of one block of rows at a time, for kernels that go on with them.
#include <vector>

#include "cpu/int8_kernel.h"

namespace forwardpass::cpu {

// What a weight that is packed on a call is in. Given again, its memory is used again: of 10 MB in new memory the
// faults took 6 ms, packing 1.3 ms.
struct WeightMemory {
  CacheLines lines;
  int64_t bytes = 0;
  std::vector<ExcessPair> excess;
};

// The weight as blocks of rows read it: w's packed bytes where int8_product would use them, else b packed anew into
// `memory`, by all threads.
PackedWeight weight_for_blocks(const Int8Kernel& kernel, const Int8Weight& w, WeightMemory& memory);

// Up to kBlockRows rows of a, quantised and then prepared by prepare_block, and where their sums go: room for 32 rows
// of `chunk_columns`, a multiple of kColumnStep.
struct Int8Block {
  const uint8_t* rows;
  int64_t stride, count;
  const uint8_t* scratch;
  int32_t* sums;
  int64_t chunk_columns;
};

// Columns from `first` to `end`, multiples of kColumnStep, of a block's product with b, of which n columns count, and
// their epilogue, which is that of the block's first row.
void multiply_block(const Int8Kernel& kernel, const Int8Block& block, int64_t n, const PackedWeight& b, int64_t first,
                    int64_t end, const Epilogue& epilogue);

// The stride of such rows: no power of two, as 16 rows would then share a set of L1.
inline int64_t stride_of_block(int64_t depth) { return depth + kTileBytes; }

}  // namespace forwardpass::cpu
