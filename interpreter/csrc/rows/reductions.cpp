#include "rows/reductions.h"

namespace gpuless {
namespace {

template <class Op, class T>
void reduce(uint8_t* memory, const uint8_t* values, uint32_t bytes) {
  for (uint32_t byte = 0; byte < bytes; byte += sizeof(T)) {
    T value;
    std::memcpy(&value, values + byte, sizeof(T));
    exchange<T>(memory + byte, [&](T old) { return static_cast<T>(Op{}(old, value)); });
  }
}

struct Entry {
  std::string_view operation;
  Type type;
  Reduce reduce;
};
constexpr Entry entries[] = {
    {"add", Type::u32, reduce<Add, uint32_t>},
    {"add", Type::s32, reduce<Add, uint32_t>},
    {"add", Type::u64, reduce<Add, uint64_t>},
    {"add", Type::s64, reduce<Add, uint64_t>},
    {"add", Type::f16, reduce<Add, Half>},
    {"add", Type::bf16, reduce<Add, BFloat16>},
    {"add", Type::f32, reduce<AddFlushed, float>},
    {"add", Type::f64, reduce<Add, double>},
    {"min", Type::u32, reduce<Extreme<false>, uint32_t>},
    {"min", Type::s32, reduce<Extreme<false>, int32_t>},
    {"min", Type::u64, reduce<Extreme<false>, uint64_t>},
    {"min", Type::s64, reduce<Extreme<false>, int64_t>},
    {"min", Type::f16, reduce<Extreme<false>, Half>},
    {"min", Type::bf16, reduce<Extreme<false>, BFloat16>},
    {"max", Type::u32, reduce<Extreme<true>, uint32_t>},
    {"max", Type::s32, reduce<Extreme<true>, int32_t>},
    {"max", Type::u64, reduce<Extreme<true>, uint64_t>},
    {"max", Type::s64, reduce<Extreme<true>, int64_t>},
    {"max", Type::f16, reduce<Extreme<true>, Half>},
    {"max", Type::bf16, reduce<Extreme<true>, BFloat16>},
    {"inc", Type::u32, reduce<Increment, uint32_t>},
    {"dec", Type::u32, reduce<Decrement, uint32_t>},
    {"and", Type::b32, reduce<And, uint32_t>},
    {"and", Type::b64, reduce<And, uint64_t>},
    {"or", Type::b32, reduce<Or, uint32_t>},
    {"or", Type::b64, reduce<Or, uint64_t>},
    {"xor", Type::b32, reduce<Xor, uint32_t>},
    {"xor", Type::b64, reduce<Xor, uint64_t>},
};

constexpr Type kReduced[] = {Type::u8,  Type::u16, Type::u32, Type::s32,  Type::u64, Type::s64,
                             Type::f16, Type::f32, Type::f64, Type::bf16, Type::f32};  // by CUtensorMapDataType

}  // namespace

Reduce reduction(std::string_view operation, Type type) {
  for (const Entry& e : entries)
    if (e.operation == operation && e.type == type) return e.reduce;
  return nullptr;
}

Reduce reduction_of_elements(std::string_view operation, unsigned data_type) {
  if (data_type >= std::size(kReduced)) return nullptr;
  const Type type = kReduced[data_type];
  if (operation != "and" && operation != "or" && operation != "xor") return reduction(operation, type);
  const bool integer = type == Type::u32 || type == Type::s32 || type == Type::u64 || type == Type::s64;
  return integer ? reduction(operation, ptx::size_of(type) == 8 ? Type::b64 : Type::b32) : nullptr;
}

}  // namespace gpuless
