// The int8 GEMM on a CPU: one design for every tier.
//
// The multiplications cost less time than the memory traffic around them: of 1024 x 384 times 384 x 384 they are 75 us
// of one core with AMX, but the 1.6 MB of int32 sums are written by one pass and read by the next. So a block of 32
// rows at a time goes through all three steps in a core's own caches: quantisation, product with all of b, epilogue.
// The last two take some columns at a time.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <optional>

#include "cpu/int8_blocks.h"
#include "cpu/row_chunks.h"
#include "cpu/vector.h"
#include "torch/check.h"

namespace forwardpass::cpu {
namespace {

// Of sums of 32 rows, 256 KB. 128, whose sums stay in L1, take the same time.
constexpr int64_t kChunkColumns = 2048;

struct PackedHeader {
  uint64_t magic;
  int64_t tier, rows, columns, excess_pairs;
  uint64_t checksum;  // of b
  int64_t verify;     // whether the checksum is looked at
};
constexpr uint64_t kMagic = 0x3230'6465'6b63'6170;  // "packed02"
static_assert(sizeof(PackedHeader) <= 64);

// Where the parts of a packed weight are. The excess follows them.
struct Layout {
  int64_t columns, depth, used_columns, used_depth, tiles, corrections, ends, bytes;
  explicit Layout(const Matrix& b)
      : columns(round_up(b.rows, kColumnStep)),
        depth(round_up(b.columns, kTileBytes)),
        used_columns(round_up(b.rows, kTileRows)),
        used_depth(round_up(b.columns, 4)),
        tiles(64),
        corrections(tiles + columns * depth),
        ends(corrections + columns * 4),
        bytes(ends + columns * 4) {}

  PackedWeight view(const uint8_t* memory, const ExcessPair* excess) const {
    return {columns,
            depth,
            used_columns,
            used_depth,
            memory + tiles,
            reinterpret_cast<const int32_t*>(memory + corrections),
            reinterpret_cast<const uint32_t*>(memory + ends),
            excess};
  }
};

// In 64 lanes of 32 bits, of whatever vectors. The change of one element changes it for certain, any other one but for
// one case in 2^32.
template <class V>
INLINE uint64_t checksum_rows(const Matrix& b, int64_t first, int64_t last) {
  using U = Uints<V>;
  constexpr int64_t kStep = 256, kVectors = kStep / sizeof(U);
  U sums[kVectors] = {};
  const auto add = [&](const uint8_t* p) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i)
      sums[i] = (sums[i] ^ load_bits<U>(reinterpret_cast<const uint32_t*>(p) + i * kLanes<V>, kLanes<V>)) * 0x9e3779b1u;
  };
  for (int64_t r = first; r < last; ++r) {
    const uint8_t* row = static_cast<const uint8_t*>(b.data) + r * b.stride;
    int64_t c = 0;
    for (; c + kStep <= b.columns; c += kStep) add(row + c);
    if (c == b.columns) continue;
    uint8_t rest[kStep] = {};
    std::memcpy(rest, row + c, b.columns - c);
    add(rest);
  }
  uint64_t total = static_cast<uint64_t>(first);
  for (const U& sum : sums)
    for (int i = 0; i < kLanes<V>; ++i) total = (total ^ sum[i]) * 0x9e37'79b9'7f4a'7c15u;
  return total;
}

// Of rows of b, added up, so that threads share the work.
uint64_t checksum(const Matrix& b) {
  constexpr int64_t kRows = 64;
  std::atomic<uint64_t> total{0};
  torch::stable::parallel_for(0, (b.rows + kRows - 1) / kRows, (1 << 18) / (kRows * b.columns) + 1,
                              [&](int64_t begin, int64_t end) {
                                with_vectors(VECTOR_CODE {
                                  for (int64_t i = begin; i < end; ++i)
                                    total += checksum_rows<V>(b, i * kRows, std::min(b.rows, (i + 1) * kRows));
                                });
                              });
  return total;
}

// b, packed: all of it but what was taken out in `memory`.
struct Packed {
  Layout layout;
  WeightMemory memory;

  Packed(const Int8Kernel& kernel, const Matrix& b, WeightMemory used = {}) : layout(b), memory(std::move(used)) {
    if (memory.bytes < layout.bytes) memory.lines = allocate(memory.bytes = layout.bytes);
    uint8_t* to = memory.lines[0].bytes;
    auto& excess = memory.excess;
    excess.clear();
    const int64_t strips = layout.columns / kTileRows;
    std::vector<StripExcess> by_strip(strips);
    torch::stable::parallel_for(0, strips, 4, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i)
        kernel.pack_strip(b, i, layout.depth, to + layout.tiles + i * kTileRows * layout.depth,
                          reinterpret_cast<int32_t*>(to + layout.corrections) + i * kTileRows, by_strip[i]);
    });
    auto ends = reinterpret_cast<uint32_t*>(to + layout.ends);
    for (const StripExcess& strip : by_strip) {
      for (const uint32_t end : strip.ends) *ends++ = static_cast<uint32_t>(excess.size()) + end;
      excess.insert(excess.end(), strip.pairs.begin(), strip.pairs.end());
    }
  }
  PackedWeight weight() const { return layout.view(memory.lines[0].bytes, memory.excess.data()); }
};

// What is packed, where it is b.
std::optional<PackedWeight> packed_weight(const Int8Weight& w) {
  if (!w.packed_bytes) return {};
  PackedHeader header{};
  const Layout layout(w.b);
  const bool has_header = w.packed_bytes >= layout.bytes && reinterpret_cast<uintptr_t>(w.packed) % 64 == 0;
  if (has_header) std::memcpy(&header, w.packed, sizeof(header));
  STD_TORCH_CHECK(header.magic == kMagic && header.rows == w.b.rows && header.columns == w.b.columns &&
                      w.packed_bytes == layout.bytes + header.excess_pairs * int64_t{sizeof(ExcessPair)},
                  "packed must be what pack_int8_weight returned for this weight");
  if (header.tier != int64_t(tier()) || (header.verify && header.checksum != checksum(w.b))) return {};
  return layout.view(w.packed, reinterpret_cast<const ExcessPair*>(w.packed + layout.bytes));
}

// How many of b's columns a thread takes at a time: all, but where there are few blocks of rows so many that threads
// have equal shares. They are 2^20 multiply-adds at least, about 5 us. Rows that are quantised are whole.
int64_t columns_of_part(int64_t blocks, const PackedWeight& b, bool whole) {
  if (whole) return b.columns;
  const int64_t threads = torch::stable::get_num_threads();
  if (blocks >= 4 * threads) return b.columns;
  const int64_t parts =
      std::max<int64_t>(1, std::min(threads / std::gcd(blocks, threads), kBlockRows * b.columns * b.depth >> 20));
  return round_up((b.columns + parts - 1) / parts, kColumnStep);
}

// Threads take blocks of rows, or, where these are too few to be shared evenly, parts of a block's columns; all rows
// are quantised before those. Two threads then multiply 32 rows by 320 x 320 2.2 times as fast as in fp32 with VNNI
// and 1.27 times with AVX2; blocks alone gave 1.43 and 0.88.
//
// An MLP's two products as one, so that what is between them stays in a core's caches, would gain little: with all
// blocks' intermediates in the same 32 rows, which nothing can beat, 1024 and 4096 rows times 384 x 1536 and 768 x 3072
// and back took one thread 6 to 8 % less time with VNNI and 3 to 5 % less with AVX2, two threads less than that. One
// quantisation for q, k and v in place of three is 1.4 % of a MiniLM layer's time.
void multiply_blocks(const Int8Kernel& kernel, const Int8Rows& a, int64_t n, const PackedWeight& b,
                     const Epilogue& epilogue) {
  const int64_t m = a.rows, blocks = (m + kBlockRows - 1) / kBlockRows;
  const int64_t a_stride = stride_of_block(b.depth);
  const int64_t block_bytes = kBlockRows * a_stride, scratch_bytes = kernel.scratch_bytes_per_column * b.depth;
  const bool whole = epilogue.group_scale;
  const int64_t part_columns = columns_of_part(blocks, b, whole), parts = (b.columns + part_columns - 1) / part_columns,
                chunk_columns = whole ? part_columns : std::min(kChunkColumns, part_columns);
  const auto multiply = [&](int64_t block, int64_t first_column, int64_t end_column, const uint8_t* rows,
                            const uint8_t* scratch, const CacheLines& sums) {
    const int64_t r = block * kBlockRows, count = std::min(kBlockRows, m - r);
    multiply_block(kernel, {rows, a_stride, count, scratch, reinterpret_cast<int32_t*>(sums[0].bytes), chunk_columns},
                   n, b, first_column, end_column, rows_from(epilogue, r));
  };
  const auto allocate_sums = [&] { return allocate(kBlockRows * chunk_columns * 4); };
  if (parts == 1) {
    return torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      const CacheLines rows = allocate(block_bytes), scratch = allocate(scratch_bytes), sums = allocate_sums();
      for (int64_t i = first; i < last; ++i) {
        a.load(i * kBlockRows, std::min(kBlockRows, m - i * kBlockRows), rows[0].bytes, a_stride);
        kernel.prepare_block(b, rows[0].bytes, a_stride, scratch[0].bytes);
        multiply(i, 0, b.columns, rows[0].bytes, scratch[0].bytes, sums);
      }
    });
  }
  const CacheLines rows = allocate(blocks * block_bytes), scratch = allocate(blocks * scratch_bytes);
  a.load(0, m, rows[0].bytes, a_stride);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      kernel.prepare_block(b, rows[0].bytes + i * block_bytes, a_stride, scratch[0].bytes + i * scratch_bytes);
  });
  // All blocks with the first part of the columns come first, so that a thread reads the less of b.
  torch::stable::parallel_for(0, blocks * parts, 1, [&](int64_t first, int64_t last) {
    const CacheLines sums = allocate_sums();
    for (int64_t i = first; i < last; ++i) {
      const int64_t block = i % blocks, c = i / blocks * part_columns;
      multiply(block, c, std::min(b.columns, c + part_columns), rows[0].bytes + block * block_bytes,
               scratch[0].bytes + block * scratch_bytes, sums);
    }
  });
}

void multiply_rows(const Int8Kernel& kernel, const Int8Rows& a, const Matrix& b, const Epilogue& epilogue) {
  const int64_t m = a.rows, k = a.columns, depth = round_up(k, kTileBytes), bytes = m * depth;
  const CacheLines rows = allocate(bytes), prepared = allocate(bytes * kernel.few_bytes), corrections = allocate(m * 4);
  a.load(0, m, rows[0].bytes, depth);
  for (int64_t r = 0; r < m; ++r) std::memset(rows[0].bytes + r * depth + k, 0, depth - k);
  const FewRows few{prepared[0].bytes, m, depth * kernel.few_bytes, reinterpret_cast<uint32_t*>(corrections[0].bytes)};
  kernel.prepare_few(rows[0].bytes, m, depth, prepared[0].bytes, reinterpret_cast<uint32_t*>(corrections[0].bytes));
  multiply_few_rows<Dtype::i32>(m, b, epilogue, [&](int64_t first, int64_t last, int32_t* sums, int64_t stride) {
    kernel.multiply_few(few, b, first, last, sums, stride);
  });
}

}  // namespace

const Int8Kernel* int8_kernel([[maybe_unused]] Tier t) {
#if defined(__x86_64__)
  switch (t) {
    case Tier::baseline:
      return nullptr;
    case Tier::avx2:
    case Tier::avx512:
      return &avx2_int8();
    case Tier::avx_vnni:
      return &avx_vnni_int8();
    case Tier::avx512_vnni:
      return &avx512_vnni_int8();
    case Tier::amx:
      return &amx_int8();
  }
#endif
  return nullptr;
}

void multiply_block(const Int8Kernel& kernel, const Int8Block& block, int64_t n, const PackedWeight& b, int64_t first,
                    int64_t end, const Epilogue& epilogue) {
  for (int64_t c = first; c < end; c += block.chunk_columns) {
    const int64_t columns = std::min(block.chunk_columns, end - c);
    kernel.multiply_block(b, block.rows, block.stride, block.count, block.scratch, c / kTileRows, columns / kTileRows,
                          block.sums);
    dequant_activation_cpu(
        {{block.sums, Dtype::i32, block.count, std::min(columns, n - c), columns}, columns_from(epilogue, c)});
  }
}

PackedWeight weight_for_blocks(const Int8Kernel& kernel, const Int8Weight& w, WeightMemory& memory) {
  if (const auto packed = packed_weight(w)) return *packed;
  Packed packed(kernel, w.b, std::move(memory));
  const PackedWeight weight = packed.weight();
  memory = std::move(packed.memory);
  return weight;
}

void int8_product(const Int8Kernel& kernel, const Int8Rows& a, const Int8Weight& weight, const Epilogue& epilogue) {
  const Matrix& b = weight.b;
  if (a.rows <= kernel.few_rows) return multiply_rows(kernel, a, b, epilogue);
  if (const auto packed = packed_weight(weight)) return multiply_blocks(kernel, a, b.rows, *packed, epilogue);
  if (a.rows <= kernel.few_rows_unpacked) return multiply_rows(kernel, a, b, epilogue);
  multiply_blocks(kernel, a, b.rows, Packed(kernel, b).weight(), epilogue);
}

void pack_weight(Tier t, const Matrix& b, bool verify, const std::function<uint8_t*(int64_t bytes)>& allocate) {
  const Int8Kernel* kernel = int8_kernel(t);
  if (!kernel || (verify && !kernel->keeps_packed)) return;
  const Packed packed(*kernel, b);
  const int64_t bytes = packed.layout.bytes, excess = packed.memory.excess.size() * sizeof(ExcessPair);
  uint8_t* to = allocate(bytes + excess);
  std::memcpy(to, packed.memory.lines[0].bytes, bytes);
  std::memcpy(to + bytes, packed.memory.excess.data(), excess);
  const PackedHeader header{kMagic,      int64_t(t), b.rows, b.columns, int64_t(packed.memory.excess.size()),
                            checksum(b), verify};
  std::memset(to, 0, packed.layout.tiles);  // the same weight has the same bytes
  std::memcpy(to, &header, sizeof(header));
}

}  // namespace forwardpass::cpu
