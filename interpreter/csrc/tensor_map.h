#pragma once
// The tensor map that cp.async.bulk.tensor walks: 128 bytes with a layout of our own in place of CUtensorMap's.
#include <algorithm>
#include <cstdint>
#include <string>

namespace gpuless {

struct alignas(64) TensorMap {
  static constexpr uint64_t kMagic = 0x70616d726f736e74;
  static constexpr int kMaxRank = 5;
  static constexpr uint8_t kAtoms32 = 4;  // CU_TENSOR_MAP_SWIZZLE_128B_ATOM_32B

  // im2col (ISA 5.5.4): consecutive pixels of the bounding box, whose corners are relative to those of the tensor's
  // spatial dimensions, the innermost first.
  struct Column {
    uint32_t channels, pixels;
    int16_t lower[kMaxRank - 2], upper[kMaxRank - 2];
  };

  uint64_t magic;
  uint64_t address;
  uint64_t dims[kMaxRank];         // elements, innermost first
  uint64_t strides[kMaxRank - 1];  // bytes, of dimension 1 and up
  union {
    uint32_t box[kMaxRank];  // elements that a box spans
    Column column;           // im2col
  };
  uint16_t steps[kMaxRank];  // of elements within the box (elementStrides); the first is ignored
  // CUtensorMapDataType, Interleave, Swizzle, L2promotion, FloatOOBfill
  uint8_t type, rank, interleave, swizzle, promotion, fill;
  bool im2col;

  // What is wrong with it by the limits of cuTensorMapEncodeTiled or cuTensorMapEncodeIm2col; empty: nothing.
  std::string problem() const;

  uint32_t element_bits() const;
  // Elements of 4 and 6 bits that a load leaves 16 in 16 bytes of shared memory, close together at their beginning.
  bool padded() const;
  uint32_t in_global(uint32_t elements) const { return elements * element_bits() / 8; }  // bytes
  uint32_t box_elements(int dim) const { return dim ? (box[dim] + steps[dim] - 1) / steps[dim] : box[0]; }
  uint32_t swizzle_bytes() const { return swizzle == kAtoms32 ? 128 : 16u << swizzle; }
  uint32_t row_bytes() const { return padded() ? box[0] : in_global(box[0]); }  // in shared memory
  uint32_t box_bytes() const {
    uint32_t bytes = row_bytes();
    if (im2col) return bytes * column.pixels;
    for (int d = 1; d < rank; ++d) bytes *= box_elements(d);
    return bytes;
  }
  uint32_t transaction_bytes() const {
    return box_bytes() / row_bytes() * in_global(box[0]);
  }  // padding does not count
  // Where a byte of the box goes, by the bits of its address in shared memory: the index of a 16-byte chunk is
  // exclusive- ored with the index of the 128-byte line, both within the pattern (ISA 5.5.6). Atoms of 32 bytes move
  // whole, as the operands that tcgen05 takes of such a swizzle do.
  uint32_t swizzled(uint32_t address) const {
    if (swizzle == kAtoms32) return address ^ ((address >> 7 & 3) << 5);
    const uint32_t bits = (1u << swizzle) - 1;  // none, 1, 2, 3 bits for 0, 32, 64 and 128 bytes
    return address ^ ((address >> 7 & bits) << 4);
  }

  // The innermost rows of the box at a coordinate: f(offset within the box, begin and end of the bytes of the row that
  // lie within the tensor, global address of the begin). A row outside has begin == end.
  template <class F>
  void each_row(const int32_t* coordinates, F f) const {
    uint32_t index[kMaxRank] = {}, offset = 0;
    for (;;) {
      int64_t place[kMaxRank];
      for (int d = 1; d < rank; ++d) place[d] = int64_t{coordinates[d]} + int64_t{index[d]} * steps[d];
      row_at(coordinates[0], place, offset, f);
      offset += row_bytes();
      int d = 1;
      while (d < rank && ++index[d] == box_elements(d)) index[d++] = 0;
      if (d >= rank) return;
    }
  }
  // The pixels of a column from a coordinate on, each one's channels a row: through the bounding box by its steps, the
  // innermost dimension first, and from its end to the next image. A pixel is read at so many `offsets` from its place.
  template <class F>
  void each_pixel(const int32_t* coordinates, const uint16_t* offsets, F f) const {
    int64_t place[kMaxRank], moved[kMaxRank];
    for (int d = 1; d < rank; ++d) place[d] = coordinates[d];
    for (uint32_t pixel = 0; pixel < column.pixels; ++pixel) {
      for (int d = 1; d < rank; ++d) moved[d] = place[d] + (d < rank - 1 ? offsets[d - 1] : 0);
      row_at(coordinates[0], moved, pixel * row_bytes(), f);
      int d = 1;
      while (d < rank - 1 && (place[d] += steps[d]) >= static_cast<int64_t>(dims[d]) + column.upper[d - 1]) {
        place[d] = column.lower[d - 1];
        ++d;
      }
      if (d == rank - 1) ++place[d];
    }
  }
  // A row as it arrives in shared memory: `row` holds the tensor's bytes from begin to end; the rest is filled, and the
  // types that say so are rounded or padded.
  void finish_row(uint8_t* row, uint32_t begin, uint32_t end) const;

 private:
  // The row at an innermost coordinate and those of the other dimensions.
  template <class F>
  void row_at(int32_t innermost, const int64_t* place, uint32_t offset, F f) const {
    const int64_t width = box[0], extent = static_cast<int64_t>(dims[0]);
    const int64_t first = std::clamp<int64_t>(-int64_t{innermost}, 0, width);
    const int64_t last = std::clamp<int64_t>(extent - innermost, first, width);
    bool inside = first < last;
    uint64_t row = address + static_cast<uint64_t>((innermost + first) * element_bits() / 8);
    for (int d = 1; d < rank; ++d) {
      inside = inside && place[d] >= 0 && place[d] < static_cast<int64_t>(dims[d]);
      row += static_cast<uint64_t>(place[d]) * strides[d - 1];
    }
    const auto at_edge = [&](int64_t n) { return inside ? in_global(static_cast<uint32_t>(n)) : 0; };
    f(offset, at_edge(first), at_edge(last), row);
  }
};
static_assert(sizeof(TensorMap) == 128, "a CUtensorMap has 128 bytes");

struct Warp;
// The map at a generic address, as an instruction for tensors of a rank needs it, in its mode: a Finding for anything
// else.
TensorMap read_tensor_map(Warp&, uint64_t address, int rank, bool im2col, int lane);
// What more there is to ask where its elements have 4 or 6 bits.
void check_narrow(Warp&, const TensorMap&, int32_t innermost, bool store, int lane);

}  // namespace gpuless
