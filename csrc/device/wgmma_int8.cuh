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
#define FORWARDPASS_TILE(j) "+r"(d[j][0]), "+r"(d[j][1]), "+r"(d[j][2]), "+r"(d[j][3])
#define FORWARDPASS_TILES_8(j) FORWARDPASS_TILE(j), FORWARDPASS_TILE(j + 1), FORWARDPASS_TILE(j + 2), FORWARDPASS_TILE(j + 3), \
  FORWARDPASS_TILE(j + 4), FORWARDPASS_TILE(j + 5), FORWARDPASS_TILE(j + 6), FORWARDPASS_TILE(j + 7)

// 9.7.15.5.2 wgmma.mma_async: d [64, n] += a [64, 32] b [n, 32] transposed, and where not `accumulate`, d = a b; of rows
// of RowBytes.
template <int RowBytes>
__device__ inline void wgmma_s8(int32_t (&d)[8][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile("{\n"
               ".reg .pred p;\n"
               ".reg .b64 a, b;\n"
               "setp.ne.b32 p, %35, 0;\n"
               "mov.b64 a, {%32, %34};\n"
               "mov.b64 b, {%33, %34};\n"
               "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
               "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
               "}, a, b, p;\n"
               "}"
               : FORWARDPASS_TILES_8(0)
               : "r"(a), "r"(b), "n"(kDescriptorHighOf<RowBytes>), "r"(static_cast<int>(accumulate)));
}
template <int RowBytes>
__device__ inline void wgmma_s8(int32_t (&d)[16][4], uint32_t a, uint32_t b, bool accumulate) {
  asm volatile("{\n"
               ".reg .pred p;\n"
               ".reg .b64 a, b;\n"
               "setp.ne.b32 p, %67, 0;\n"
               "mov.b64 a, {%64, %66};\n"
               "mov.b64 b, {%65, %66};\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
               "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "
               "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "
               "%56, %57, %58, %59, %60, %61, %62, %63"
               "}, a, b, p;\n"
               "}"
               : FORWARDPASS_TILES_8(0), FORWARDPASS_TILES_8(8)
               : "r"(a), "r"(b), "n"(kDescriptorHighOf<RowBytes>), "r"(static_cast<int>(accumulate)));
}
// With a as fragments of an mma of m16n8k32, whose registers may change once a wgmma_wait has followed; both unsigned.
template <int RowBytes>
__device__ inline void wgmma_u8(int32_t (&d)[4][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) {
  asm volatile("{\n"
               ".reg .pred p;\n"
               ".reg .b64 b;\n"
               "setp.ne.b32 p, %22, 0;\n"
               "mov.b64 b, {%20, %21};\n"
               "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.u8 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
               "}, {%16, %17, %18, %19}, b, p;\n"
               "}"
               : FORWARDPASS_TILE(0), FORWARDPASS_TILE(1), FORWARDPASS_TILE(2), FORWARDPASS_TILE(3)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHighOf<RowBytes>), "r"(static_cast<int>(accumulate)));
}
template <int RowBytes>
__device__ inline void wgmma_u8(int32_t (&d)[8][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) {
  asm volatile("{\n"
               ".reg .pred p;\n"
               ".reg .b64 b;\n"
               "setp.ne.b32 p, %38, 0;\n"
               "mov.b64 b, {%36, %37};\n"
               "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.u8 {"
               "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, "
               "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
               "}, {%32, %33, %34, %35}, b, p;\n"
               "}"
               : FORWARDPASS_TILES_8(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHighOf<RowBytes>), "r"(static_cast<int>(accumulate)));
}
// clang-format on

#undef FORWARDPASS_TILE
#undef FORWARDPASS_TILES_8

}  // namespace forwardpass::ptx
