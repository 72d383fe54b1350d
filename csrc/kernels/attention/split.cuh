#pragma once
// Split-KV: how attention_decode divides its keys among blocks, on the device: a captured launch replays with other
// lengths.
//
// All keys that count are one list of blocks of keys: those of a sequence's first head, of its next head, then of the
// next sequence. A thread block takes an equal share of the list, which is at most a part of one head, some whole
// heads, and a part of another. A head's parts are combined in the list's order by a second kernel. Batch invariant: a
// thread block takes a part of one head whose size follows from the sequence's own length, so that nothing depends on
// the other sequences, nor on how long the table is.
#include "params/attention_decode.h"

namespace forwardpass {

constexpr int kDecodeRows = 16;       // of q that a block computes together: of all heads that share keys
constexpr int kDecodeKeys = 64;       // a block of keys
constexpr int kInvariantBlocks = 32;  // of keys that a part has at least if batch invariant: 2048 keys

// Rows of q that share keys, in groups of kDecodeRows.
HOST_DEVICE inline int decode_rows(const AttentionDecodeParams& p) { return p.heads / p.cache.heads * p.rows; }
HOST_DEVICE inline int decode_groups(const AttentionDecodeParams& p) {
  return (decode_rows(p) + kDecodeRows - 1) / kDecodeRows;
}
// The heads of a sequence's list: its kv heads, for each group of rows.
HOST_DEVICE inline int decode_heads(const AttentionDecodeParams& p) { return p.cache.heads * decode_groups(p); }
// Parts of a head if batch invariant: at most so many that those of one sequence's heads are a thread block for each
// multiprocessor, which keeps enough bytes in flight. Parts of 2048 keys without a limit took 273 MB of workspace for
// 64 sequences of 8 heads and a table of 128k keys, and 32768 thread blocks, whatever the lengths.
HOST_DEVICE inline int most_invariant_parts(const AttentionDecodeParams& p) {
  return (p.device.sms + decode_heads(p) - 1) / decode_heads(p);
}
// Thread blocks for the parts of a head, of whatever length it is.
HOST_DEVICE inline int64_t invariant_parts(const AttentionDecodeParams& p) {
  constexpr int kLeast = kDecodeKeys * kInvariantBlocks;
  const int64_t parts = (p.cache.capacity() + kLeast - 1) / kLeast, most = most_invariant_parts(p);
  return parts < most ? parts : most;
}

// The rows of q that a part is computed for, GQA's packing: up to kDecodeRows of those that share a kv head, query head
// by query head, each with the rows of its sequence.
struct PackedRows {
  const AttentionDecodeParams& p;
  const int batch, kv_head, first;

  __device__ PackedRows(const AttentionDecodeParams& p, int batch, int list_head)
      : p(p), batch(batch), kv_head(list_head / decode_groups(p)), first(list_head % decode_groups(p) * kDecodeRows) {}
  __device__ bool has(int r) const { return first + r < decode_rows(p); }
  __device__ int row(int r) const { return (first + r) % p.rows; }  // of the sequence
  __device__ int q_head(int r) const { return kv_head * (p.heads / p.cache.heads) + (first + r) / p.rows; }
  __device__ int64_t q(int r) const { return batch * p.q.batch + row(r) * p.q.row + q_head(r) * p.q.head; }
};

// The keys that rows of a sequence may attend to, [first, length), and in how many blocks: none if it is not in range.
struct DecodeKeys {
  bool in_range;
  int length, first, count;

  __device__ DecodeKeys(const AttentionDecodeParams& p, int batch) {
    in_range = p.in_range(batch);
    length = in_range ? p.cache.seq_lens[batch] : 0;
    first = in_range ? min(p.first_key(batch), length) : 0;
    count = (length - first + kDecodeKeys - 1) / kDecodeKeys;
  }
  // Blocks of a part if batch invariant.
  __device__ int invariant_blocks(const AttentionDecodeParams& p) const {
    const int most = most_invariant_parts(p);
    return max(kInvariantBlocks, (count + most - 1) / most);
  }
};

// A part of a head's keys: their blocks [begin, end).
struct DecodePart {
  int batch, head, begin, end;
  DecodeKeys keys;
  __device__ bool whole() const { return begin == 0 && end == keys.count; }
};

// The list, as a warp sees it.
struct DecodeList {
  const AttentionDecodeParams& p;
  int64_t total = 0;               // key blocks
  int64_t first_count, first_end;  // of this lane's one of the first 32 sequences, whose lengths are read once

  __device__ explicit DecodeList(const AttentionDecodeParams& p) : p(p) {
    first_count = blocks_of(threadIdx.x % 32), first_end = scan(first_count);
    each_batch([&](int, int64_t, int64_t, int64_t all) {
      total = all;
      return true;
    });
  }
  __device__ int64_t shares(int64_t blocks) const { return min(blocks, total); }
  // Where a share begins, and which share has an index.
  __device__ int64_t begin_of(int64_t share, int64_t shares) const { return total * share / shares; }
  __device__ int64_t share_of(int64_t index, int64_t shares) const { return ((index + 1) * shares - 1) / total; }

  // The sequence that has `index`, or the one that follows all, and where its blocks begin.
  __device__ void find(int64_t index, int& batch, int64_t& begin) const {
    batch = p.cache.batch, begin = total;
    each_batch([&](int first, int64_t count, int64_t end, int64_t all) {
      if (index >= all) return true;
      const int owner = __ffs(__ballot_sync(0xffffffff, end > index)) - 1;
      batch = first + owner, begin = __shfl_sync(0xffffffff, end - count, owner);
      return false;
    });
  }
  // Where a sequence's blocks begin.
  __device__ int64_t begin_of_batch(int batch) const {
    int64_t begin = 0;
    each_batch([&](int first, int64_t count, int64_t end, int64_t) {
      if (batch >= first + 32) return true;
      begin = __shfl_sync(0xffffffff, end - count, batch - first);
      return false;
    });
    return begin;
  }

 private:
  __device__ int64_t blocks_of(int batch) const {
    return batch < p.cache.batch ? int64_t{DecodeKeys(p, batch).count} * decode_heads(p) : 0;
  }
  // Sum over the lanes up to this one.
  __device__ static int64_t scan(int64_t count) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int64_t below = __shfl_up_sync(0xffffffff, count, d);
      if (static_cast<int>(threadIdx.x % 32) >= d) count += below;
    }
    return count;
  }
  // f(first, count, end, all) for 32 sequences at a time, until it returns false: the blocks of this lane's sequence,
  // and where they and those of all 32 end in the list.
  template <class F>
  __device__ void each_batch(F f) const {
    int64_t before = 0;
#pragma unroll 1
    for (int first = 0; first < p.cache.batch; first += 32) {
      int64_t count = first_count, end = first_end;
      if (first) count = blocks_of(first + static_cast<int>(threadIdx.x % 32)), end = before + scan(count);
      const int64_t all = __shfl_sync(0xffffffff, end, 31);
      if (!f(first, count, end, all)) return;
      before = all;
    }
  }
};

// f(part, slot of the workspace) for the parts that this thread block computes, one after the other: its share of the
// list or, batch invariant, one. f is called in one place: its code, nearly all of the kernel, exists once.
template <class F>
__device__ inline void for_each_part(const AttentionDecodeParams& p, F f) {
  const int heads = decode_heads(p);
  const int64_t parts = p.batch_invariant ? invariant_parts(p) : 1;  // of a head
  int64_t index = 0, end = 1, begin = 0;                             // in the list; begin: of the sequence's blocks
  int batch = static_cast<int>(blockIdx.x / parts / heads);
  if (!p.batch_invariant) {
    const DecodeList list(p);
    const int64_t shares = list.shares(gridDim.x);
    if (blockIdx.x >= shares) return;
    index = list.begin_of(blockIdx.x, shares), end = list.begin_of(blockIdx.x + 1, shares);
    list.find(index, batch, begin);
  }
#pragma unroll 1
  while (index < end) {
    const DecodeKeys keys(p, batch);
    DecodePart part{batch, 0, 0, 0, keys};
    int64_t slot = blockIdx.x;
    if (p.batch_invariant) {
      const int blocks = keys.invariant_blocks(p);
      part.head = static_cast<int>(slot / parts % heads), part.begin = static_cast<int>(slot % parts) * blocks;
      part.end = min(part.begin + blocks, keys.count), index = end;
      if (part.begin >= part.end) return;
    } else {
      if (index >= begin + int64_t{keys.count} * heads) {  // a sequence without keys, or
                                                           // after a sequence's last head
        begin += int64_t{keys.count} * heads, ++batch;
        continue;
      }
      const int64_t in_batch = index - begin;
      part.head = static_cast<int>(in_batch / keys.count), part.begin = static_cast<int>(in_batch % keys.count);
      part.end = part.begin + static_cast<int>(min(int64_t{keys.count - part.begin}, end - index));
      slot = 2 * slot + (part.begin == 0), index += part.end - part.begin;
    }
    f(part, slot);
  }
}

}  // namespace forwardpass
