#include "matrix.h"

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "machine.h"
#include "truncating.h"

namespace gpuless {
namespace {

constexpr int kFloatElements = 5;  // those of Element that are floating point come first
static_assert(static_cast<int>(Element::s8) == kFloatElements);

struct Kernels {
  void (*expand_a[kFloatElements])(Fragment const*, int halves, bool negate, PanelA&);
  void (*expand_b[kFloatElements])(Fragment const*, int halves, int tiles, PanelB&);
  void (*expand_integer_a)(Fragment const*, int halves, bool a_signed, bool b_signed, PanelA&);
  void (*expand_integer_b)(Fragment const*, int halves, int tiles, bool a_signed, bool b_signed, PanelB&);
  void (*multiply_tile[kFloatElements])(Fragment const* a, const PanelB&, int halves, Fragment const* from,
                                        uint32_t* const* to);
  void (*multiply_floats)(const PanelA&, const PanelB&, int steps, int tiles, uint32_t*);
  void (*multiply_integers)(const PanelA&, const PanelB&, int steps, int tiles, uint32_t*);
  void (*unpack_halves)(const uint32_t*, int registers, uint32_t*);
  void (*pack_halves)(const uint32_t*, int registers, uint32_t*);
  int integer_planes;
};

namespace avx2 {

constexpr int kLanesOfVector = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
using Eight = Integers;

inline Integers load(const uint32_t* p) {
  Integers v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(uint32_t* p, Integers v) { std::memcpy(p, &v, sizeof v); }
template <int n>
inline Integers shift_right(Integers x) {
  return (Integers)_mm256_srli_epi32((__m256i)x, n);
}
template <int c>
inline Integers splat(Integers x) {
  return (Integers)_mm256_shuffle_epi32((__m256i)x, c * 0x55);
}
inline Integers broadcast(const uint32_t* p) {
  return (Integers)_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Floats from_half(Integers x) {
  const __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
  return (Floats)_mm256_cvtph_ps(_mm_packus_epi32(low, high));
}
inline Integers to_half(Floats x) {
  return (Integers)_mm256_cvtepu16_epi32(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}

// Pairs of 16-bit products: exact for 8-bit factors of any sign.
constexpr bool kOffset = false;
constexpr int kIntegerPlanes = 2;
inline Integers dot(Integers sum, Integers a, Integers b) {
  return sum + (Integers)_mm256_madd_epi16((__m256i)a, (__m256i)b);
}
template <bool kIsA>
inline Integers integer_plane(Integers x, int p, bool is_signed) {
  const __m256i low = p ? (__m256i)x : _mm256_slli_epi16((__m256i)x, 8);
  return (Integers)(is_signed ? _mm256_srai_epi16(low, 8) : _mm256_srli_epi16(low, 8));
}
inline Eight dot_eight(Eight sum, const uint32_t*) { return sum; }
inline void store_eight(int32_t* p, Eight v) { std::memcpy(p, &v, sizeof v); }

// The fragment's rows are columns n of B; lane pairs n and n + 1 share a vector, so that transposing within its halves
// separates the even ones from the odd ones.
inline void spread_columns(const Integers y[4], uint32_t* to, int stride) {
  const __m256i a = _mm256_unpacklo_epi32((__m256i)y[0], (__m256i)y[1]);
  const __m256i b = _mm256_unpackhi_epi32((__m256i)y[0], (__m256i)y[1]);
  const __m256i c = _mm256_unpacklo_epi32((__m256i)y[2], (__m256i)y[3]);
  const __m256i d = _mm256_unpackhi_epi32((__m256i)y[2], (__m256i)y[3]);
  store(to, (Integers)_mm256_unpacklo_epi64(a, c));
  store(to + stride, (Integers)_mm256_unpackhi_epi64(a, c));
  store(to + 2 * stride, (Integers)_mm256_unpacklo_epi64(b, d));
  store(to + 3 * stride, (Integers)_mm256_unpackhi_epi64(b, d));
}

#include "matrix_kernels.h"

}  // namespace avx2

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

namespace avx512 {

constexpr int kLanesOfVector = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef int32_t Eight __attribute__((vector_size(32)));

inline Integers load(const uint32_t* p) { return (Integers)_mm512_loadu_si512(p); }
inline void store(uint32_t* p, Integers v) { _mm512_storeu_si512(p, (__m512i)v); }
template <int n>
inline Integers shift_right(Integers x) {
  return (Integers)_mm512_srli_epi32((__m512i)x, n);
}
template <int c>
inline Integers splat(Integers x) {
  return (Integers)_mm512_shuffle_epi32((__m512i)x, static_cast<_MM_PERM_ENUM>(c * 0x55));
}
inline Integers broadcast(const uint32_t* p) {
  return (Integers)_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Floats from_half(Integers x) { return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)x)); }
inline Integers to_half(Floats x) {
  return (Integers)_mm512_cvtepu16_epi32(_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}

// VNNI: four products of an unsigned and a signed byte.
constexpr bool kOffset = true;
constexpr int kIntegerPlanes = 1;
inline Integers dot(Integers sum, Integers a, Integers b) {
  return (Integers)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
}
template <bool kIsA>
inline Integers integer_plane(Integers x, int, bool is_signed) {
  return is_signed == kIsA ? x ^ static_cast<int32_t>(0x80808080) : x;
}
inline Eight dot_eight(Eight sum, const uint32_t* p) {  // 128 times the sum of the bytes
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Eight)_mm256_dpbusd_epi32((__m256i)sum, _mm256_set1_epi8(static_cast<char>(0x80)), bytes);
}
inline void store_eight(int32_t* p, Eight v) { std::memcpy(p, &v, sizeof v); }

inline void spread_columns(const Integers y[2], uint32_t* to, int stride) {
  const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28, 1, 9, 17, 25, 5, 13, 21, 29);
  for (int c = 0; c < 4; c += 2) {
    const __m512i two = _mm512_permutex2var_epi32((__m512i)y[0], first + _mm512_set1_epi32(c), (__m512i)y[1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c * stride), _mm512_castsi512_si256(two));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (c + 1) * stride), _mm512_extracti64x4_epi64(two, 1));
  }
}

#include "matrix_kernels.h"

}  // namespace avx512

#pragma GCC pop_options

// GPULESS_ISA=avx2 takes the narrow kernels on any processor, for comparing the two.
const Kernels& choose() {
  const char* isa = std::getenv("GPULESS_ISA");
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  return wide && !(isa && std::strcmp(isa, "avx2") == 0) ? avx512::kernels : avx2::kernels;
}
const Kernels& host_kernels = choose();

bool is_float(Element e) { return static_cast<int>(e) < kFloatElements; }

int steps_of(const Product& p) {
  return p.halves * 4 * (is_float(p.a) ? avx2::planes_of(p.a) : host_kernels.integer_planes);
}

}  // namespace

void transpose(Fragment from, uint32_t to[32]) {
  __m128i a[8], b[8];
  std::memcpy(a, from, sizeof a);
  for (int pass = 0; pass < 3; ++pass) {  // a perfect shuffle of the 64 elements each: three turn rows into columns
    for (int r = 0; r < 4; ++r) {
      b[2 * r] = _mm_unpacklo_epi16(a[r], a[r + 4]);
      b[2 * r + 1] = _mm_unpackhi_epi16(a[r], a[r + 4]);
    }
    std::memcpy(a, b, sizeof a);
  }
  std::memcpy(to, a, sizeof a);
}

void expand_a(const Product& p, const Fragment* fragments, PanelA& panel) {
  if (p.truncation.group) return truncating_expand_a(p, fragments, panel);
  if (is_float(p.a)) return host_kernels.expand_a[static_cast<int>(p.a)](fragments, p.halves, p.negate, panel);
  host_kernels.expand_integer_a(fragments, p.halves, p.a == Element::s8, p.b == Element::s8, panel);
}

void expand_b(const Product& p, const Fragment* fragments, int tiles, PanelB& panel) {
  if (p.truncation.group) return truncating_expand_b(p, fragments, tiles, panel);
  if (is_float(p.b)) return host_kernels.expand_b[static_cast<int>(p.b)](fragments, p.halves, tiles, panel);
  host_kernels.expand_integer_b(fragments, p.halves, tiles, p.a == Element::s8, p.b == Element::s8, panel);
}

namespace {

// f(accumulators in fp32), which are kept so within an instruction.
template <class F>
void add_floats(const Product& p, int tiles, uint32_t* accumulators, F f) {
  if (p.d == Accumulate::f32) return f(accumulators);
  alignas(64) uint32_t wide[kMaxTiles * 128];
  host_kernels.unpack_halves(accumulators, tiles * 2, wide);
  f(wide);
  host_kernels.pack_halves(wide, tiles * 2, accumulators);
}

}  // namespace

void multiply(const Product& p, const PanelA& a, const PanelB& b, int tiles, uint32_t* accumulators) {
  if (is_float(p.a)) {
    add_floats(p, tiles, accumulators, [&](uint32_t* sums) {
      if (p.truncation.group) {
        truncating_multiply(p, a, b, tiles, sums);
      } else {
        host_kernels.multiply_floats(a, b, steps_of(p), tiles, sums);
      }
    });
  } else if (!p.saturate) {
    host_kernels.multiply_integers(a, b, steps_of(p), tiles, accumulators);
  } else {  // the products' sum fits, adding the accumulator need not
    alignas(64) uint32_t sums[kMaxTiles * 128];
    std::memset(sums, 0, tiles * 512);
    host_kernels.multiply_integers(a, b, steps_of(p), tiles, sums);
    for (int k = 0; k < tiles * 128; ++k) {  // in 32 bits, of which eight fit a vector
      const uint32_t before = accumulators[k], sum = before + sums[k], limit = INT32_MAX + (before >> 31);
      const bool overflows = static_cast<int32_t>((before ^ sum) & (sums[k] ^ sum)) < 0;
      accumulators[k] = overflows ? limit : sum;
    }
  }
}

void multiply_tile(const Product& p, const Fragment* a, const Fragment* b, const Fragment* from, uint32_t* const* to) {
  PanelB panel_b;
  expand_b(p, b, 1, panel_b);
  const bool direct = is_float(p.a) && !p.truncation.group && !p.negate;
  const auto one_tile = host_kernels.multiply_tile[direct ? static_cast<int>(p.a) : 0];
  if (direct && p.d == Accumulate::f32) return one_tile(a, panel_b, p.halves, from, to);
  alignas(64) uint32_t sums[4][32];
  const int registers = p.d == Accumulate::f16 ? 2 : 4;
  for (int r = 0; r < registers; ++r) std::memcpy(sums[r], from[r], sizeof sums[r]);
  if (direct) {
    add_floats(p, 1, sums[0], [&](uint32_t* wide) {
      uint32_t* const rows[] = {wide, wide + 32, wide + 64, wide + 96};
      one_tile(a, panel_b, p.halves, rows, rows);
    });
  } else {
    PanelA panel_a;
    expand_a(p, a, panel_a);
    multiply(p, panel_a, panel_b, 1, sums[0]);
  }
  for (int r = 0; r < registers; ++r) std::memcpy(to[r], sums[r], sizeof sums[r]);
}

uint64_t nanoseconds(uint64_t ticks) {
  // The counter's rate, from two readings beside the clock's, which are far apart when anybody asks.
  using clock = std::chrono::steady_clock;
  static const auto began = clock::now();
  static const uint64_t began_ticks = __builtin_ia32_rdtsc();
  if (!ticks) return 0;
  const auto passed = std::chrono::duration_cast<std::chrono::nanoseconds>(clock::now() - began).count();
  return static_cast<uint64_t>(static_cast<double>(ticks) * passed / (__builtin_ia32_rdtsc() - began_ticks));
}

namespace {

// What the counter says of nothing: the time of reading it.
const uint64_t ticks_of_nothing = [] {
  uint64_t least = ~uint64_t{0};
  for (int n = 0; n < 32; ++n) {
    const uint64_t begin = __builtin_ia32_rdtsc();
    least = std::min<uint64_t>(least, __builtin_ia32_rdtsc() - begin);
  }
  return least;
}();

}  // namespace

MatrixTimer::MatrixTimer(Cta& cta, uint64_t macs, bool small) : cta_(cta) {
  if (!cta.launch->counters) return;
  cta.matrix_macs += macs;
  if (small && (cta.serial + cta.small_products++) % kSample) return;
  weight_ = small ? kSample : 1;
  begin_ = __builtin_ia32_rdtsc();
}
MatrixTimer::~MatrixTimer() {
  if (!begin_) return;
  const uint64_t ticks = __builtin_ia32_rdtsc() - begin_;
  cta_.matrix_ticks += (ticks - std::min(ticks, ticks_of_nothing)) * weight_;
}

}  // namespace gpuless
