#include "rows/matrix_descriptor.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "rows/async.h"

namespace gpuless {
namespace {

constexpr uint32_t field(uint64_t bits, int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; }

// Shared memory as a sequence of reads of whole granules, checked many at a time.
class Reader {
 public:
  Reader(Cta& cta, const Actor& actor, uint32_t used) : cta_(cta), actor_(actor), checks_(checked(cta)), used_(used) {}
  const uint8_t* operator()(uint32_t address, uint32_t bytes) {
    if (address + bytes > cta_.shared.size()) {
      check();
      fault(Kind::out_of_bounds,
            "a matrix descriptor reaches beyond the block's " + std::to_string(cta_.shared.size()) +
                " bytes of shared memory",
            address);
    }
    for (uint32_t granule = address; granule < address + bytes; granule += 16) {
      if (used_ < 16) {
        if (checks_) cta_.shadow.read(actor_, granule, used_);
        continue;
      }
      if (count_ == kLanes) check();
      granules_[count_++] = granule;
    }
    return cta_.shared.data() + address;
  }
  void check() {
    constexpr LaneSet kNobody[8] = {};  // an operation of the async proxy is no lane's
    const int count = std::exchange(count_, 0);
    if (!count || !checks_) return;
    cta_.shadow.access_granules(actor_, granules_, kAllLanes >> (kLanes - count), kNobody, Use::read);
  }

 private:
  Cta& cta_;
  const Actor& actor_;
  const bool checks_;
  const uint32_t used_;
  uint64_t granules_[kLanes];
  int count_ = 0;
};

}  // namespace

MatrixDescriptor::MatrixDescriptor(uint64_t bits)
    : start(field(bits, 0)),
      leading(field(bits, 16)),
      stride(field(bits, 32)),
      base_offset(static_cast<uint32_t>(bits >> 49 & 7)) {
  constexpr int kChunks[] = {1, 8, 4, 2};  // none, 128, 64, 32 bytes
  chunks = kChunks[bits >> 62];
  if (bits >> 61 == 1) {
    chunks = 8;
    pairs = true;
  }
}

const char* illegal_descriptor(uint64_t bits, bool tcgen05) {
  constexpr uint64_t kFields = 0xc00e3fff3fff3fff, kVersion = uint64_t{7} << 46, kSwizzle = uint64_t{1} << 61;
  if (tcgen05) {
    if ((bits & kVersion) != uint64_t{1} << 46) return "bits 46 to 48, its version, must be 1";
    if (bits & kSwizzle && bits >> 61 != 1) return "there is no such swizzle: bits 61 to 63 are 0, 1, 2, 4 or 6";
  }
  if (bits & ~(tcgen05 ? kFields | kVersion | kSwizzle : kFields)) {
    return "bits are set outside its fields: encode addresses and offsets as (x & 0x3ffff) >> 4";
  }
  if (!tcgen05 && bits >> 62 == 0 && (bits >> 49 & 7)) return "a base offset needs a swizzle";
  return nullptr;
}

void gather(Cta& cta, const MatrixDescriptor& d, bool transposed, int first, int count, const Actor& actor,
            uint32_t (*fragments)[2][32], uint32_t element, uint32_t halves) {
  Reader read(cta, actor, d.used);
  const uint32_t phases = d.pairs ? 3 : d.chunks - 1, row = d.chunks * 16, shift = d.pairs ? 5 : 4;
  const auto swizzled = [&](uint32_t address) {
    return address ^ ((((address >> 7) - d.base_offset) & phases) << shift);
  };
  for (int t = 0; t < count; ++t) {
    const int tile = first + t;
    if (!transposed && d.chunks > 1 && d.start % 32 == 0 && halves == 2) {  // the swizzle keeps the two halves together
      for (int r = 0; r < 8; ++r) {
        const uint32_t address = swizzled(d.start + tile * d.stride + r * row), flip = address & 16;
        const uint8_t* const both = read(address - flip, 32);
        std::memcpy(&fragments[t][0][r * 4], both + flip, 16);
        std::memcpy(&fragments[t][1][r * 4], both + (flip ^ 16), 16);
      }
      continue;
    }
    if (!transposed) {
      const uint32_t half = d.chunks == 1 ? d.leading : 16;
      for (int r = 0; r < 8; ++r) {
        for (uint32_t h = 0; h < halves; ++h) {
          std::memcpy(&fragments[t][h][r * 4], read(swizzled(d.start + tile * d.stride + r * row + h * half), 16), 16);
        }
      }
      continue;
    }
    // 16 bytes are consecutive along M or N, for one k; without a swizzle the two offsets swap roles.
    if (element != 2 || d.pairs) {
      const uint32_t per_chunk = 16 / element, depth = d.pairs ? 4 : 8, some = std::min(8u, per_chunk);
      for (uint32_t k = 0; k < 32 / element; ++k) {
        for (uint32_t r = 0; r < 8; r += some) {
          const uint32_t chunk = (tile * 8 + r) / per_chunk, within = (tile * 8 + r) % per_chunk * element;
          const uint32_t across =
              d.chunks == 1 ? chunk * d.stride : chunk / d.chunks * d.leading + chunk % d.chunks * 16;
          const uint32_t along = k / depth * (d.chunks == 1 ? d.leading : d.stride) + k % depth * row;
          const uint8_t* from = read(swizzled(d.start + across + along + within), some * element);
          auto* const to = reinterpret_cast<uint8_t*>(fragments[t][k * element / 16]);
          for (uint32_t n = 0; n < some; ++n) {
            std::memcpy(to + (r + n) * 16 + k * element % 16, from + n * element, element);
          }
        }
      }
      continue;
    }
    const uint32_t across = d.chunks == 1 ? tile * d.stride : tile / d.chunks * d.leading + tile % d.chunks * 16;
    const uint32_t along = d.chunks == 1 ? d.leading : d.stride;
    for (uint32_t h = 0; h < 2; ++h) {
      uint32_t block[32];
      for (uint32_t k = 0; k < 8; ++k) {
        std::memcpy(block + k * 4, read(swizzled(d.start + across + h * along + k * row), 16), 16);
      }
      transpose(block, fragments[t][h]);
    }
  }
  read.check();
}

}  // namespace gpuless
