// PTX's types: names, sizes, kinds.
#include <iterator>

#include "ptx.h"

namespace gpuless::ptx {
namespace {

struct TypeRow {
  std::string_view name;
  int bytes;
  char group;  // s: signed, f: float, ' ': neither
};
// In the order of Type.
constexpr TypeRow kTypes[] = {
    {"", 0, ' '},     {"pred", 4, ' '},   {"b8", 1, ' '},     {"u8", 1, ' '},     {"s8", 1, 's'},    {"b16", 2, ' '},
    {"u16", 2, ' '},  {"s16", 2, 's'},    {"f16", 2, 'f'},    {"bf16", 2, 'f'},   {"b32", 4, ' '},   {"u32", 4, ' '},
    {"s32", 4, 's'},  {"f32", 4, 'f'},    {"f16x2", 4, 'f'},  {"bf16x2", 4, 'f'}, {"tf32", 4, 'f'},  {"b64", 8, ' '},
    {"u64", 8, ' '},  {"s64", 8, 's'},    {"f64", 8, 'f'},    {"f32x2", 8, 'f'},  {"b128", 16, ' '}, {"e4m3", 1, 'f'},
    {"e5m2", 1, 'f'}, {"e4m3x2", 2, 'f'}, {"e5m2x2", 2, 'f'},
};
const TypeRow& row_of(Type t) { return kTypes[static_cast<int>(t)]; }

}  // namespace

Type type_of(std::string_view name) {
  for (size_t i = 1; i < std::size(kTypes); ++i)
    if (kTypes[i].name == name) return static_cast<Type>(i);
  return Type::none;
}
int size_of(Type t) { return row_of(t).bytes; }
bool is_signed(Type t) { return row_of(t).group == 's'; }
bool is_float(Type t) { return row_of(t).group == 'f'; }

}  // namespace gpuless::ptx
