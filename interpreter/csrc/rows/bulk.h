#pragma once
// What an instruction for a bulk copy says, as bulk_rows.cpp reads it, and what bulk.cpp makes of it.
#include <string_view>

#include "async.h"
#include "reductions.h"

namespace gpuless {

enum class Direction : uint8_t {
  load,        // global to shared memory, of one CTA or several
  store,       // shared to global memory
  distribute,  // shared memory to that of another CTA
  prefetch,
};

struct BulkForm {
  Direction direction = Direction::load;
  bool tensor = false;
  int rank = 0, coordinates = 0;       // coordinates: operand of the first
  int boxes = 1;                       // of a tensor
  int offsets = -1;                    // operand of the first: im2col mode, a pixel's
  Place shared, global, mbarrier, to;  // global: the tensor map's, of a tensor; to: where it is distributed to
  int size = 0;                        // operand, of one that is not a tensor's
  int mask = -1;                       // operand: the CTAs of a multicast
  bool pair = false;                   // .cta_group::2: the mbarrier may be that of the other CTA of the pair
  Reduce reduce = nullptr;
  std::string_view operation;  // of a tensor's reduction, whose type is the map's
};

// What an instruction names: a box's corner, or a column and the rows of several boxes.
inline int coordinates_of(const BulkForm& form) { return form.rank + form.boxes - 1; }

Step bulk_transfer(Warp&, const Instruction&, Mask);
Step bulk_commit_group(Warp&, const Instruction&, Mask);
// read: for what its stores read alone, not until they are complete.
template <bool read>
Step bulk_wait_group(Warp&, const Instruction&, Mask);

// A tensor map in global memory is about to change: no copy that is under way may still read it.
void check_map_unused(const Warp&, uint64_t map, int lane);

}  // namespace gpuless
