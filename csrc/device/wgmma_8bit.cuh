#pragma once
// wgmma of bytes: PTX ISA 9.7.15. Of its own, as only attention_8bit has these shapes, and what is in wgmma.cuh is
// compiled into every kernel on wgmma.
#include "device/wgmma.cuh"

namespace forwardpass::ptx {

// Keeps the compiler from moving accesses to these accumulators across this point.
template <int Tiles>
__device__ inline void wgmma_keep(int32_t (&d)[Tiles][4]) {
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
    asm volatile("" : "+r"(d[t][0]), "+r"(d[t][1]), "+r"(d[t][2]), "+r"(d[t][3])::"memory");
}

// The upper half of a descriptor of operands whose rows are so many bytes, along K, under a swizzle of as many: eight
// rows after another.
template <int RowBytes>
constexpr uint32_t kDescriptorHighOf = RowBytes * 8 / kDescriptorUnit | (RowBytes == 128 ? 1u : 2u) << 30;

// clang-format off
#define FORWARDPASS_TILE(c, j) c(d[j][0]), c(d[j][1]), c(d[j][2]), c(d[j][3])
#define FORWARDPASS_TILES_4(c, j) FORWARDPASS_TILE(c, j), FORWARDPASS_TILE(c, j + 1), FORWARDPASS_TILE(c, j + 2), FORWARDPASS_TILE(c, j + 3)
#define FORWARDPASS_TILES_8(c, j) FORWARDPASS_TILES_4(c, j), FORWARDPASS_TILES_4(c, j + 4)
#define FORWARDPASS_TILES_16(c, j) FORWARDPASS_TILES_8(c, j), FORWARDPASS_TILES_8(c, j + 8)
#define FORWARDPASS_NUMBERS_4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FORWARDPASS_NUMBERS_8 FORWARDPASS_NUMBERS_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FORWARDPASS_NUMBERS_16 FORWARDPASS_NUMBERS_8 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// tiles: of eight columns, in d. The numbers are those of the operands behind d.
#define FORWARDPASS_WGMMA_8BIT(name, tiles, n, a_number, b_number, high, scale_d) \
  template <int RowBytes> \
  __device__ inline void name(int32_t (&d)[tiles][4], uint32_t a, uint32_t b, bool accumulate) { \
    asm volatile(FORWARDPASS_WGMMA_ASM("m64n" #n "k32.s32.s8.s8", FORWARDPASS_NUMBERS_##tiles, a_number, b_number, \
                                       high, scale_d, "") \
                 : FORWARDPASS_TILES_##tiles("+r", 0) \
                 : "r"(a), "r"(b), "n"(kDescriptorHighOf<RowBytes>), "r"(static_cast<int>(accumulate))); \
  }
#define FORWARDPASS_WGMMA_8BIT_REGISTERS(name, tiles, n, T, constraint, opcode, scales, a0, a1, a2, a3, b_number, high, scale_d) \
  template <int RowBytes> \
  __device__ inline void name(T (&d)[tiles][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) { \
    asm volatile(FORWARDPASS_WGMMA_REGISTERS_ASM("m64n" #n "k32." opcode, FORWARDPASS_NUMBERS_##tiles, \
                                                 a0, a1, a2, a3, b_number, high, scale_d, scales) \
                 : FORWARDPASS_TILES_##tiles(constraint, 0) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHighOf<RowBytes>), \
                   "r"(static_cast<int>(accumulate))); \
  }

// 9.7.15.5.2 wgmma.mma_async: d [64, n] += a [64, 32] b [n, 32] transposed, and where not `accumulate`, d = a b; of rows
// of RowBytes.
FORWARDPASS_WGMMA_8BIT(wgmma_s8, 8, 64, 32, 33, 34, 35)
FORWARDPASS_WGMMA_8BIT(wgmma_s8, 16, 128, 64, 65, 66, 67)
// With a as fragments of an mma of m16n8k32, whose registers may change once a wgmma_wait has followed; both unsigned.
FORWARDPASS_WGMMA_8BIT_REGISTERS(wgmma_u8, 4, 32, int32_t, "+r", "s32.u8.u8", "", 16, 17, 18, 19, 20, 21, 22)
FORWARDPASS_WGMMA_8BIT_REGISTERS(wgmma_u8, 8, 64, int32_t, "+r", "s32.u8.u8", "", 32, 33, 34, 35, 36, 37, 38)
// The same of e4m3.
FORWARDPASS_WGMMA_8BIT_REGISTERS(wgmma_e4m3, 4, 32, float, "+f", "f32.e4m3.e4m3", ", 1, 1", 16, 17, 18, 19, 20, 21, 22)
FORWARDPASS_WGMMA_8BIT_REGISTERS(wgmma_e4m3, 8, 64, float, "+f", "f32.e4m3.e4m3", ", 1, 1", 32, 33, 34, 35, 36, 37, 38)
// clang-format on

#undef FORWARDPASS_TILE
#undef FORWARDPASS_TILES_4
#undef FORWARDPASS_TILES_8
#undef FORWARDPASS_TILES_16
#undef FORWARDPASS_NUMBERS_4
#undef FORWARDPASS_NUMBERS_8
#undef FORWARDPASS_NUMBERS_16
#undef FORWARDPASS_WGMMA_8BIT
#undef FORWARDPASS_WGMMA_8BIT_REGISTERS

}  // namespace forwardpass::ptx
