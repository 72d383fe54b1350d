#pragma once
// The products inside mma and wgmma: D = A B + C, 16 rows of A and up to 256 columns of B at a time.
//
// A fragment is one 32-bit register of a warp seen as a matrix: 8 rows of 16 bytes, lane l holding dword l % 4 of row
// l / 4. Registers of A and B (whose "rows" are columns of B) are fragments (ISA 9.7.14.5, 9.7.15.5.1), ldmatrix loads
// them, and what a wgmma descriptor points at is gathered into them. The accumulators stay as D's registers have them:
// tile by tile of 8 columns, lane l holding row l / 4 and columns 2 (l % 4), 2 (l % 4) + 1. So nothing is ever
// rearranged but A and B, once, into panels: A's elements repeated for the four lanes of a row, B's for a step of K as
// the even and the odd columns of a tile, which are broadcast.
//
// fp32 accumulation is one fused multiply-add per element, in the order of K; f16 accumulators are kept in fp32 within
// an instruction and rounded once at its end. Hardware sums groups of products in its own order and truncates: only the
// truncating accumulator below claims its bits.
#include <cstdint>

namespace gpuless {

struct Cta;

enum class Element : uint8_t { f16, bf16, tf32, e4m3, e5m2, s8, u8 };
enum class Accumulate : uint8_t { f32, f16, s32 };

// How tensor cores add fp8 products (Xie et al., MMA-Sim, arXiv 2511.10909): the products of a group of K and the
// accumulator are aligned to the largest exponent among them, cut towards zero after `fraction` bits, and added
// exactly; the sum is cut to `mantissa` bits (f16 accumulators: rounded to nearest).
struct Truncation {
  int group = 0;  // elements of K; 0: not truncating
  int fraction = 0, mantissa = 0;
};

struct Product {
  Element a, b;
  Accumulate d;
  int halves;             // of 16 bytes each along K: one or two
  bool negate = false;    // A B is subtracted
  bool saturate = false;  // s32: .satfinite
  Truncation truncation;
};

using Fragment = const uint32_t*;
// Of a fragment's 8 x 8 elements of 16 bits; `to` may be `from`.
void transpose(Fragment from, uint32_t to[32]);

constexpr int kMaxTiles = 32, kMaxSteps = 32;

// A step is what one vector instruction multiplies: an element of K, or four (VNNI) or two (AVX2) 8-bit integers.
struct alignas(64) PanelA {
  uint32_t words[kMaxSteps][64];  // [step][row][4 times]
  int32_t bias[64];               // to be added to every column: corrects the offset of signed operands under VNNI
};
struct alignas(64) PanelB {
  uint32_t words[kMaxTiles * kMaxSteps * 8];  // [tile][step][columns 0 2 4 6 1 3 5 7]
  int32_t bias[kMaxTiles][8];
};

// fragments[half][rows 0-7, rows 8-15]: the order of mma's registers.
void expand_a(const Product&, const Fragment* fragments, PanelA&);
// fragments[tile][half]
void expand_b(const Product&, const Fragment* fragments, int tiles, PanelB&);
// Accumulators: the 32-bit registers of D one after the other, 32 lanes each.
void multiply(const Product&, const PanelA&, const PanelB&, int tiles, uint32_t* accumulators);
// All of it for one tile: D's registers `to`, of C's `from`, which they may be.
void multiply_tile(const Product&, const Fragment* a, const Fragment* b, const Fragment* from, uint32_t* const* to);

// What the time stamp counter counts, in nanoseconds.
uint64_t nanoseconds(uint64_t ticks);

// Counts the time of its scope and the multiply-accumulates done in it, if the launch is counted. Of `small` products
// it times one in kSample, for all: to read the time takes as long as one of them.
class MatrixTimer {
 public:
  MatrixTimer(Cta& cta, uint64_t macs, bool small = false);
  ~MatrixTimer();
  MatrixTimer(const MatrixTimer&) = delete;
  MatrixTimer& operator=(const MatrixTimer&) = delete;

 private:
  static constexpr uint32_t kSample = 61;  // a prime, as products come in loops
  Cta& cta_;
  uint64_t begin_ = 0;
  uint32_t weight_ = 1;
};

}  // namespace gpuless
