#pragma once
// q, k and v of attention_8bit in 8 bits: where the quantising pass writes them and attention reads them, in one
// workspace. No CUDA.
#include <cstdint>
#include <type_traits>

#include "params/attention_8bit.h"

namespace forwardpass {

// Keys of a block, which share the unit of their probabilities. Each sequence begins with a block of its own.
constexpr int kInt8Keys = 64;

// Keys of a block that share a scale, as python/forwardpass/ops/attention_8bit/reference.py groups them.
constexpr int kInt8Group = 8, kInt8Groups = kInt8Keys / kInt8Group;

// Floats of a block of keys: one for each key, four of the block, a scale for each group, and a byte for each key.
// Those from kInt8GroupScales on are there where keys are grouped.
constexpr int kInt8BlockScales = kInt8Keys, kInt8Uneven = kInt8BlockScales + 1, kInt8GroupScales = kInt8BlockScales + 4,
              kInt8Order = kInt8GroupScales + kInt8Groups, kInt8Scales = kInt8Order + kInt8Keys / 4;

// Where a key is in a block whose keys are grouped, of its number in the order of their scales: a thread's accumulators
// of eight keys after another, two a tile, are of one group.
HOST_DEVICE constexpr int int8_slot(int rank) {
  const int group = rank / kInt8Group, i = rank % kInt8Group;
  return (group / 4 * 4 + i / 2) * 8 + group % 4 * 2 + i % 2;
}

// Accumulators of int8 products begin with its bits: as a float each is then this plus the sum, below 2^22.
constexpr float kInt8Magic = 0x1.8p23f;
constexpr int32_t kInt8MagicBits = 0x4b400000;

struct Int8Operands {
  int32_t head_dim, value_dim;  // columns that there is room for: the kernel's, beyond the call's they are 0
  int64_t blocks;               // of keys of a kv head, of all sequences; of packed ones as many as there may be
  bool unsigned_v;              // v is 128 more
  bool grouped;                 // a block's keys are in the order of their scales, as int8_slot() has them
  int32_t chunks;               // of a sequence's keys, whose largest values are found separately
  int8_t* q;                    // [row, head_dim]; rows are in the order of the lse
  float *q_scale, *shift;       // of each row; shift: q times k's centre, what all scores of the row have lost
  int8_t* k;                    // [kv head, block, key, head_dim]; keys beyond the sequence's are 0
  float* scales;                // [kv head, block, kInt8Scales]; the functions below say what is where
  int8_t* v;       // [kv head, block, value_dim, key]; keys in the order of `int8_key`; int8, unsigned or e4m3
  float* v_scale;  // [sequence, kv head, value_dim]
  float* centre;   // of k: [sequence, kv head, head_dim]
  float* largest;  // of v: [sequence, kv head, chunk, value_dim]
  int64_t bytes;   // of the workspace

  // Those of a call, for a kernel of so many columns.
  static Int8Operands of(const AttentionParams& p, int head_dim, int value_dim, bool unsigned_v = false,
                         bool grouped = false) {
    Int8Operands x{.head_dim = head_dim, .value_dim = value_dim, .unsigned_v = unsigned_v, .grouped = grouped};
    const bool varlen = p.cu_seqlens_q;
    const int64_t rows = int64_t{p.heads} * p.rows * (varlen ? 1 : p.batch);
    x.blocks = varlen ? p.keys / kInt8Keys + p.batch : int64_t{p.batch} * blocks_of(p.keys);
    const int64_t keys = x.blocks * kInt8Keys * p.kv_heads, sequences = int64_t{p.batch} * p.kv_heads;
    const int64_t each = p.keys / (varlen ? p.batch : 1) / kChunkKeys;
    x.chunks = static_cast<int32_t>(each < 1 ? 1 : each < kMostChunks ? each : kMostChunks);
    auto* next = reinterpret_cast<char*>(p.workspace);
    const auto take = [&](auto*& to, int64_t n) {
      to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(next);
      next += (n * int64_t{sizeof *to} + 255) / 256 * 256;
    };
    take(x.q, rows * head_dim), take(x.q_scale, rows), take(x.shift, rows);
    take(x.k, keys * head_dim), take(x.scales, x.blocks * p.kv_heads * kInt8Scales);
    take(x.v, keys * value_dim), take(x.v_scale, sequences * value_dim);
    take(x.centre, sequences * head_dim), take(x.largest, sequences * x.chunks * value_dim);
    x.bytes = next - reinterpret_cast<char*>(p.workspace);
    return x;
  }
  // block: of all heads'. Of a key 22 bits of its scale, so that kInt8Magic times it is exact; of grouped ones the
  // scale in units of their group's.
  HOST_DEVICE float* k_scale(int64_t block, int key) const { return scales + block * kInt8Scales + key; }
  // Of unsigned v it is v_unit() times the scale.
  HOST_DEVICE float* v_block_scale(int64_t block) const { return k_scale(block, kInt8BlockScales); }
  // Where keys are grouped: whether some scale is not its group's, as of a cache or of a NaN; the groups' scales; and
  // which of the block's keys is where.
  HOST_DEVICE float* uneven(int64_t block) const { return k_scale(block, kInt8Uneven); }
  HOST_DEVICE float* group_scale(int64_t block, int group) const { return k_scale(block, kInt8GroupScales + group); }
  HOST_DEVICE uint8_t* order(int64_t block) const { return reinterpret_cast<uint8_t*>(k_scale(block, kInt8Order)); }
  // Sums of unsigned products are read as the floats that have their bits, denormal ones: the kernel would have to
  // multiply each block's weight by this.
  HOST_DEVICE float v_unit() const { return unsigned_v ? 0x1p109f : 1; }

  HOST_DEVICE static int blocks_of(int keys) { return (keys + kInt8Keys - 1) / kInt8Keys; }
  // A sequence's first block, among those of a kv head. first_key: of a packed sequence, in k.
  HOST_DEVICE static int64_t first_block(const AttentionParams& p, int sequence, int64_t first_key) {
    return p.cu_seqlens_k ? first_key / kInt8Keys + sequence : int64_t{sequence} * blocks_of(p.keys);
  }

 private:
  static constexpr int kChunkKeys = 128, kMostChunks = 16;
};

// Byte i of word w of a block's 64 bytes of v is of this key. The accumulators of q k^T, packed, are then the first
// operand of p v as they lie: thread t of a group has of each tile of eight keys 2 t and 2 t + 1, and four bytes of
// each 16 of the operand.
HOST_DEVICE constexpr int int8_key(int w, int i) { return w / 4 * 16 + i / 2 * 8 + w % 4 * 2 + i % 2; }

// Writes them: two launches, and one more to `returned`; or one of operands that are given. Returns a cudaError_t.
int quantize_attention(const Attention8bitParams& p, const Int8Operands& to, void* stream,
                       const AttentionOperands* returned = nullptr);

}  // namespace forwardpass
