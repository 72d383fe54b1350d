#pragma once
// The list of experts in which a block of a grouped GEMM finds its tiles. Only the device knows how many rows each
// expert has, so that no host waits and a captured launch replays with others: each block makes the list in shared
// memory.
#include <algorithm>

#include "params/gemm.h"

namespace forwardpass {

// At most so many rows of tiles, of all experts, each of `height` rows of the output: a tile's, or those of a cluster's
// blocks, whose tiles lie below each other.
inline int64_t most_tile_rows(const Groups& g, int64_t rows, int height) {
  return g.sorted ? std::min(rows / height + g.experts, rows) : g.experts * ceil_div(g.room, height);
}

// What the list says of an expert beside its rows. All tiles up to it would need 32 bits to count: those beyond the
// whole ones that the rows fill are at most one for each expert, whatever a tile's height.
struct ExpertTiles {
  uint16_t extra : 15;  // tiles of this expert and those before it, minus their rows divided by a tile's
  uint16_t wrong : 1;   // its end or count is wrong: it has no rows, and those that it could have are not known
};

// The list's memory, of up to so many experts; a launch has it for those that there are.
template <int kExperts>
struct ExpertStorage {
  static constexpr int kBytesOfOne = sizeof(int32_t) + sizeof(ExpertTiles);
  static_assert(kExperts < 1 << 15, "as many extra tiles");
  alignas(16) uint8_t bytes[kExperts * kBytesOfOne];
  // Bytes that a launch leaves out.
  static int unused(int experts) { return (kExperts - experts) * kBytesOfOne / 16 * 16; }
};
template <>
struct ExpertStorage<0> {
  static int unused(int) { return 0; }
};

struct ExpertList {
  const Groups& groups;
  const int tile_bits;         // log2 of a tile's rows
  const uint32_t& share_bits;  // log2 of the tiles below each other in a row of tiles
  int32_t* const rows_up_to;   // that this expert and those before it have
  ExpertTiles* const tiles;

  template <class Storage>
  __device__ ExpertList(const Groups& groups, int tile_bits, const uint32_t& share_bits, Storage& storage)
      : groups(groups),
        tile_bits(tile_bits),
        share_bits(share_bits),
        rows_up_to(reinterpret_cast<int32_t*>(storage.bytes)),
        tiles(reinterpret_cast<ExpertTiles*>(rows_up_to + groups.experts)) {}

  // By one warp, of whose lanes each has experts beside each other. rows: of a. ops/common/experts.py defines which
  // ends and counts are wrong, and which rows are unknown then.
  __device__ void make(int rows) const {
    const int lane = threadIdx.x % 32, share = (groups.experts + 31) / 32, first = min(lane * share, groups.experts),
              last = min(first + share, groups.experts);
#pragma unroll 4
    for (int e = lane; e < groups.experts; e += 32) rows_up_to[e] = groups.ends[e];
    __syncwarp();
    if (groups.sorted) {
      keep_right_ends(first, last, rows);
    } else {
      add_up_counts(first, last);
    }
    __syncwarp();
    int count = 0;
    for (int e = first; e < last; ++e) count += tiles_of(e);
    count = of_lanes_before(count);
    for (int e = first; e < last; ++e) tiles[e].extra = (count += tiles_of(e)) - whole_tiles(rows_up_to[e]);
  }

  __device__ int rows_begin(int expert) const {
    return groups.sorted ? rows_before(expert) : expert * static_cast<int>(groups.room);
  }
  // Behind the expert's last row.
  __device__ int rows_end(int expert) const {
    return groups.sorted ? rows_up_to[expert] : rows_begin(expert) + rows_of(expert);
  }
  __device__ int tile_begin(int expert) const { return expert == 0 ? 0 : tile_end(expert - 1); }
  __device__ int tile_end(int expert) const { return whole_tiles(rows_up_to[expert]) + tiles[expert].extra; }
  __device__ int tile_rows() const { return tile_end(groups.experts - 1); }
  // The expert that has this row of tiles.
  __device__ int expert_of(int tile_row) const {
    int expert = 0;
#pragma unroll 1
    for (int step = 1 << (31 - __clz(groups.experts)); step > 0; step /= 2)
      if (expert + step < groups.experts && tile_end(expert + step - 1) <= tile_row) expert += step;
    return expert;
  }
  // All rows of the output before this one are an expert's.
  __device__ int first_unowned() const { return groups.sorted ? rows_up_to[groups.experts - 1] : 0; }
  // Of a row from there on: whether no expert has it.
  __device__ bool unowned(int row) const { return groups.sorted || row >= rows_end(row_expert(row)); }
  // Of such a row: whether that is because an end or a count is wrong.
  __device__ bool unknown(int row) const { return tiles[groups.sorted ? groups.experts - 1 : row_expert(row)].wrong; }

 private:
  // No expert has the rows from the first wrong end on, or from the end before it if that is less.
  __device__ void keep_right_ends(int first, int last, int rows) const {
    int wrong = groups.experts;
    for (int e = last - 1; e >= first; --e)
      if (rows_up_to[e] < rows_before(e) || rows_up_to[e] > rows) wrong = e;
    const unsigned lanes = __ballot_sync(0xffffffff, wrong < groups.experts);
    if (lanes) wrong = __shfl_sync(0xffffffff, wrong, __ffs(lanes) - 1);
    const int known = lanes ? max(min(rows_up_to[wrong], rows_before(wrong)), 0) : rows;
    __syncwarp();
    for (int e = first; e < last; ++e) {
      rows_up_to[e] = e < wrong ? min(rows_up_to[e], known) : known;
      tiles[e] = {0, e >= wrong};
    }
  }
  __device__ void add_up_counts(int first, int last) const {
    const auto is_wrong = [&](int count) { return count < 0 || count > groups.room; };
    int sum = 0;
    for (int e = first; e < last; ++e) sum += is_wrong(rows_up_to[e]) ? 0 : rows_up_to[e];
    sum = of_lanes_before(sum);
    for (int e = first; e < last; ++e) {
      const bool wrong = is_wrong(rows_up_to[e]);
      rows_up_to[e] = sum += wrong ? 0 : rows_up_to[e];
      tiles[e] = {0, wrong};
    }
  }
  __device__ int rows_before(int expert) const { return expert == 0 ? 0 : rows_up_to[expert - 1]; }
  __device__ int rows_of(int expert) const { return rows_up_to[expert] - rows_before(expert); }
  __device__ int tiles_of(int expert) const {
    return whole_tiles(rows_of(expert) + ((1 << tile_bits << share_bits) - 1));
  }
  // Rows of tiles. As one shift its operand would be in a register in all main loops, and spill.
  __device__ int whole_tiles(int rows) const { return rows >> tile_bits >> share_bits; }
  __device__ int row_expert(int row) const { return row / static_cast<int>(groups.room); }
  // The sum of the v of the lanes before.
  __device__ static int of_lanes_before(int v) {
    const int lane = threadIdx.x % 32;
    int sum = v;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int before = __shfl_up_sync(0xffffffff, sum, d);
      if (lane >= d) sum += before;
    }
    return sum - v;
  }
};

}  // namespace forwardpass
