#include "rows/block_scale.h"

#include <cstring>

#include "formats.h"

namespace gpuless {
namespace {

// The code of e4m3 for each code of a narrow type. None has infinities or NaN.
struct Table {
  uint8_t codes[4][64];
  Table() {
    fill<E2m1>(Narrow::e2m1);
    fill<E2m3>(Narrow::e2m3);
    fill<E3m2>(Narrow::e3m2);
  }
  template <class F>
  void fill(Narrow narrow) {
    for (uint32_t code = 0; code < F::kSign * 2; ++code) {
      codes[static_cast<int>(narrow)][code] = static_cast<uint8_t>(encode<E4m3>(decode<F>(code)));
    }
  }
};

}  // namespace

Narrow narrow_of(std::string_view name) {
  return name == "e2m1" ? Narrow::e2m1 : name == "e2m3" ? Narrow::e2m3 : name == "e3m2" ? Narrow::e3m2 : Narrow::none;
}

void widen(Narrow narrow, Packing packing, Fragment from, uint32_t (*to)[32]) {
  static const Table table;
  const uint8_t* const codes = table.codes[static_cast<int>(narrow)];
  const int bits = narrow == Narrow::e2m1 ? 4 : 6;
  const int elements = packing == Packing::close ? 32 : 16;
  for (int row = 0; row < 8; ++row) {
    uint8_t packed[17] = {};
    std::memcpy(packed, from + row * 4, 16);
    for (int k = 0; k < elements; ++k) {
      const int bit = packing == Packing::bytes ? k * 8 + (narrow == Narrow::e2m1 ? 2 : 0) : k * bits;
      const int two = packed[bit / 8] | packed[bit / 8 + 1] << 8;
      reinterpret_cast<uint8_t*>(to[k / 16])[row * 16 + k % 16] = codes[two >> bit % 8 & ((1 << bits) - 1)];
    }
  }
}

float scale_of(ScaleType type, uint32_t byte) {
  return type == ScaleType::ue4m3 ? decode<E4m3>(byte & 0x7f) : from_e8m0(byte & 0xff);
}

void multiply_scaled(const Product& product, const PanelA& a, const PanelB& b, int tiles, const float rows[16],
                     const float* columns, uint32_t* sums) {
  alignas(64) static thread_local uint32_t products[kMaxTiles * 128];
  std::memset(products, 0, tiles * 512);
  multiply(product, a, b, tiles, products);
  for (int k = 0; k < tiles * 128; ++k) {
    const double scale = double{rows[k % 128 / 64 * 8 + k % 32 / 4]} * columns[k / 128 * 8 + k % 4 * 2 + k / 32 % 2];
    const double sum = bit_cast<float>(sums[k]) + bit_cast<float>(products[k]) * scale;
    sums[k] = bit_cast<uint32_t>(static_cast<float>(sum));
  }
}

}  // namespace gpuless
