#pragma once
// Which rows of which head a block of attention has, and which of their keys count.
#include "params/attention.h"

namespace forwardpass {

// Heads that have row tiles of their own: those of the whole batch; with varlen, whose tiles cover all sequences, those
// of one batch entry.
HOST_DEVICE inline int64_t all_heads(const AttentionParams& p) {
  return int64_t{p.heads} * (p.cu_seqlens_q ? 1 : p.batch);
}

// Row tiles of a head, `tile_rows` rows each; with varlen at most one more for each sequence, as a sequence that begins
// inside a tile gets a tile of its own, and so do the rows of no sequence.
inline int64_t row_tiles(const AttentionParams& p, int tile_rows) {
  return p.cu_seqlens_q ? p.rows / tile_rows + p.batch + 1 : (int64_t{p.rows} + tile_rows - 1) / tile_rows;
}

// Heads whose tiles run together, those of up to 32 KV heads. Four of an H100's 132 blocks then read the same keys at
// about the same time; at head dim 128 its memory bandwidth would not feed each of them separately. In a simulation,
// causal tiles of one head after the other finish 12 % later. There is an even number of such groups (of a single head
// one): AttentionTile::find says why.
HOST_DEVICE inline unsigned heads_together(const AttentionParams& p) {
  const unsigned all = static_cast<unsigned>(all_heads(p)), of_kv = p.heads / p.kv_heads;
  const unsigned groups = 2 * ((all / of_kv + 63) / 64);
  return (all + groups - 1) / groups;
}

// Whether sequence b's boundaries rise within the tensor, and the next one does not fall below them: of two numbers
// that fall either may be wrong.
__device__ inline bool in_order(const int32_t* cu_seqlens, int b, int batch, int total) {
  const int begin = cu_seqlens[b], end = cu_seqlens[b + 1];
  return (b > 0 || begin == 0) && begin <= end && end <= total && (b + 1 == batch || end <= cu_seqlens[b + 2]);
}

// How many sequences there are, from the first one on, before cu_seqlens fall or lead beyond the tensors, which no host
// has looked at. By all threads of a block, as all numbers are looked at: it takes a block about as long as the binary
// search of its sequence, whose loads then hit L1.
__device__ inline int known_sequences(const AttentionParams& p) {
  if (!p.cu_seqlens_q) return 0;
  const auto known = [&](int b) {
    return in_order(p.cu_seqlens_q, b, p.batch, p.rows) && in_order(p.cu_seqlens_k, b, p.batch, p.keys);
  };
  bool all = true;
  // Its counter is uniform: with a thread's own the kernel of 128 columns for 8.0 spills 4 bytes.
  for (int first = 0; first < p.batch; first += blockDim.x) {
    const int b = first + threadIdx.x;
    all = all && (b >= p.batch || known(b));
  }
  if (__syncthreads_and(all)) return p.batch;
  int b = 0;
  while (known(b)) ++b;
  return b;
}

// The rows of one head that a block computes, from `row` of their sequence on.
struct AttentionTile {
  int batch, head, row;
  int rows, keys;                // of the sequence; keys -1: of no sequence, or of one that is not known: NaN
  int64_t first_row, first_key;  // of the sequence, in q and out, and in k and v

  // Only a few heads' tiles at a time, so that blocks that run together share keys in L2. Under a causal mask tiles of
  // the last rows see the most keys. In the last group of heads they come first (longest processing time first, LPT),
  // so that the multiprocessors finish together with short tiles; in the group before, they come last, and so on, so
  // that where persistent blocks take every 132nd tile, what one group gives to a block too much the next gives too
  // little. Simulated for 8 to 512 heads of 4 to 128 tiles each, the multiprocessors are 97.4 % busy on average (98.1 %
  // if tiles were handed out as blocks finish, by a counter that something has to set to 0). LPT in every group leaves
  // 87 of those 97 %, and 90 where blocks also take every second round of tiles in the opposite order. False: there is
  // no such tile. known: known_sequences.
  __device__ bool find(const AttentionParams& p, int tile_rows, unsigned tiles, unsigned block, int known) {
    const unsigned all = static_cast<unsigned>(all_heads(p)), together = heads_together(p);
    const unsigned group = block / (tiles * together), first_head = group * together;
    const unsigned heads_here = min(together, all - first_head);
    const unsigned in_group = block - first_head * tiles, head_of_all = first_head + in_group % heads_here;
    int tile = static_cast<int>(in_group / heads_here);
    if (((all - 1) / together - group) % 2) tile = static_cast<int>(tiles) - 1 - tile;
    head = static_cast<int>(head_of_all % p.heads);
    batch = static_cast<int>(head_of_all / p.heads);
    rows = p.rows;
    keys = p.keys;
    first_row = first_key = 0;
    if (p.cache.seq_lens) keys = p.cache.has_room(batch) ? p.cache.seq_lens[batch] : -1;
    if (p.cu_seqlens_q) {
      // Sequence b has the tiles from cu_seqlens_q[b] / tile_rows + b on: as many as it needs, or one more. Behind
      // those that are known, the other rows are one sequence more. Binary search for b.
      int b = 0;
      for (int n = known + 1; n > 1;) {
        const int half = n / 2, middle = b + half;
        if (p.cu_seqlens_q[middle] / tile_rows + middle <= tile) b = middle;
        n = b == middle ? n - half : half;
      }
      const int begin = b > 0 ? p.cu_seqlens_q[b] : 0;
      first_row = begin;
      tile -= begin / tile_rows + b;
      if (b < known) {
        batch = b;
        first_key = p.cu_seqlens_k[b];
        rows = p.cu_seqlens_q[b + 1] - begin;
        keys = p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
      } else {
        batch = 0;
        rows = p.rows - begin;
        keys = -1;
      }
    }
    const int last = (rows - 1) / tile_rows;
    row = (last - tile) * tile_rows;
    return rows > 0 && tile >= 0 && tile <= last;
  }
  __device__ bool known() const { return keys >= 0; }
  __device__ int kv_head(const AttentionParams& p) const { return head / (p.heads / p.kv_heads); }
  __device__ int64_t q(const AttentionParams& p) const {
    return batch * p.q.batch + head * p.q.head + first_row * p.q.row;
  }
  __device__ int64_t k(const AttentionParams& p) const {
    return batch * p.k.batch + kv_head(p) * p.k.head + first_key * p.k.row;
  }
  __device__ int64_t v(const AttentionParams& p) const {
    return batch * p.v.batch + kv_head(p) * p.v.head + first_key * p.v.row;
  }
  // The query head of a row.
  __device__ int query_head(const AttentionParams& p, int r) const {
    return (head << p.packed) + (r & ((1 << p.packed) - 1));
  }
  // A row of out, [batch, rows, heads, value_dim].
  __device__ int64_t out(const AttentionParams& p, int r) const {
    const int64_t of_batch = p.cu_seqlens_q ? first_row : int64_t{batch} * (rows >> p.packed);
    return ((of_batch + (r >> p.packed)) * (p.heads << p.packed) + query_head(p, r)) * p.value_dim;
  }
  // A row of the lse, [batch, heads, rows] or [heads, rows].
  __device__ int64_t lse(const AttentionParams& p, int r) const {
    if (p.cu_seqlens_q) return int64_t{head} * p.rows + first_row + r;
    return (int64_t{batch} * (p.heads << p.packed) + query_head(p, r)) * (rows >> p.packed) + (r >> p.packed);
  }
  // A row's position among the keys; the last row is at the last key (bottom-right alignment).
  __device__ int position(const AttentionParams& p, int r) const { return (r >> p.packed) + keys - (rows >> p.packed); }
  // A row attends to the keys from first to end.
  __device__ int first(const AttentionParams& p, int r) const {
    // Unsigned: nvcc 13.0 turns the signed row_key - p.left into max(row_key - p.left, 0), which overflows for an
    // unlimited left.
    const int row_key = position(p, r);
    return p.left >= row_key ? 0 : static_cast<int>(static_cast<unsigned>(row_key) - p.left);
  }
  __device__ int end(const AttentionParams& p, int r) const {
    return p.right >= (rows >> p.packed) - 1 - (r >> p.packed) ? keys : position(p, r) + p.right + 1;
  }
};

// Blocks of `n` keys of a tile: in those from begin to end some key counts for some row; those from unmasked_begin to
// unmasked_end need no mask, as every key counts for every row.
struct KeyBlocks {
  int begin, unmasked_begin, unmasked_end, end;

  KeyBlocks() = default;
  __device__ KeyBlocks(const AttentionParams& p, const AttentionTile& t, int tile_rows, int n) {
    const int last_row = min(t.row + tile_rows, t.rows) - 1;
    const int first = t.first(p, t.row), stop = t.end(p, last_row);
    begin = first / n, end = stop > first ? (stop + n - 1) / n : begin;
    unmasked_begin = min((t.first(p, last_row) + n - 1) / n, end);
    unmasked_end = max(t.end(p, t.row), 0) / n;
    if (unmasked_end <= unmasked_begin) unmasked_begin = unmasked_end = begin;
  }
  // The i-th of `parts` parts of them: split-KV.
  __device__ KeyBlocks part(int i, int parts) const {
    KeyBlocks b;
    b.begin = begin + (end - begin) * i / parts, b.end = begin + (end - begin) * (i + 1) / parts;
    b.unmasked_begin = max(unmasked_begin, b.begin), b.unmasked_end = min(unmasked_end, b.end);
    if (b.unmasked_end <= b.unmasked_begin) b.unmasked_begin = b.unmasked_end = b.begin;
    return b;
  }
};

}  // namespace forwardpass
