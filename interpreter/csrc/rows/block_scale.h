#pragma once
// Elements of 4 and 6 bits, and products with scales of blocks along K: what mma and tcgen05.mma share
// (ISA 9.7.14.5.14, 9.7.16.10). All such elements are numbers of e4m3 too, and become those.
#include <string_view>

#include "matrix.h"

namespace gpuless {

enum class Narrow : uint8_t { none, e2m1, e2m3, e3m2 };  // none: bytes
Narrow narrow_of(std::string_view name);

// How the elements of a row lie in its 16 bytes.
enum class Packing : uint8_t {
  bytes,   // one a byte, e2m1 in its bits 2 to 5: registers of mma
  padded,  // 16 close together, then nothing: shared memory, as TMA unpacks them
  close,   // 32 of 4 bits
};
// A fragment of narrow elements as one of e4m3, or two of Packing::close.
void widen(Narrow, Packing, Fragment from, uint32_t (*to)[32]);

enum class ScaleType : uint8_t { ue8m0, ue4m3 };
float scale_of(ScaleType, uint32_t byte);

// sums += (A B) times the scales of rows and of columns: one block along K, 16 rows by `tiles` tiles, fp32.
void multiply_scaled(const Product&, const PanelA&, const PanelB&, int tiles, const float rows[16],
                     const float* columns, uint32_t* sums);

}  // namespace gpuless
