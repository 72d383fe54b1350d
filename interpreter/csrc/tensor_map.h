#pragma once
// The tensor map that cp.async.bulk.tensor walks: 128 bytes with a layout of our own in place of CUtensorMap's.
#include <algorithm>
#include <cstdint>
#include <string>

namespace gpuless {

struct alignas(64) TensorMap {
  static constexpr uint64_t kMagic = 0x70616d726f736e74;
  static constexpr int kMaxRank = 5;

  uint64_t magic;
  uint64_t address;
  uint64_t dims[kMaxRank];         // elements, innermost first
  uint64_t strides[kMaxRank - 1];  // bytes, of dimension 1 and up
  uint32_t box[kMaxRank];          // elements that a box spans
  uint16_t steps[kMaxRank];        // of elements within the box (elementStrides); the first is ignored
  // CUtensorMapDataType, Interleave, Swizzle, L2promotion, FloatOOBfill
  uint8_t type, rank, interleave, swizzle, promotion, fill;

  // What is wrong with it by the limits of cuTensorMapEncodeTiled; empty: nothing.
  std::string problem() const;

  uint32_t element_bits() const;
  // Elements of 4 and 6 bits that a load leaves 16 in 16 bytes of shared memory, close together at their beginning.
  bool padded() const;
  uint32_t in_global(uint32_t elements) const { return elements * element_bits() / 8; }  // bytes
  uint32_t box_elements(int dim) const { return dim ? (box[dim] + steps[dim] - 1) / steps[dim] : box[0]; }
  uint32_t row_bytes() const { return padded() ? box[0] : in_global(box[0]); }  // in shared memory
  uint32_t box_bytes() const {
    uint32_t bytes = row_bytes();
    for (int d = 1; d < rank; ++d) bytes *= box_elements(d);
    return bytes;
  }
  uint32_t transaction_bytes() const {
    return box_bytes() / row_bytes() * in_global(box[0]);
  }  // padding does not count
  // Where a byte of the box goes, by the bits of its address in shared memory: the index of a 16-byte chunk is
  // exclusive- ored with the index of the 128-byte line, both within the pattern (ISA 5.5.6).
  uint32_t swizzled(uint32_t address) const {
    const uint32_t bits = (1u << swizzle) - 1;  // none, 1, 2, 3 bits for 0, 32, 64 and 128 bytes
    return address ^ ((address >> 7 & bits) << 4);
  }

  // The innermost rows of the box at a coordinate: f(offset within the box, begin and end of the bytes of the row that
  // lie within the tensor, global address of the begin). A row outside has begin == end.
  template <class F>
  void each_row(const int32_t* coordinates, F f) const {
    const uint32_t bytes = row_bytes();
    const int64_t width = box[0], extent = static_cast<int64_t>(dims[0]);
    const int64_t first = std::clamp<int64_t>(-int64_t{coordinates[0]}, 0, width);
    const int64_t last = std::clamp<int64_t>(extent - coordinates[0], first, width);
    uint32_t index[kMaxRank] = {}, offset = 0;
    for (;;) {
      bool inside = first < last;
      uint64_t row = address + static_cast<uint64_t>((coordinates[0] + first) * element_bits() / 8);
      for (int d = 1; d < rank; ++d) {
        const int64_t c = int64_t{coordinates[d]} + int64_t{index[d]} * steps[d];
        inside = inside && c >= 0 && c < static_cast<int64_t>(dims[d]);
        row += static_cast<uint64_t>(c) * strides[d - 1];
      }
      const auto at_edge = [&](int64_t n) { return inside ? in_global(static_cast<uint32_t>(n)) : 0; };
      f(offset, at_edge(first), at_edge(last), row);
      offset += bytes;
      int d = 1;
      while (d < rank && ++index[d] == box_elements(d)) index[d++] = 0;
      if (d >= rank) return;
    }
  }
  // A row as it arrives in shared memory: `row` holds the tensor's bytes from begin to end; the rest is filled, and the
  // types that say so are rounded or padded.
  void finish_row(uint8_t* row, uint32_t begin, uint32_t end) const;
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap has 128 bytes");

struct Warp;
// The map at a generic address, as an instruction for tensors of a rank needs it: a Finding for anything else.
TensorMap read_tensor_map(Warp&, uint64_t address, int rank, int lane);
// What more there is to ask where its elements have 4 or 6 bits.
void check_narrow(Warp&, const TensorMap&, int32_t innermost, bool store, int lane);

}  // namespace gpuless
