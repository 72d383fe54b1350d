#pragma once
// wgmma: PTX ISA 9.7.15. One instruction a function; only the N that are used. Of 8-bit operands both are in shared
// memory, of 16-bit ones the first is in registers.
#include "common/ptx_sm80.cuh"

namespace forwardpass::ptx {

// Registers may be operands of the wgmmas that follow.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// 9.7.15.5.1.2 matrix descriptor of an operand whose rows are 128 bytes of K under a swizzle of 128 bytes: eight rows
// are 1024 bytes. The low half has the address in units of 16 bytes, the upper half is the same for all. 32 more of K
// are two units.
__device__ inline uint32_t descriptor(uint32_t address) { return (address & 0x3ffff) >> 4 | 1 << 16; }
constexpr uint32_t kDescriptorHigh = 1024 >> 4 | 1 << 30;
constexpr int kDescriptorUnit = 16;

// clang-format off
#define FORWARDPASS_NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FORWARDPASS_NUMBERS_32                                                                                         \
  FORWARDPASS_NUMBERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, "   \
  "%26, %27, %28, %29, %30, %31"
#define FORWARDPASS_NUMBERS_64                                                                                         \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "          \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "          \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FORWARDPASS_NUMBERS_128                                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "          \
  "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "          \
  "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "          \
  "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "          \
  "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, "         \
  "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "       \
  "%124, %125, %126, %127"
#define FORWARDPASS_TILE(kind, j) kind(d[j][0]), kind(d[j][1]), kind(d[j][2]), kind(d[j][3])
#define FORWARDPASS_TILES_2(kind, j) FORWARDPASS_TILE(kind, j), FORWARDPASS_TILE(kind, j + 1)
#define FORWARDPASS_TILES_4(kind, j) FORWARDPASS_TILES_2(kind, j), FORWARDPASS_TILES_2(kind, j + 2)
#define FORWARDPASS_TILES_8(kind, j) FORWARDPASS_TILES_4(kind, j), FORWARDPASS_TILES_4(kind, j + 4)
#define FORWARDPASS_TILES_16(kind, j) FORWARDPASS_TILES_8(kind, j), FORWARDPASS_TILES_8(kind, j + 8)
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
// Of 16-bit floats, D, with four registers of the first operand in place of its descriptor.
#define FORWARDPASS_WGMMA_REGISTERS(opcode, numbers, a0, a1, a2, a3, b, high, accumulate) \
  "{\n" \
  ".reg .pred p;\n" \
  ".reg .b64 b;\n" \
  "setp.ne.b32 p, %" #accumulate ", 0;\n" \
  "mov.b64 b, {%" #b ", %" #high "};\n" \
  "wgmma.mma_async.sync.aligned." opcode " {" numbers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, b, p, 1, 1, 0;\n" \
  "}"
#define FORWARDPASS_REGISTERS \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate))
#define FORWARDPASS_WGMMA_16_BITS(shape, numbers, n0, n1, n2, n3, n4, n5, n6, ...) \
  static_assert(D == Dtype::f16 || D == Dtype::bf16); \
  if constexpr (D == Dtype::f16) \
    asm volatile(FORWARDPASS_WGMMA_REGISTERS(shape ".f32.f16.f16", numbers, n0, n1, n2, n3, n4, n5, n6) \
                 : __VA_ARGS__ : FORWARDPASS_REGISTERS); \
  else \
    asm volatile(FORWARDPASS_WGMMA_REGISTERS(shape ".f32.bf16.bf16", numbers, n0, n1, n2, n3, n4, n5, n6) \
                 : __VA_ARGS__ : FORWARDPASS_REGISTERS)
// clang-format on

// 9.7.15.5.2 wgmma.mma_async: d [64, 8 T] = a [64, 32] b [8 T, 32] transposed, plus d where `accumulate`. As in an mma
// of m16n8, for each warp sixteen rows and for each n8 tile four registers.
__device__ inline void wgmma_k32(int32_t (&d)[2][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile(FORWARDPASS_WGMMA("m64n16k32.s32.s8.s8", FORWARDPASS_NUMBERS_8, 8, 9, 10, 11, "")
               : FORWARDPASS_TILES_2("+r", 0)
               : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate)));
}
__device__ inline void wgmma_k32(int32_t (&d)[8][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile(FORWARDPASS_WGMMA("m64n64k32.s32.s8.s8", FORWARDPASS_NUMBERS_32, 32, 33, 34, 35, "")
               : FORWARDPASS_TILES_8("+r", 0)
               : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate)));
}
__device__ inline void wgmma_k32(int32_t (&d)[16][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile(FORWARDPASS_WGMMA("m64n128k32.s32.s8.s8", FORWARDPASS_NUMBERS_64, 64, 65, 66, 67, "")
               : FORWARDPASS_TILES_16("+r", 0)
               : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate)));
}
__device__ inline void wgmma_k32(int32_t (&d)[32][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile(FORWARDPASS_WGMMA("m64n256k32.s32.s8.s8", FORWARDPASS_NUMBERS_128, 128, 129, 130, 131, "")
               : FORWARDPASS_TILES_16("+r", 0), FORWARDPASS_TILES_16("+r", 16)
               : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate)));
}
__device__ inline void wgmma_k32(float (&d)[2][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile(FORWARDPASS_WGMMA("m64n16k32.f32.e4m3.e4m3", FORWARDPASS_NUMBERS_8, 8, 9, 10, 11, ", 1, 1")
               : FORWARDPASS_TILES_2("+f", 0)
               : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate)));
}
__device__ inline void wgmma_k32(float (&d)[8][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile(FORWARDPASS_WGMMA("m64n64k32.f32.e4m3.e4m3", FORWARDPASS_NUMBERS_32, 32, 33, 34, 35, ", 1, 1")
               : FORWARDPASS_TILES_8("+f", 0)
               : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate)));
}
__device__ inline void wgmma_k32(float (&d)[16][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile(FORWARDPASS_WGMMA("m64n128k32.f32.e4m3.e4m3", FORWARDPASS_NUMBERS_64, 64, 65, 66, 67, ", 1, 1")
               : FORWARDPASS_TILES_16("+f", 0)
               : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate)));
}

// d [64, 8 T] = a [64, 16] b [8 T, 16] transposed, plus d where `accumulate`; a as fragments of an mma of m16n8k16, for
// each warp sixteen rows. Its registers may change once a wgmma_wait has followed.
template <Dtype D>
__device__ inline void wgmma_k16(float (&d)[2][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) {
  FORWARDPASS_WGMMA_16_BITS("m64n16k16", FORWARDPASS_NUMBERS_8, 8, 9, 10, 11, 12, 13, 14, FORWARDPASS_TILES_2("+f", 0));
}
template <Dtype D>
__device__ inline void wgmma_k16(float (&d)[8][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) {
  FORWARDPASS_WGMMA_16_BITS("m64n64k16", FORWARDPASS_NUMBERS_32, 32, 33, 34, 35, 36, 37, 38,
                            FORWARDPASS_TILES_8("+f", 0));
}
template <Dtype D>
__device__ inline void wgmma_k16(float (&d)[16][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) {
  FORWARDPASS_WGMMA_16_BITS("m64n128k16", FORWARDPASS_NUMBERS_64, 64, 65, 66, 67, 68, 69, 70,
                            FORWARDPASS_TILES_16("+f", 0));
}

#undef FORWARDPASS_NUMBERS_8
#undef FORWARDPASS_NUMBERS_32
#undef FORWARDPASS_NUMBERS_64
#undef FORWARDPASS_NUMBERS_128
#undef FORWARDPASS_TILE
#undef FORWARDPASS_TILES_2
#undef FORWARDPASS_TILES_4
#undef FORWARDPASS_TILES_8
#undef FORWARDPASS_TILES_16
#undef FORWARDPASS_WGMMA
#undef FORWARDPASS_WGMMA_REGISTERS
#undef FORWARDPASS_REGISTERS
#undef FORWARDPASS_WGMMA_16_BITS

}  // namespace forwardpass::ptx
