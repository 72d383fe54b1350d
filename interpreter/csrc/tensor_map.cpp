#include "tensor_map.h"

#include <cstring>

#include "core.h"

namespace gpuless {
namespace {

// By CUtensorMapDataType.
struct Element {
  const char* name;
  uint8_t bytes;     // 0: 4 or 6 bits
  uint32_t nan;      // the fill by NaN (the canonical one of PTX); 0: not a floating-point type
  bool flush, tf32;  // what a load does to it
};
constexpr Element kElements[] = {
    {"UINT8", 1, 0, false, false},
    {"UINT16", 2, 0, false, false},
    {"UINT32", 4, 0, false, false},
    {"INT32", 4, 0, false, false},
    {"UINT64", 8, 0, false, false},
    {"INT64", 8, 0, false, false},
    {"FLOAT16", 2, 0x7fff, false, false},
    {"FLOAT32", 4, 0x7fffffff, false, false},
    {"FLOAT64", 8, 0x7fffffff, false, false},
    {"BFLOAT16", 2, 0x7fff, false, false},
    {"FLOAT32_FTZ", 4, 0x7fffffff, true, false},
    {"TFLOAT32", 4, 0x7fffffff, false, true},
    {"TFLOAT32_FTZ", 4, 0x7fffffff, true, true},
    {"16U4_ALIGN8B", 0, 0, false, false},
    {"16U4_ALIGN16B", 0, 0, false, false},
    {"16U6_ALIGN16B", 0, 0, false, false},
};
constexpr uint8_t kTypes = sizeof kElements / sizeof *kElements;

constexpr int kSuccess = 0, kInvalidValue = 1, kNotSupported = 801;  // CUresult
thread_local std::string error;

std::string number(uint64_t n) { return std::to_string(n); }
std::string of_dim(const char* array, int d) { return std::string(array) + "[" + std::to_string(d) + "]"; }

template <class T>
T saturated(int64_t value) {  // what does not fit is out of every limit
  const int64_t highest = static_cast<T>(~T{0});
  return static_cast<T>(value < 0 || value > highest ? highest : value);
}

// What exists and is not modelled here.
std::string not_supported(const TensorMap& m) {
  if (m.interleave == 1 || m.interleave == 2) return "interleaved layouts are not supported; use INTERLEAVE_NONE";
  if (m.swizzle == 5) return "the 128-byte swizzle of 32-byte atoms that flips 8 bytes is not supported";
  if (m.swizzle == 6) return "the 128-byte swizzle of 64-byte atoms is not supported";
  if (m.im2col && m.padded()) return "im2col of elements that are padded is not supported";
  return "";
}

// Of an im2col map, its own limits: the corners have 16, 8 or 5 bits each, by how many there are.
std::string column_problem(const TensorMap& m) {
  if (m.rank < 3) return "tensorRank must be 3 to 5 for im2col, not " + number(m.rank);
  if (m.column.channels < 1 || m.column.channels > 256) {
    return "channelsPerPixel must be 1 to 256, not " + number(m.column.channels);
  }
  if (m.column.pixels < 1 || m.column.pixels > 1024) {
    return "pixelsPerColumn must be 1 to 1024, not " + number(m.column.pixels);
  }
  const int most = m.rank == 3 ? 32767 : m.rank == 4 ? 127 : 15;
  for (int d = 0; d < m.rank - 2; ++d) {
    const int lower = m.column.lower[d], upper = m.column.upper[d];
    if (std::min(lower, upper) < -most - 1 || std::max(lower, upper) > most) {
      return "pixelBoxLowerCorner and pixelBoxUpperCorner must be " + std::to_string(-most - 1) + " to " +
             std::to_string(most) + " for rank " + number(m.rank) + ", not " + std::to_string(lower) + " and " +
             std::to_string(upper);
    }
    if (static_cast<int64_t>(m.dims[d + 1]) + upper <= lower) return "the bounding box of pixels must not be empty";
  }
  return "";
}

}  // namespace

constexpr uint8_t k16U4Align8 = 13, k16U6Align16 = 15;

uint32_t TensorMap::element_bits() const {
  return kElements[type].bytes ? kElements[type].bytes * 8 : type == k16U6Align16 ? 6 : 4;
}

bool TensorMap::padded() const { return type > k16U4Align8; }

std::string TensorMap::problem() const {
  if (type >= kTypes) return "tensorDataType " + number(type) + " is not a CUtensorMapDataType";
  if (interleave > 2) return "interleave " + number(interleave) + " is not a CUtensorMapInterleave";
  if (swizzle > 6) return "swizzle " + number(swizzle) + " is not a CUtensorMapSwizzle";
  if (promotion > 3) return "l2Promotion " + number(promotion) + " is not a CUtensorMapL2promotion";
  if (fill > 1) return "oobFill " + number(fill) + " is not a CUtensorMapFloatOOBfill";
  if (rank < 1 || rank > kMaxRank) return "tensorRank must be 1 to 5, not " + number(rank);
  if (std::string s = not_supported(*this); !s.empty()) return s;
  const Element& element = kElements[type];
  if (address % 16) return "globalAddress must be aligned to 16 bytes";
  if (im2col) {
    if (std::string s = column_problem(*this); !s.empty()) return s;
  }
  for (int d = 0; d < rank; ++d) {
    if (dims[d] < 1 || dims[d] > uint64_t{1} << 32) {
      return of_dim("globalDim", d) + " must be 1 to 2^32, not " + number(dims[d]);
    }
    if (!im2col && (box[d] < 1 || box[d] > 256)) {
      return of_dim("boxDim", d) + " must be 1 to 256, not " + number(box[d]);
    }
    if (steps[d] < 1 || steps[d] > 8) return of_dim("elementStrides", d) + " must be 1 to 8, not " + number(steps[d]);
  }
  // The documentation also builds each stride from the one before it. Drivers take any, and tensors whose dimensions
  // are permuted or broadcast need that.
  for (int d = 0; d + 1 < rank; ++d) {
    if (strides[d] % 16 || strides[d] >= uint64_t{1} << 40) {
      return of_dim("globalStrides", d) + " must be a multiple of 16 bytes below 2^40, not " + number(strides[d]);
    }
  }
  if (padded()) {
    const auto aligned = [](uint64_t n) { return n % 32 == 0; };
    if (!aligned(address) || !std::all_of(strides, strides + rank - 1, aligned)) {
      return "globalAddress and globalStrides must be multiples of 32 bytes for elements that are padded";
    }
    if (dims[0] % 128 || box[0] != 128) {
      return "globalDim[0] must be a multiple of 128 and boxDim[0] 128 for elements that are padded, not " +
             number(dims[0]) + " and " + number(box[0]);
    }
    if (swizzle && swizzle != 3) return "the swizzle must be none or of 128 bytes for elements that are padded";
  }
  if (element_bits() < 8 && dims[0] % 2) return "globalDim[0] must be even for elements of 4 bits";
  const std::string width = im2col ? "channelsPerPixel" : "boxDim[0]";
  if (row_bytes() % 16) {
    return width + " times the element's size must be a multiple of 16 bytes, not " + number(row_bytes());
  }
  if (swizzle && row_bytes() > swizzle_bytes()) {
    return width + " times the element's size must be at most the swizzle's " + number(swizzle_bytes()) +
           " bytes, not " + number(row_bytes());
  }
  if (fill && !element.nan) return "oobFill by NaN needs a floating-point tensorDataType";
  return "";
}

void TensorMap::finish_row(uint8_t* row, uint32_t begin, uint32_t end) const {
  const Element& element = kElements[type];
  const uint32_t bytes = in_global(box[0]);
  if (element.flush || element.tf32) {
    for (uint32_t byte = begin; byte < end; byte += 4) {
      uint32_t bits;
      std::memcpy(&bits, row + byte, 4);
      const uint32_t exponent = bits >> 23 & 0xff;
      if (element.flush && exponent == 0) bits &= 0x80000000;
      // To nearest even, infinities and NaNs as they are: what hardware was seen to do, no document says it.
      if (element.tf32 && exponent != 0xff) bits = (bits + 0xfff + (bits >> 13 & 1)) & ~0x1fffu;
      std::memcpy(row + byte, &bits, 4);
    }
  }
  if (!element.bytes) {
    std::fill(row, row + begin, 0);
    std::fill(row + end, row + bytes, 0);
    const uint32_t piece = in_global(16);
    for (uint32_t n = padded() ? box[0] / 16 : 0; n--;) {
      std::memmove(row + n * 16, row + n * piece, piece);
      std::fill(row + n * 16 + piece, row + n * 16 + 16, 0);
    }
    return;
  }
  if (begin == 0 && end == bytes) return;
  uint64_t value = 0;
  if (fill) value = element.bytes == 8 ? uint64_t{element.nan} << 32 | 0xffffffff : element.nan;
  for (uint32_t byte = 0; byte < bytes; byte += element.bytes) {
    if (byte < begin || byte >= end) std::memcpy(row + byte, &value, element.bytes);
  }
}

}  // namespace gpuless

using namespace gpuless;

namespace {

// What both kinds of maps say; set_box(map) the rest. boxes: whether there are the arrays that it reads, by their name.
template <class F>
int encode(void* map, int data_type, uint32_t rank, void* address, const uint64_t* dims, const uint64_t* strides_bytes,
           const uint32_t* element_strides, int interleave, int swizzle, int l2_promotion, int oob_fill, bool boxes,
           const char* name, F set_box) {
  return guarded([&]() -> int {
    error.clear();
    TensorMap m{};
    m.magic = TensorMap::kMagic;
    m.address = reinterpret_cast<uint64_t>(address);
    m.type = saturated<uint8_t>(data_type);
    m.rank = saturated<uint8_t>(rank);
    m.interleave = saturated<uint8_t>(interleave);
    m.swizzle = saturated<uint8_t>(swizzle);
    m.promotion = saturated<uint8_t>(l2_promotion);
    m.fill = saturated<uint8_t>(oob_fill);
    if (!map || reinterpret_cast<uint64_t>(map) % 64) {
      error = "tensorMap must point to 128 bytes aligned to 64";
    } else if (!address || !dims || !boxes || !element_strides || (rank > 1 && !strides_bytes)) {
      error = std::string("globalAddress, globalDim, globalStrides, ") + name + " and elementStrides must not be null";
    } else {
      for (int d = 0; d < std::min<int>(m.rank, TensorMap::kMaxRank); ++d) {
        m.dims[d] = dims[d];
        // "ignored since TMA doesn't support the stride for dimension zero", but its limits hold
        m.steps[d] = saturated<uint16_t>(element_strides[d]);
        if (d) m.strides[d - 1] = strides_bytes[d - 1];
      }
      set_box(m);
      error = m.problem();
    }
    if (!error.empty()) return not_supported(m).empty() ? kInvalidValue : kNotSupported;
    std::memcpy(map, &m, sizeof m);
    return kSuccess;
  });
}

}  // namespace

extern "C" {

int gpuless_tensor_map_encode_tiled(void* map, int data_type, uint32_t rank, void* address, const uint64_t* dims,
                                    const uint64_t* strides_bytes, const uint32_t* box, const uint32_t* element_strides,
                                    int interleave, int swizzle, int l2_promotion, int oob_fill) {
  return encode(map, data_type, rank, address, dims, strides_bytes, element_strides, interleave, swizzle, l2_promotion,
                oob_fill, box, "boxDim", [&](TensorMap& m) {
                  for (int d = 0; d < std::min<int>(m.rank, TensorMap::kMaxRank); ++d) m.box[d] = box[d];
                });
}

int gpuless_tensor_map_encode_im2col(void* map, int data_type, uint32_t rank, void* address, const uint64_t* dims,
                                     const uint64_t* strides_bytes, const int* lower, const int* upper,
                                     uint32_t channels, uint32_t pixels, const uint32_t* element_strides,
                                     int interleave, int swizzle, int l2_promotion, int oob_fill) {
  return encode(map, data_type, rank, address, dims, strides_bytes, element_strides, interleave, swizzle, l2_promotion,
                oob_fill, lower && upper, "pixelBoxLowerCorner, pixelBoxUpperCorner", [&](TensorMap& m) {
                  const auto corner = [](int c) { return static_cast<int16_t>(std::clamp(c, -32768, 32767)); };
                  m.im2col = true;
                  m.column = {channels, pixels, {}, {}};
                  for (int d = 0; d < std::min<int>(m.rank, TensorMap::kMaxRank) - 2; ++d) {
                    m.column.lower[d] = corner(lower[d]);
                    m.column.upper[d] = corner(upper[d]);
                  }
                });
}

const char* gpuless_tensor_map_error(void) { return error.c_str(); }

}  // extern "C"
