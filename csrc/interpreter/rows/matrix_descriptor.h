#pragma once
// The matrix descriptors of wgmma, PTX ISA 9.7.15.5.1.2: where a matrix lies in shared memory, and how.
#include "interpreter/matrix.h"
#include "interpreter/shadow.h"

namespace forwardpass::interpreter {

struct Cta;

struct MatrixDescriptor {
  uint32_t start, leading, stride;  // bytes
  uint32_t base_offset;             // in rows of 128 bytes
  int chunks;                       // of 16 bytes in a row of the swizzle: 1 (none), 2, 4, 8

  explicit MatrixDescriptor(uint64_t bits);
};
// What is wrong with the bits, or null.
const char* illegal_descriptor(uint64_t bits);

// Copies tiles [first, first + count) of 8 rows along M or N by 32 bytes along K into fragments [tile][half], reading
// as `actor` does. transposed: M- or N-major, of 16-bit elements; else K-major.
void gather(Cta&, const MatrixDescriptor&, bool transposed, int first, int count, const Actor& actor,
            uint32_t (*fragments)[2][32]);

}  // namespace forwardpass::interpreter
