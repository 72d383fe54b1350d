#pragma once
// The instruction that adds the products of four bytes, unsigned by signed, to an int32.
#include "cpu/vector.h"

#if defined(__x86_64__)
namespace forwardpass::cpu {

// kVex: as AVX-VNNI encodes the instruction, with 256 bits; AVX-512 encodes it anew. Written as assembly, as an
// intrinsic could only be inlined into functions of its own target, and these are templates over both.
template <int kLanes, bool kVex = false>
struct Vnni {
  static constexpr int kWidth = kLanes;
  using Ints = typename Vectors<kLanes>::i32;
  using Floats = typename Vectors<kLanes>::f32;

  INLINE static Ints load(const void* p) {
    Ints v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  INLINE static void store(void* p, Ints v) { std::memcpy(p, &v, sizeof(v)); }
  // Four bytes to all lanes. Of g++'s ways to write it, in a function without the target, each is made lane by lane.
  INLINE static Ints broadcast(const void* p) {
    Ints v;
    asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*static_cast<const char (*)[4]>(p)));
    return v;
  }
  INLINE static void add_products(Ints& sums, Ints unsigned_bytes, Ints signed_bytes) {
    if constexpr (kVex) {
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(unsigned_bytes), "x"(signed_bytes));
    } else {
      asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
    }
  }
};

}  // namespace forwardpass::cpu
#endif
