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
// x(i) for the n / 2 registers that a thread has of n columns of accumulators, without the first: x writes a register's
// number in the asm, or the operand that it is.
#define FORWARDPASS_REGISTERS_16(x) x(1) x(2) x(3) x(4) x(5) x(6) x(7)
#define FORWARDPASS_REGISTERS_64(x) FORWARDPASS_REGISTERS_16(x) x(8) x(9) x(10) x(11) x(12) x(13) x(14) x(15) x(16) \
  x(17) x(18) x(19) x(20) x(21) x(22) x(23) x(24) x(25) x(26) x(27) x(28) x(29) x(30) x(31)
#define FORWARDPASS_REGISTERS_80(x) FORWARDPASS_REGISTERS_64(x) x(32) x(33) x(34) x(35) x(36) x(37) x(38) x(39)
#define FORWARDPASS_REGISTERS_96(x) FORWARDPASS_REGISTERS_80(x) x(40) x(41) x(42) x(43) x(44) x(45) x(46) x(47)
#define FORWARDPASS_REGISTERS_112(x) FORWARDPASS_REGISTERS_96(x) x(48) x(49) x(50) x(51) x(52) x(53) x(54) x(55)
#define FORWARDPASS_REGISTERS_128(x) FORWARDPASS_REGISTERS_112(x) x(56) x(57) x(58) x(59) x(60) x(61) x(62) x(63)
#define FORWARDPASS_REGISTERS_192(x) FORWARDPASS_REGISTERS_128(x) x(64) x(65) x(66) x(67) x(68) x(69) x(70) x(71) \
  x(72) x(73) x(74) x(75) x(76) x(77) x(78) x(79) x(80) x(81) x(82) x(83) x(84) x(85) x(86) x(87) x(88) x(89) x(90) \
  x(91) x(92) x(93) x(94) x(95)
#define FORWARDPASS_REGISTERS_256(x) FORWARDPASS_REGISTERS_192(x) x(96) x(97) x(98) x(99) x(100) x(101) x(102) \
  x(103) x(104) x(105) x(106) x(107) x(108) x(109) x(110) x(111) x(112) x(113) x(114) x(115) x(116) x(117) x(118) \
  x(119) x(120) x(121) x(122) x(123) x(124) x(125) x(126) x(127)
#define FORWARDPASS_NUMBER(i) ", %" #i
#define FORWARDPASS_float(i) , "+f"(d[i / 4][i % 4])
#define FORWARDPASS_int32_t(i) , "+r"(d[i / 4][i % 4])
// The assembly of a wgmma into these registers, a list of d's numbers. The other numbers are those of the operands
// behind d: the low halves of the descriptors, the upper half, scale-d. What follows scale-d comes last.
#define FORWARDPASS_WGMMA_ASM(instruction, registers, a_number, b_number, high, scale_d, behind) \
  "{\n" \
  ".reg .pred p;\n" \
  ".reg .b64 a, b;\n" \
  "setp.ne.b32 p, %" #scale_d ", 0;\n" \
  "mov.b64 a, {%" #a_number ", %" #high "};\n" \
  "mov.b64 b, {%" #b_number ", %" #high "};\n" \
  "wgmma.mma_async.sync.aligned." instruction " {" registers "}, a, b, p" behind ";\n" \
  "}"
// The same with four registers of a.
#define FORWARDPASS_WGMMA_REGISTERS_ASM(instruction, registers, a0, a1, a2, a3, b_number, high, scale_d, behind) \
  "{\n" \
  ".reg .pred p;\n" \
  ".reg .b64 b;\n" \
  "setp.ne.b32 p, %" #scale_d ", 0;\n" \
  "mov.b64 b, {%" #b_number ", %" #high "};\n" \
  "wgmma.mma_async.sync.aligned." instruction " {" registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, b, p" \
  behind ";\n" \
  "}"
// A function for n columns of accumulators of type T, constraint "+f" or "+r". What it is a template of comes last.
#define FORWARDPASS_WGMMA(name, n, T, constraint, opcode, scales, a_number, b_number, high, scale_d, ...) \
  __VA_ARGS__ __device__ inline void name(T (&d)[n / 8][4], uint32_t a, uint32_t b, bool accumulate) { \
    asm volatile(FORWARDPASS_WGMMA_ASM("m64n" #n opcode, "%0" FORWARDPASS_REGISTERS_##n(FORWARDPASS_NUMBER), \
                                       a_number, b_number, high, scale_d, scales) \
                 : constraint(d[0][0]) FORWARDPASS_REGISTERS_##n(FORWARDPASS_##T) \
                 : "r"(a), "r"(b), "n"(kDescriptorHigh), "r"(static_cast<int>(accumulate))); \
  }
// The same with four registers of a; trans_b: imm-trans-b as a string, if any.
#define FORWARDPASS_WGMMA_REGISTERS(name, n, opcode, trans_b, a0, a1, a2, a3, b_number, high, scale_d, ...) \
  __VA_ARGS__ __device__ inline void name(float (&d)[n / 8][4], const uint32_t (&a)[4], uint32_t b, bool accumulate) { \
    asm volatile(FORWARDPASS_WGMMA_REGISTERS_ASM("m64n" #n opcode, \
                                                 "%0" FORWARDPASS_REGISTERS_##n(FORWARDPASS_NUMBER), \
                                                 a0, a1, a2, a3, b_number, high, scale_d, ", 1, 1" trans_b) \
                 : "+f"(d[0][0]) FORWARDPASS_REGISTERS_##n(FORWARDPASS_float) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "n"(kDescriptorHigh), \
                   "r"(static_cast<int>(accumulate)), "n"(TransB)); \
  }
// Those of 16-bit floats.
#define FORWARDPASS_K16(type, n, ...) \
  FORWARDPASS_WGMMA(wgmma_k16, n, float, "+f", "k16.f32." #type "." #type, ", 1, 1, 0, 0", __VA_ARGS__, \
                    template <Dtype D> requires(D == Dtype::type))
#define FORWARDPASS_REGISTERS_K16(type, n, trans_b, ...) \
  FORWARDPASS_WGMMA_REGISTERS(wgmma_k16, n, "k16.f32." #type "." #type, ", %" #trans_b, __VA_ARGS__, \
                              template <Dtype D, int TransB = 0> requires(D == Dtype::type))

// 9.7.15.5.2 wgmma.mma_async: d [64, n] = a [64, 32] b [n, 32] transposed, plus d where `accumulate`. As in an mma of
// m16n8, for each warp sixteen rows and for each n8 tile four registers.
FORWARDPASS_WGMMA(wgmma_k32, 16, int32_t, "+r", "k32.s32.s8.s8", "", 8, 9, 10, 11)
FORWARDPASS_WGMMA(wgmma_k32, 64, int32_t, "+r", "k32.s32.s8.s8", "", 32, 33, 34, 35)
FORWARDPASS_WGMMA(wgmma_k32, 128, int32_t, "+r", "k32.s32.s8.s8", "", 64, 65, 66, 67)
FORWARDPASS_WGMMA(wgmma_k32, 192, int32_t, "+r", "k32.s32.s8.s8", "", 96, 97, 98, 99)
FORWARDPASS_WGMMA(wgmma_k32, 256, int32_t, "+r", "k32.s32.s8.s8", "", 128, 129, 130, 131)
FORWARDPASS_WGMMA(wgmma_k32, 16, float, "+f", "k32.f32.e4m3.e4m3", ", 1, 1", 8, 9, 10, 11)
FORWARDPASS_WGMMA(wgmma_k32, 64, float, "+f", "k32.f32.e4m3.e4m3", ", 1, 1", 32, 33, 34, 35)
FORWARDPASS_WGMMA(wgmma_k32, 128, float, "+f", "k32.f32.e4m3.e4m3", ", 1, 1", 64, 65, 66, 67)
FORWARDPASS_WGMMA(wgmma_k32, 192, float, "+f", "k32.f32.e4m3.e4m3", ", 1, 1", 96, 97, 98, 99)
// With a as fragments of an mma of m16n8k32, for each warp sixteen rows; its registers may change once a wgmma_wait has
// followed.
FORWARDPASS_WGMMA_REGISTERS(wgmma_k32, 128, "k32.f32.e4m3.e4m3", "", 64, 65, 66, 67, 68, 69, 70,
                            template <int TransB = 0>)

// The same of 16-bit floats: d [64, n] = a [64, 16] b [n, 16] transposed, plus d where `accumulate`.
FORWARDPASS_K16(f16, 64, 32, 33, 34, 35)
FORWARDPASS_K16(bf16, 64, 32, 33, 34, 35)
FORWARDPASS_K16(f16, 80, 40, 41, 42, 43)
FORWARDPASS_K16(bf16, 80, 40, 41, 42, 43)
FORWARDPASS_K16(f16, 112, 56, 57, 58, 59)
FORWARDPASS_K16(bf16, 112, 56, 57, 58, 59)
FORWARDPASS_K16(f16, 128, 64, 65, 66, 67)
FORWARDPASS_K16(bf16, 128, 64, 65, 66, 67)
// With a as fragments of an mma of m16n8k16, for each warp sixteen rows; its registers may change once a wgmma_wait has
// followed. TransB: b is [16, n].
FORWARDPASS_REGISTERS_K16(f16, 16, 15, 8, 9, 10, 11, 12, 13, 14)
FORWARDPASS_REGISTERS_K16(bf16, 16, 15, 8, 9, 10, 11, 12, 13, 14)
FORWARDPASS_REGISTERS_K16(f16, 64, 39, 32, 33, 34, 35, 36, 37, 38)
FORWARDPASS_REGISTERS_K16(bf16, 64, 39, 32, 33, 34, 35, 36, 37, 38)
FORWARDPASS_REGISTERS_K16(f16, 96, 55, 48, 49, 50, 51, 52, 53, 54)
FORWARDPASS_REGISTERS_K16(bf16, 96, 55, 48, 49, 50, 51, 52, 53, 54)
FORWARDPASS_REGISTERS_K16(f16, 128, 71, 64, 65, 66, 67, 68, 69, 70)
FORWARDPASS_REGISTERS_K16(bf16, 128, 71, 64, 65, 66, 67, 68, 69, 70)
FORWARDPASS_REGISTERS_K16(f16, 192, 103, 96, 97, 98, 99, 100, 101, 102)
FORWARDPASS_REGISTERS_K16(bf16, 192, 103, 96, 97, 98, 99, 100, 101, 102)
FORWARDPASS_REGISTERS_K16(f16, 256, 135, 128, 129, 130, 131, 132, 133, 134)
FORWARDPASS_REGISTERS_K16(bf16, 256, 135, 128, 129, 130, 131, 132, 133, 134)
// clang-format on

#undef FORWARDPASS_REGISTERS_16
#undef FORWARDPASS_REGISTERS_64
#undef FORWARDPASS_REGISTERS_80
#undef FORWARDPASS_REGISTERS_96
#undef FORWARDPASS_REGISTERS_112
#undef FORWARDPASS_REGISTERS_128
#undef FORWARDPASS_REGISTERS_192
#undef FORWARDPASS_REGISTERS_256
#undef FORWARDPASS_NUMBER
#undef FORWARDPASS_float
#undef FORWARDPASS_int32_t
#undef FORWARDPASS_WGMMA
#undef FORWARDPASS_WGMMA_REGISTERS
#undef FORWARDPASS_K16
#undef FORWARDPASS_REGISTERS_K16

}  // namespace forwardpass::ptx
