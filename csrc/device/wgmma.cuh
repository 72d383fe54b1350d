#pragma once
// wgmma: PTX ISA 9.7.15. One instruction per function, and only the N that are used. Operands are in shared memory; the
// first one may be in registers.
#include "device/ptx_sm80.cuh"

namespace forwardpass::ptx {

// Four warps issue a wgmma together; its first operand has 64 rows.
constexpr int kWarpgroup = 128, kWgmmaRows = 64;

// Orders accesses to registers before the wgmmas that follow and use them.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Keeps the compiler from moving accesses to these accumulators across this point.
template <int Tiles>
__device__ inline void wgmma_keep(float (&d)[Tiles][4]) {
#pragma unroll
  for (int t = 0; t < Tiles; ++t)
    asm volatile("" : "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])::"memory");
}

// 9.7.15.5.1.2 matrix descriptor of an operand whose rows are 128 bytes under a swizzle of 128 bytes: eight rows are
// 1024 bytes. The low half has the address in units of 16 bytes, the upper half is the same for all. Rows along K: 32
// bytes more of it are two units. Rows along N: `leading` bytes from 64 columns to the next.
constexpr int kDescriptorUnit = 16;
constexpr int kSwizzleBytes = 1024;  // after which the swizzle repeats, and at whose multiples an operand begins
__device__ inline uint32_t descriptor(uint32_t address, int leading = kDescriptorUnit) {
  return (address & 0x3ffff) / kDescriptorUnit | leading / kDescriptorUnit << 16;
}
constexpr uint32_t kDescriptorHigh = kSwizzleBytes / kDescriptorUnit | 1 << 30;

// Macros, because an asm statement takes its operands, their constraints and their numbers as they are written: neither
// a template's pack nor a constant expression can be one.
// clang-format off
// The registers of n8 tiles, by how many there are: as operands of an asm, and as their numbers there.
#define FORWARDPASS_NUMBERS_2 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FORWARDPASS_NUMBERS_8 FORWARDPASS_NUMBERS_2 \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
  "%29, %30, %31"
#define FORWARDPASS_NUMBERS_10 FORWARDPASS_NUMBERS_8 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FORWARDPASS_NUMBERS_12 FORWARDPASS_NUMBERS_10 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define FORWARDPASS_NUMBERS_14 FORWARDPASS_NUMBERS_12 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define FORWARDPASS_NUMBERS_16 FORWARDPASS_NUMBERS_14 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define FORWARDPASS_NUMBERS_24 FORWARDPASS_NUMBERS_16 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, " \
  "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FORWARDPASS_NUMBERS_32 FORWARDPASS_NUMBERS_24 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, " \
  "%114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FORWARDPASS_TILE(kind, j) kind(d[j][0]), kind(d[j][1]), kind(d[j][2]), kind(d[j][3])
#define FORWARDPASS_TILES_2(kind) FORWARDPASS_TILE(kind, 0), FORWARDPASS_TILE(kind, 1)
#define FORWARDPASS_TILES_8(kind) FORWARDPASS_TILES_2(kind), FORWARDPASS_TILE(kind, 2), FORWARDPASS_TILE(kind, 3), \
  FORWARDPASS_TILE(kind, 4), FORWARDPASS_TILE(kind, 5), FORWARDPASS_TILE(kind, 6), FORWARDPASS_TILE(kind, 7)
#define FORWARDPASS_TILES_10(kind) FORWARDPASS_TILES_8(kind), FORWARDPASS_TILE(kind, 8), FORWARDPASS_TILE(kind, 9)
#define FORWARDPASS_TILES_12(kind) FORWARDPASS_TILES_10(kind), FORWARDPASS_TILE(kind, 10), \
  FORWARDPASS_TILE(kind, 11)
#define FORWARDPASS_TILES_14(kind) FORWARDPASS_TILES_12(kind), FORWARDPASS_TILE(kind, 12), \
  FORWARDPASS_TILE(kind, 13)
#define FORWARDPASS_TILES_16(kind) FORWARDPASS_TILES_14(kind), FORWARDPASS_TILE(kind, 14), \
  FORWARDPASS_TILE(kind, 15)
#define FORWARDPASS_TILES_24(kind) FORWARDPASS_TILES_16(kind), FORWARDPASS_TILE(kind, 16), \
  FORWARDPASS_TILE(kind, 17), FORWARDPASS_TILE(kind, 18), FORWARDPASS_TILE(kind, 19), FORWARDPASS_TILE(kind, 20), \
  FORWARDPASS_TILE(kind, 21), FORWARDPASS_TILE(kind, 22), FORWARDPASS_TILE(kind, 23)
#define FORWARDPASS_TILES_32(kind) FORWARDPASS_TILES_24(kind), FORWARDPASS_TILE(kind, 24), \
  FORWARDPASS_TILE(kind, 25), FORWARDPASS_TILE(kind, 26), FORWARDPASS_TILE(kind, 27), FORWARDPASS_TILE(kind, 28), \
  FORWARDPASS_TILE(kind, 29), FORWARDPASS_TILE(kind, 30), FORWARDPASS_TILE(kind, 31)
// The numbers of the operands behind the accumulators: low halves of the descriptors, the upper half, scale-d.
#define FORWARDPASS_WGMMA(opcode, numbers, a, b, high, accumulate, scales) \
  "{\n" \
  ".reg .pred p;\n" \
  ".reg .b64 a, b;\n" \
  "setp.ne.b32 p, %" #accumulate ", 0;\n" \
  "mov.b64 a, {%" #a ", %" #high "};\n" \
  "mov.b64 b, {%" #b ", %" #high "};\n" \
  "wgmma.mma_async.sync.aligned." opcode " {" numbers "}, a, b, p" scales ";\n" \
  "}"
// The same with four registers of the first operand in place of its descriptor; trans_b: a string, imm-trans-b if any.
#define FORWARDPASS_WGMMA_REGISTERS(opcode, numbers, a0, a1, a2, a3, b, high, accumulate, trans_b) \
  "{\n" \
  ".reg .pred p;\n" \
  ".reg .b64 b;\n" \
  "setp.ne.b32 p, %" #accumulate ", 0;\n" \
  "mov.b64 b, {%" #b ", %" #high "};\n" \
  "wgmma.mma_async.sync.aligned." opcode " {" numbers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, b, p, 1, 1" \
  trans_b ";\n" \
  "}"
// Functions for 8-bit operands: their type, the accumulators' in C++, as asm constraint and in the opcode, the scales.
#define FORWARDPASS_K32(Acc, kind, type, acc, scales, tiles, n, ...) \
  __device__ inline void wgmma_k32(Acc (&d)[tiles][4], uint32_t a, uint32_t b, bool accumulate) { \
    asm volatile(FORWARDPASS_WGMMA("m64n" #n "k32." acc "." type "." type, FORWARDPASS_NUMBERS_##tiles, \
                                   __VA_ARGS__, scales) \
                 : FORWARDPASS_TILES_##tiles(kind) \
                 : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate))); \
  }
#define FORWARDPASS_S8(...) FORWARDPASS_K32(int32_t, "+r", "s8", "s32", "", __VA_ARGS__)
#define FORWARDPASS_E4M3(...) FORWARDPASS_K32(float, "+f", "e4m3", "f32", ", 1, 1", __VA_ARGS__)
#define FORWARDPASS_REGISTERS_E4M3(tiles, n, ...) \
  __device__ inline void wgmma_k32(float (&d)[tiles][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) { \
    asm volatile(FORWARDPASS_WGMMA_REGISTERS("m64n" #n "k32.f32.e4m3.e4m3", FORWARDPASS_NUMBERS_##tiles, __VA_ARGS__, \
                                             "") \
                 : FORWARDPASS_TILES_##tiles("+f") \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh), \
                   "r"(static_cast<int>(accumulate))); \
  }
// Functions for operands of 16-bit floats, and those for one type.
#define FORWARDPASS_K16_OF(type, tiles, n, ...) \
  asm volatile(FORWARDPASS_WGMMA("m64n" #n "k16.f32." #type "." #type, FORWARDPASS_NUMBERS_##tiles, __VA_ARGS__, \
                                 ", 1, 1, 0, 0") \
               : FORWARDPASS_TILES_##tiles("+f") \
               : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate)))
#define FORWARDPASS_K16(tiles, n, ...) \
  template <Dtype D> \
  __device__ inline void wgmma_k16(float (&d)[tiles][4], uint32_t a, uint32_t b, bool accumulate) { \
    static_assert(D == Dtype::f16 || D == Dtype::bf16); \
    if constexpr (D == Dtype::f16) \
      FORWARDPASS_K16_OF(f16, tiles, n, __VA_ARGS__); \
    else \
      FORWARDPASS_K16_OF(bf16, tiles, n, __VA_ARGS__); \
  }
#define FORWARDPASS_REGISTERS_K16_OF(type, tiles, n, a0, a1, a2, a3, b0, high, scale_d, trans_b) \
  asm volatile(FORWARDPASS_WGMMA_REGISTERS("m64n" #n "k16.f32." #type "." #type, FORWARDPASS_NUMBERS_##tiles, a0, a1, \
                                           a2, a3, b0, high, scale_d, ", %" #trans_b) \
               : FORWARDPASS_TILES_##tiles("+f") \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh), \
                 "r"(static_cast<int>(accumulate)), "n"(TransB))
#define FORWARDPASS_REGISTERS_K16(tiles, n, ...) \
  template <Dtype D, int TransB = 0> \
  __device__ inline void wgmma_k16(float (&d)[tiles][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) { \
    static_assert(D == Dtype::f16 || D == Dtype::bf16); \
    if constexpr (D == Dtype::f16) \
      FORWARDPASS_REGISTERS_K16_OF(f16, tiles, n, __VA_ARGS__); \
    else \
      FORWARDPASS_REGISTERS_K16_OF(bf16, tiles, n, __VA_ARGS__); \
  }
// clang-format on

// 9.7.15.5.2 wgmma.mma_async: d [64, 8 T] = a [64, 32] b [8 T, 32] transposed, plus d where `accumulate`. As in an mma
// of m16n8, for each warp sixteen rows and for each n8 tile four registers.
FORWARDPASS_S8(2, 16, 8, 9, 10, 11)
FORWARDPASS_S8(8, 64, 32, 33, 34, 35)
FORWARDPASS_S8(16, 128, 64, 65, 66, 67)
FORWARDPASS_S8(24, 192, 96, 97, 98, 99)
FORWARDPASS_S8(32, 256, 128, 129, 130, 131)
FORWARDPASS_E4M3(2, 16, 8, 9, 10, 11)
FORWARDPASS_E4M3(8, 64, 32, 33, 34, 35)
FORWARDPASS_E4M3(16, 128, 64, 65, 66, 67)
FORWARDPASS_E4M3(24, 192, 96, 97, 98, 99)
// With a as fragments of an mma of m16n8k32, for each warp sixteen rows; its registers may change once a wgmma_wait has
// followed.
FORWARDPASS_REGISTERS_E4M3(16, 128, 64, 65, 66, 67, 68, 69, 70)

// The same of 16-bit floats: d [64, 8 T] = a [64, 16] b [8 T, 16] transposed, plus d where `accumulate`.
FORWARDPASS_K16(8, 64, 32, 33, 34, 35)
FORWARDPASS_K16(10, 80, 40, 41, 42, 43)
FORWARDPASS_K16(14, 112, 56, 57, 58, 59)
FORWARDPASS_K16(16, 128, 64, 65, 66, 67)
// With a as fragments of an mma of m16n8k16, for each warp sixteen rows; its registers may change once a wgmma_wait has
// followed. TransB: b is [16, 8 T].
FORWARDPASS_REGISTERS_K16(2, 16, 8, 9, 10, 11, 12, 13, 14, 15)
FORWARDPASS_REGISTERS_K16(8, 64, 32, 33, 34, 35, 36, 37, 38, 39)
FORWARDPASS_REGISTERS_K16(12, 96, 48, 49, 50, 51, 52, 53, 54, 55)
FORWARDPASS_REGISTERS_K16(16, 128, 64, 65, 66, 67, 68, 69, 70, 71)
FORWARDPASS_REGISTERS_K16(24, 192, 96, 97, 98, 99, 100, 101, 102, 103)
FORWARDPASS_REGISTERS_K16(32, 256, 128, 129, 130, 131, 132, 133, 134, 135)

#undef FORWARDPASS_NUMBERS_2
#undef FORWARDPASS_NUMBERS_8
#undef FORWARDPASS_NUMBERS_10
#undef FORWARDPASS_NUMBERS_12
#undef FORWARDPASS_NUMBERS_14
#undef FORWARDPASS_NUMBERS_16
#undef FORWARDPASS_NUMBERS_24
#undef FORWARDPASS_NUMBERS_32
#undef FORWARDPASS_TILE
#undef FORWARDPASS_TILES_2
#undef FORWARDPASS_TILES_8
#undef FORWARDPASS_TILES_10
#undef FORWARDPASS_TILES_12
#undef FORWARDPASS_TILES_14
#undef FORWARDPASS_TILES_16
#undef FORWARDPASS_TILES_24
#undef FORWARDPASS_TILES_32
#undef FORWARDPASS_WGMMA
#undef FORWARDPASS_WGMMA_REGISTERS
#undef FORWARDPASS_K32
#undef FORWARDPASS_S8
#undef FORWARDPASS_E4M3
#undef FORWARDPASS_REGISTERS_E4M3
#undef FORWARDPASS_K16_OF
#undef FORWARDPASS_K16
#undef FORWARDPASS_REGISTERS_K16_OF
#undef FORWARDPASS_REGISTERS_K16

}  // namespace forwardpass::ptx
