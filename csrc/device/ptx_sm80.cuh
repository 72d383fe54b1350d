#pragma once
// One PTX instruction per function, with its section in the PTX ISA. sm_80 and later.
#include <cuda_runtime.h>

#include <cstdint>

#include "params/common.h"

namespace forwardpass::ptx {

// 9.7.3 max, min (.NaN): the result is NaN where either input is
__device__ inline float max_nan(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ inline float min_nan(float a, float b) {
  float d;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

// 9.7.3.21 ex2: 2^x to 2^-22.5, relative; denormals are 0
__device__ inline float ex2(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}

// Nothing for the machine: the compiler has x computed where this stands, and not anew where it is used.
__device__ inline void compute_here(uint32_t& x) { asm("" : "+r"(x)); }
__device__ inline void compute_here(int64_t& x) { asm("" : "+l"(x)); }
template <class T>
__device__ inline void compute_here(T*& x) {
  asm("" : "+l"(x));
}
// A copy of x of which the compiler does not know that it is one.
__device__ inline int32_t unknown(int32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// 9.7.9.18 createpolicy: first to be evicted from L2
__device__ inline uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// 9.7.9.8 ld.global: 16 bytes, each of which is read once: not kept in L1, in L2 by the policy. Not .nc, which is for
// data that nobody writes while the grid runs: a dependent launch begins while the kernel before it may still write.
__device__ inline uint4 ld_once(const void* p, uint64_t policy) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(policy)
               : "memory");
  return v;
}

// 9.7.9.11 st.global: 16 bytes
__device__ inline void st_global(void* p, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// An address in the shared window, as the instructions below take it.
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 9.7.9.25 cp.async: 16 bytes past L1, of which `size` come from `from` and the rest are zero
__device__ inline void cp_async_16(uint32_t to, const void* from, int size) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
__device__ inline void cp_async_16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// zeros, without a look at `from`, where `inside` does not have this bit; as a predicate of the instruction, where a
// size takes four more. All of it is in the assembly: of several bits the assembler makes predicates by one R2P, of
// values that the compiler has computed by an instruction each.
__device__ inline void cp_async_16_or_zeros(uint32_t to, const void* from, uint32_t inside, uint32_t bit) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      ".reg .b32 one;\n"
      "and.b32 one, %2, %3;\n"
      "setp.eq.b32 p, one, 0;\n"
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, p;\n"
      "}" ::"r"(to),
      "l"(from), "r"(inside), "r"(bit)
      : "memory");
}
// 4 bytes, through L1
__device__ inline void cp_async_4(uint32_t to, const void* from, int size) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// 9.7.14 ldmatrix: four 8 x 8 matrices of 16 bits, that is of 8 rows x 16 bytes; lane i holds the address of row i % 8
// of matrix i / 8
__device__ inline void ldmatrix_x4(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// the same, each matrix transposed: what has its rows in memory along k becomes the b of an mma
__device__ inline void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

#if __CUDA_ARCH__ >= 900
// 9.7.14.5.16 stmatrix: the other way; a lane gives of each matrix what ldmatrix would give it
__device__ inline void stmatrix_x4(uint32_t address, const uint32_t (&s)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(s[0]), "r"(s[1]),
               "r"(s[2]), "r"(s[3])
               : "memory");
}
#endif

// 9.7.14 mma: d [16, 8] = c + a [16, 32] b [32, 8]; exact, as sums of int8 products cannot reach 2^31 here
__device__ inline void mma_m16n8k32(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t* b, const int32_t (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

// the same of 16-bit floats, [16, 16] by [16, 8]
template <Dtype D>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                    const float (&c)[4]) {
  static_assert(D == Dtype::f16 || D == Dtype::bf16);
  if constexpr (D == Dtype::f16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

// the same of fp32 as tf32, whose last 13 bits are not read: [16, 8] by [8, 8]
__device__ inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// 9.7.13.13 griddepcontrol, nothing before sm_90. A kernel that is launched to begin before those before it have ended
// waits for them here: earlier it may neither read what they write nor write what they read.
__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on such a kernel may take what multiprocessors have left; all blocks of this one have their place.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if __CUDA_ARCH__ >= 890
// d = c + a b of e4m3, in the accumulator of the tensor cores; c may be d, or zeros, which take no registers
__device__ inline void mma_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// 9.7.9 cvt: low byte from the second operand; saturates to 448, NaN stays NaN
__device__ inline uint16_t cvt_e4m3x2(float high, float low) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(high), "f"(low));
  return d;
}
// the other way, exactly
__device__ inline uint32_t cvt_f16x2(uint16_t e4m3x2) {
  uint32_t d;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"(e4m3x2));
  return d;
}
#endif

}  // namespace forwardpass::ptx
