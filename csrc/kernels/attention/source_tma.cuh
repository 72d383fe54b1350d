#pragma once
// Where rows of q, k and v are, by TMA. The Sources of prefill on wgmma: keys are dense, varlen, or a cache's, paged or
// contiguous. The producer alone knows which; the consumers are given blocks of keys. So all are run by one kernel.
#include <algorithm>
#include <numeric>

#include "device/ptx_sm90a.cuh"
#include "device/tma_map.h"
#include "schedule/attention_tile.cuh"

namespace forwardpass {

// Columns of 16 bits in a 128-byte swizzle atom.
constexpr int kPanel = 64;

// The tensor maps of q, k and v have five dimensions: dim, row, head, and two that select the sequence or the page. How
// a Box becomes coordinates:
struct BoxSteps {
  bool heads;  // the head is a coordinate, else all share one; times 0 or 1, 12 bytes are spilled at 256 columns
  int page;    // from one page or entry of a batch to the next; 0 where they share one
  int end;     // the last coordinate
};

// A box of rows, but for its columns and its head.
struct Box {
  int row, first, page;

  // Issues the loads of all panels of columns, to rows of `to` from r on.
  template <int kPanels, int kRows>
  __device__ void load(uint16_t (&to)[kPanels][kRows][kPanel], int r, const CUtensorMap& map, const BoxSteps& steps,
                       int head, uint32_t barrier) const {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const int from[5] = {i * kPanel, row, steps.heads ? head : 0, first + page * steps.page, steps.end};
      ptx::tma_load(ptx::shared_address(to[i][r]), map, from, barrier);
    }
  }
};

// Varlen: TMA has to zero-fill behind the end of each sequence, as whatever follows it may be NaN, and 0 times NaN is
// NaN. But a tensor map has one end for all. So the map's rows end at kEnd, and a sequence of `rows` rows that begins
// at row `first` of the packed tensor is addressed by the map's last rows:
//
//   rows of the map         0                 kEnd - rows              kEnd
//                           |---------------------|----------------------|  zeros
//                                                 |                      |
//                                                 |   kEnd - rows - first rows back
//                                                 v                      v
//   packed tensor    |------|----------------------|-----|
//                    0    first              first + rows
//
// Two more dimensions move the address back. Their coordinates are first + rows and kEnd, their strides one row, and
// kBack bytes less one row:
//
//   address / row bytes = (kEnd - rows + r) + (first + rows) * 1 + kEnd * (kBack / row bytes - 1)
//                       = first + r + kEnd * kBack / row bytes
//   and kEnd * kBack = 2^30 * 2^34 bytes = 2^64 bytes, which is 0 as addresses are modulo 2^64.
//
// No NVIDIA document promises that wrap; Triton's ragged descriptors (triton/tools/ragged_tma.py) rely on it with the
// same extents.
//
// Paged: the cache is such a packed tensor, and the rows that a sequence has in a page are a sequence in it.
constexpr int kEnd = 1 << 30, kAnyExtent = 0x7fff0000;  // the second: more than any coordinate
constexpr int64_t kBack = int64_t{1} << 34;

struct DenseBoxes {
  __device__ static Box find(int row, int batch) { return {row, 0, batch}; }
};
// first, rows: of the sequence in the packed tensor.
struct VarlenBoxes {
  __device__ static Box find(int row, int64_t first, int rows) {
    return {kEnd - rows + row, static_cast<int>(first) + rows, 0};
  }
};
// A cache. The box has as many keys from `key` on as lie in one page and in the sequence. Nothing of the table is read
// beyond the sequence's length. Rows that attend to a key without a page are NaN: its k is, by a box of k_nan, and its
// v is 0, which a weight of NaN makes NaN and a weight of 0 does not.
struct PagedBoxes {
  // entry: of the key, where there is a table.
  __device__ static Box find(const KvCache& c, const AttentionTile& t, int key, int rows, int entry) {
    rows = max(min(t.keys - key, rows), 0);
    const int page = !rows ? 0 : c.block_table ? c.named(entry) : t.batch, row = c.block_table ? key % c.page : key;
    return page < 0 ? Box{kEnd, 0, -1} : Box{kEnd - rows, row + rows, page};
  }
};

// Packed rows of q: a box of rows of the sequence, each of all query heads of a kv head. One dimension selects the kv
// head and the sequence.
struct PackedBoxes {
  __device__ static Box find(const AttentionTile& t) { return {0, t.head, t.batch}; }
};

struct AttentionArguments {
  AttentionParams p;
  unsigned tiles;  // of a head
  int64_t blocks;  // of all heads: their tiles, or parts of those
  int box_rows;    // of a box of keys; several make a block of keys where pages are smaller
  CUtensorMap q, k, v;
  CUtensorMap k_nan;  // k with NaN, not zeros, beyond its end
  BoxSteps q_steps, k_steps, v_steps;

  __device__ Box find_q(const AttentionTile& t) const {
    if (p.packed) return PackedBoxes::find(t);
    return p.cu_seqlens_q ? VarlenBoxes::find(t.row, t.first_row, t.rows) : DenseBoxes::find(t.row, t.batch);
  }
  // The third coordinate of q's box.
  __device__ int q_head(const AttentionTile& t) const { return p.packed ? t.row >> p.packed : t.head; }
  // Begins to load what find_keys has to be given of a key.
  __device__ void look_up(const AttentionTile& t, int key, int& entry) const {
    if (p.cache.block_table && key < t.keys)
      ptx::cp_async_4(ptx::shared_address(&entry), p.cache.entry(t.batch, key), 4);
    ptx::cp_async_commit();
  }
  __device__ Box find_keys(const AttentionTile& t, int key, int entry) const {
    if (p.cache.seq_lens) return PagedBoxes::find(p.cache, t, key, box_rows, entry);
    return p.cu_seqlens_k ? VarlenBoxes::find(key, t.first_key, t.keys) : DenseBoxes::find(key, t.batch);
  }
  // m, n: rows of q in a tile, and keys of a block.
  cudaError_t encode(int m, int n) {
    const bool varlen = p.cu_seqlens_q, cache = p.cache.seq_lens;
    box_rows = p.cache.block_table ? std::gcd(p.cache.page, n) : n;
    const auto keys = [&](CUtensorMap& to, BoxSteps& steps, const AttentionTensor& t, int dim, auto... beyond) {
      const int rows = cache ? kEnd : p.keys, pages = cache ? static_cast<int>(t.batch / t.row) : 0;
      return encode_rows(to, steps, t, {dim, rows, p.kv_heads, box_rows}, varlen || cache, pages, beyond...);
    };
    if (auto e =
            p.packed ? encode_packed(m) : encode_rows(q, q_steps, p.q, {p.head_dim, p.rows, p.heads, m}, varlen, 0))
      return e;
    if (auto e = keys(k, k_steps, p.k, p.head_dim)) return e;
    if (auto e = keys(v, v_steps, p.v, p.value_dim)) return e;
    return cache ? keys(k_nan, k_steps, p.k, p.head_dim, CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA)
                 : cudaSuccess;
  }

 private:
  struct Rows {
    int dim, rows, heads, box;
  };
  CUtensorMapDataType type() const {
    return p.dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  }
  cudaError_t encode_packed(int m) {
    constexpr int64_t kSize = sizeof(uint16_t);
    const int heads = 1 << p.packed;
    const int64_t kv_head = heads * p.q.head;
    q_steps = {true, static_cast<int>(p.q.batch / kv_head), 0};
    return encode_boxes<5>(q, type(), p.q.data, {p.head_dim, heads, p.rows >> p.packed, kAnyExtent, 1},
                           {p.q.head * kSize, p.q.row ? p.q.row * kSize : 16, kv_head * kSize, 16},
                           {kPanel, heads, m >> p.packed, 1, 1}, CU_TENSOR_MAP_SWIZZLE_128B);
  }
  // packed: addressed as above; pitch: from one page of it to the next, in rows.
  cudaError_t encode_rows(CUtensorMap& to, BoxSteps& steps, const AttentionTensor& t, Rows r, bool packed, int pitch,
                          CUtensorMapFloatOOBfill beyond = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) const {
    // A dimension over which an operand is broadcast gets one element: no document promises that a tensor map may have
    // a stride of 0. The stride of a dimension with one element is any multiple of 16, such as kNoStride.
    constexpr int64_t kSize = sizeof(uint16_t), kNoStride = 16;
    const auto bytes = [&](int64_t stride) { return stride ? stride * kSize : kNoStride; };
    const int64_t row = r.rows <= 1 ? kNoStride : t.row * kSize, head = bytes(t.head);
    const int box[] = {kPanel, r.box, 1, 1, 1}, heads = t.head ? r.heads : 1;
    steps = {t.head != 0, packed ? pitch : t.batch ? 1 : 0, packed ? kEnd : 0};
    if (!packed)
      return encode_boxes<5>(to, type(), t.data, {r.dim, r.rows, heads, t.batch ? p.batch : 1, 1},
                             {row, head, bytes(t.batch), kNoStride}, box, CU_TENSOR_MAP_SWIZZLE_128B, beyond);
    if (r.rows > kEnd || row >= kBack) return cudaErrorInvalidValue;
    return encode_boxes<5>(to, type(), t.data, {r.dim, kEnd, heads, kAnyExtent, kAnyExtent},
                           {row, head, row, kBack - row}, box, CU_TENSOR_MAP_SWIZZLE_128B, beyond);
  }
};

// How the producer loads q, k and v: each lane finds and loads a box of each block of keys.
template <class Config>
struct BoxSource {
  // Of each lane the table's entry for what it loads of k next, and what it loads of k and then of v.
  struct Shared {
    int next_entry[32];
    struct {
      Box box;
      int head;
    } boxes[Config::kStages][32];
  };

  // Begins to load what `find` needs of a block.
  template <class Storage>
  __device__ static void look_up(const AttentionArguments& a, Storage& s, const AttentionTile& t, int block) {
    a.look_up(t, first_key(a, block), s.source.next_entry[lane()]);
  }
  // The next block's entry of the table is copied before the waits for empty stages, and looked at after them: four
  // sequences of 1024 rows and keys in pages of 16, 32 heads, take 54.8 us and not 56.1 (modelled), where each block
  // waited for it. It goes through shared memory, as do boxes: in registers they are spilled at 192 columns.
  template <class Storage>
  __device__ static void find(const AttentionArguments& a, Storage& s, const AttentionTile& t, int block, bool has_next,
                              int stage) {
    ptx::cp_async_wait<0>();
    s.source.boxes[stage][lane()] = {a.find_keys(t, first_key(a, block), s.source.next_entry[lane()]), t.kv_head(a.p)};
    if (has_next) look_up(a, s, t, block - 1);
  }
  // By one lane.
  template <class Query>
  __device__ static void load_q(const AttentionArguments& a, Query& to, const AttentionTile& t, uint32_t barrier) {
    a.find_q(t).load(to.panel, 0, a.q, a.q_steps, a.q_head(t), barrier);
  }
  template <class Storage>
  __device__ static void load_k(const AttentionArguments& a, Storage& s, int stage, uint32_t barrier) {
    const Box& box = s.source.boxes[stage][lane()].box;
    load(a, s, s.k[stage].panel, stage, box.page < 0 ? a.k_nan : a.k, a.k_steps, barrier);
  }
  template <class Storage>
  __device__ static void load_v(const AttentionArguments& a, Storage& s, int stage, uint32_t barrier) {
    load(a, s, s.v[stage].panel, stage, a.v, a.v_steps, barrier);
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ static int first_key(const AttentionArguments& a, int block) {
    return block * Config::kN + lane() * a.box_rows;
  }
  template <class Storage, class Panels>
  __device__ static void load(const AttentionArguments& a, Storage& s, Panels& to, int stage, const CUtensorMap& map,
                              const BoxSteps& steps, uint32_t barrier) {
    const auto& from = s.source.boxes[stage][lane()];
    if (const int row = lane() * a.box_rows; row < Config::kN) from.box.load(to, row, map, steps, from.head, barrier);
  }
};

// Whether these kernels can load the keys: a cache's pages are whole rows apart, and boxes are whole swizzle atoms.
inline bool loads_by_boxes(const AttentionParams& p) {
  const KvCache& c = p.cache;
  const auto is_packed = [&](const AttentionTensor& t) {
    return t.row > 0 && t.batch % t.row == 0 && t.batch / t.row * c.pages + c.page < kAnyExtent;
  };
  const int64_t kv_head = p.q.head << p.packed, last = p.q.batch / std::max<int64_t>(kv_head, 1) * p.batch + p.heads;
  if (p.packed && last >= kAnyExtent) return false;
  return !c.seq_lens || (is_packed(p.k) && is_packed(p.v) && (!c.block_table || c.page % 16 == 0));
}

}  // namespace forwardpass
