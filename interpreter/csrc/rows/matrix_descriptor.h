#pragma once
// The matrix descriptors of wgmma and tcgen05, PTX ISA 9.7.15.5.1.2 and 9.7.16.4.1: where a matrix lies in shared
// memory, and how. Those of tcgen05 have a version beside, and one more swizzle.
#include "matrix.h"
#include "shadow.h"

namespace gpuless {

struct Cta;

struct MatrixDescriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t base_offset;             // in rows of 128 bytes
  int chunks;                       // of 16 bytes in a row of the swizzle: 1 (none), 2, 4, 8
  bool pairs = false;               // the swizzle of 128 bytes moves 32 at a time, of 4 rows (tcgen05)
  uint32_t used = 16;               // of 16 bytes: what is behind elements of 4 and 6 bits nobody need have written

  explicit MatrixDescriptor(uint64_t bits);
};
// What is wrong with the bits, or null.
const char* illegal_descriptor(uint64_t bits, bool tcgen05 = false);

// Copies tiles [first, first + count) of 8 rows along M or N by 32 bytes along K into fragments [tile][half], reading
// as `actor` does, or by the first 16. transposed: M- or N-major, of elements of so many bytes; else K-major.
void gather(Cta&, const MatrixDescriptor&, bool transposed, int first, int count, const Actor& actor,
            uint32_t (*fragments)[2][32], uint32_t element = 2, uint32_t halves = 2);

}  // namespace gpuless
