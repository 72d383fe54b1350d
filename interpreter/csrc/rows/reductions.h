#pragma once
// What atomics and reductions do to memory (ISA 9.7.13.5), with the host's atomics, as CTAs run on several threads.
#include <cstring>
#include <string_view>

#include "rows/lanewise.h"

namespace gpuless {

// Each gives what memory holds after it, from what it held before and the operands.
struct Exchange {
  template <class T>
  T operator()(T, T b) const {
    return b;
  }
};
struct CompareAndSwap {
  template <class T>
  T operator()(T old, T b, T c) const {
    return old == b ? c : old;
  }
};
struct Increment {
  uint32_t operator()(uint32_t old, uint32_t b) const { return old >= b ? 0 : old + 1; }
};
struct Decrement {
  uint32_t operator()(uint32_t old, uint32_t b) const { return old == 0 || old > b ? b : old - 1; }
};
// min and max of floats: the number, if one is NaN; -0 below +0 (ISA 9.7.3.11).
template <bool kMax>
struct Extreme {
  template <class T>
  T operator()(T old, T b) const {
    if constexpr (is_short<T>) {
      const float x = old, y = b;
      if (x != x && y != y) return T::from_bits(LayoutOf<T>::type::kNan);
      if (x != x) return b;
      if (y != y) return old;
      if (x == y) return T::from_bits(kMax ? old.bits & b.bits : old.bits | b.bits);  // only the signs may differ
      return (x > y) == kMax ? old : b;
    } else {
      return (old > b) == kMax ? old : b;
    }
  }
};
struct Add {
  template <class T>
  T operator()(T old, T b) const {
    if constexpr (is_short<T>) {
      return T(static_cast<float>(old) + static_cast<float>(b));  // 24 bits are enough for a correct second rounding
    } else if constexpr (std::is_same_v<T, float>) {
      return canonical(old + b);
    } else {
      return old + b;
    }
  }
};
// On global memory atom.add.f32 flushes subnormal inputs and results, on shared memory it does not (9.7.13.5). A
// generic address counts as global.
struct AddFlushed {
  float operator()(float old, float b) const { return canonical(flush(flush(old) + flush(b))); }
};

template <class T>
using Raw = std::conditional_t<
    sizeof(T) == 2, uint16_t,
    std::conditional_t<sizeof(T) == 4, uint32_t, std::conditional_t<sizeof(T) == 8, uint64_t, unsigned __int128>>>;

// Replaces the value in memory by f of it, and returns what it was before.
template <class T, class F>
T exchange(uint8_t* memory, F f) {
  auto* cell = reinterpret_cast<Raw<T>*>(memory);
  Raw<T> old = *const_cast<volatile Raw<T>*>(cell);
  for (;;) {
    T before;
    std::memcpy(&before, &old, sizeof(T));
    const T after = f(before);
    Raw<T> replacement;
    std::memcpy(&replacement, &after, sizeof(T));
    // The older builtin, as the newer one calls libatomic for 16 bytes.
    const Raw<T> current = __sync_val_compare_and_swap(cell, old, replacement);
    if (current == old) return before;
    old = current;
  }
}

// memory[i] = operation(memory[i], values[i]) over elements.
using Reduce = void (*)(uint8_t* memory, const uint8_t* values, uint32_t bytes);
// By the operation's modifier and the elements' type; null: there is no such reduction of asynchronous copies. f32 is
// added as in global memory, with subnormals flushed.
Reduce reduction(std::string_view operation, Type);
Reduce reduction_of_elements(std::string_view operation,
                             unsigned type);  // of a tensor map's elements, CUtensorMapDataType

}  // namespace gpuless
