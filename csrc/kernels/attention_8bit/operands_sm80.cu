// q, k and v of attention_8bit to int8, or v to e4m3. The first launch reads v, for each channel's largest value, and
// 64 keys, for k's centre; the second reads all and writes them, and finds the scale of each block of v. Memory binds:
// 6 bytes of q and k an element are moved, and 5 of v.
#include "device/dependent_launch.cuh"
#include "device/vec.cuh"
#include "kernels/attention/int8_order.cuh"
#include "schedule/attention_tile.cuh"

namespace forwardpass {

constexpr int kThreads = kKeyThreads * kInt8Keys, kRows = kInt8Keys;  // rows of q or k that a block has
constexpr int kSamples = 64;                                          // keys whose mean is subtracted
constexpr int kWords = kInt8Keys / 4;                                 // of a channel of v, in a block of keys

struct QuantizeArguments {
  AttentionParams p;
  Int8Operands to;
  bool fp8;          // v is to be e4m3
  int rotation;      // columns that are rotated together; 1: none
  unsigned tiles;    // of q's rows, of a head
  int64_t q_blocks;  // thread blocks for q; so many for keys follow
  int64_t key_blocks;
};

// Keys of a sequence, in k and v.
struct Sequence {
  int64_t first;
  int keys;
  __device__ Sequence(const AttentionParams& p, int b)
      : first(p.cu_seqlens_k ? p.cu_seqlens_k[b] : 0),
        keys(p.cu_seqlens_k ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.keys) {}
};

// Eight elements of f16 or bf16 at a multiple of 16 bytes, and what they are: apart, so that loads do not wait for one
// another at the branch.
__device__ inline uint4 load16(const void* p, int64_t offset) {
  return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p) + offset);
}
__device__ inline void widen(float (&x)[kVec], const uint4& raw, Dtype dtype) {
  if (dtype == Dtype::f16)
    load_floats(x, reinterpret_cast<const __half*>(&raw), kVec, true);
  else
    load_floats(x, reinterpret_cast<const __nv_bfloat16*>(&raw), kVec, true);
}

// What 8 bits, whose largest value is `steps`, have of values whose largest is `largest`: by what they are multiplied,
// and the scale. NaN and infinities make both NaN.
struct Scale {
  float inverse, scale;
  __device__ explicit Scale(float largest, float steps = 127) {
    if (largest == INFINITY) largest = NAN;
    inverse = largest < kLeastRange ? 0 : __fdiv_rn(steps, largest);
    scale = __fdiv_rn(largest, steps);
  }
};
__device__ inline uint32_t to_int8(float v, float inverse) {
  return static_cast<uint32_t>(to_int(__fmul_rn(v, inverse), -127, 127)) & 0xff;
}

// A Hadamard matrix of +-1 times each `rotation` columns of a row, of which each thread has eight and the next thread
// the next eight: in steps of 1, 2, 4, … columns (a, b) becomes (a + b, a - b).
__device__ inline void rotate(float (&x)[kVec], int rotation) {
#pragma unroll
  for (int step = 1; step < kVec; step *= 2) {
    if (2 * step > rotation) return;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b, x[i + step] = a - b;
    }
  }
  for (int step = 1; step * kVec < rotation; step *= 2) {
    const float sign = threadIdx.x & step ? -1 : 1;
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = fmaf(sign, x[i], __shfl_xor_sync(0xffffffff, x[i], step));
  }
}

template <class F>
__device__ inline float over_row(float v, int threads, F f) {
  for (int step = 1; step < threads; step *= 2) v = f(v, __shfl_xor_sync(0xffffffff, v, step));
  return v;
}

// Rotates a row of which this thread has eight columns; returns its largest magnitude.
__device__ inline float rotate_row(float (&x)[kVec], int threads, int rotation) {
  rotate(x, rotation);
  float largest = 0;
#pragma unroll
  for (const float v : x) largest = ptx::max_nan(largest, fabsf(v));
  return over_row(largest, threads, ptx::max_nan);
}
__device__ inline uint2 round_row(const float (&x)[kVec], float inverse) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kVec; ++i) words[i / 4] |= to_int8(x[i], inverse) << i % 4 * 8;
  return {words[0], words[1]};
}

// The sum of a column's samples, in their order: evenly spaced keys or, of few, all. key_of(i): of sample i. Eight
// loads at a time without a branch between them, as one that waits for the one before takes half a microsecond.
template <class T, class F>
__device__ inline float sum_of_samples(const T* column, int64_t row, int samples, F key_of) {
  float total = 0;
#pragma unroll 1
  for (int first = 0; first < samples; first += kVec) {
    float x[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = to_float(column[key_of(min(first + i, samples - 1)) * row]);
#pragma unroll
    for (int i = 0; i < kVec; ++i) total = first + i < samples ? __fadd_rn(total, x[i]) : total;
  }
  return total;
}
template <class T>
__device__ inline float sum_of_samples(const T* column, int64_t row, int keys) {
  if (keys <= kSamples) return sum_of_samples(column, row, keys, [](int i) { return int64_t{i}; });
  return sum_of_samples(column, row, kSamples, [&](int i) { return int64_t{i} * (keys - 1) / (kSamples - 1); });
}
// The mean of a sequence's samples: a column a thread.
__device__ inline void write_centre(const QuantizeArguments& a, const Sequence& sequence, int b, int head) {
  const AttentionParams& p = a.p;
  const int samples = min(sequence.keys, kSamples), column = threadIdx.x;
  if (column >= a.to.head_dim) return;
  const int64_t first = b * p.k.batch + head * p.k.head + sequence.first * p.k.row + column;
  float total = 0;
  if (column < p.head_dim)
    total = p.dtype == Dtype::f16
                ? sum_of_samples(static_cast<const __half*>(p.k.data) + first, p.k.row, sequence.keys)
                : sum_of_samples(static_cast<const __nv_bfloat16*>(p.k.data) + first, p.k.row, sequence.keys);
  a.to.centre[(int64_t{b} * p.kv_heads + head) * a.to.head_dim + column] =
      samples ? __fmul_rn(total, static_cast<float>(1.0 / samples)) : 0;
}

// The largest absolute values of eight columns of v, of every `step`th key from `key` on; eight keys at a time, of
// which those behind the last one are the last one again.
template <class T>
__device__ inline void find_largest(float (&largest)[kVec], const T* column, int64_t row, int key, int end, int step) {
#pragma unroll 1
  for (; key < end; key += kVec * step) {
    Vec<T> x[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) x[i] = load_vec(column + min(key + i * step, end - 1) * row, kVec, true);
#pragma unroll
    for (int i = 0; i < kVec; ++i)
#pragma unroll
      for (int c = 0; c < kVec; ++c) largest[c] = ptx::max_nan(largest[c], fabsf(to_float(x[i].e[c])));
  }
}
// The largest absolute value of each channel of v, in a chunk of a sequence's keys.
__device__ inline void write_largest(const QuantizeArguments& a, const Sequence& sequence, int b, int head, int chunk) {
  __shared__ float shared[kVec][kThreads + 4];  // so that a warp reads different banks
  const AttentionParams& p = a.p;
  const int across = a.to.value_dim / kVec, column = threadIdx.x % across * kVec, step = kThreads / across;
  const int64_t first = b * p.v.batch + head * p.v.head + sequence.first * p.v.row + column;
  const auto edge = [&](int n) { return static_cast<int>(int64_t{sequence.keys} * n / a.to.chunks); };
  const int key = edge(chunk) + static_cast<int>(threadIdx.x) / across;
  float largest[kVec] = {};
  if (column < p.value_dim) {
    if (p.dtype == Dtype::f16)
      find_largest(largest, static_cast<const __half*>(p.v.data) + first, p.v.row, key, edge(chunk + 1), step);
    else
      find_largest(largest, static_cast<const __nv_bfloat16*>(p.v.data) + first, p.v.row, key, edge(chunk + 1), step);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) shared[i][threadIdx.x] = largest[i];
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= a.to.value_dim) return;
  float all = 0;
  for (int i = 0; i < step; ++i) all = ptx::max_nan(all, shared[threadIdx.x % kVec][i * across + threadIdx.x / kVec]);
  a.to.largest[((int64_t{b} * p.kv_heads + head) * a.to.chunks + chunk) * a.to.value_dim + threadIdx.x] = all;
}

// Of each sequence and kv head, a block for each chunk of v and one for k's centre.
__global__ void __launch_bounds__(kThreads) qkv_statistics_kernel(const __grid_constant__ QuantizeArguments a) {
  ptx::launch_dependents();
  const int each = a.to.chunks + 1, part = static_cast<int>(blockIdx.x % each);
  const int head = static_cast<int>(blockIdx.x / each % a.p.kv_heads),
            b = static_cast<int>(blockIdx.x / each / a.p.kv_heads);
  const int known = known_sequences(a.p);
  if (a.p.cu_seqlens_k && b >= known) return;
  const Sequence sequence(a.p, b);
  if (part == a.to.chunks)
    write_centre(a, sequence, b, head);
  else
    write_largest(a, sequence, b, head, part);
}

// f(r, raw): of rows r that this thread has of a block's, eight columns each, as load(r) loads them: one row ahead.
template <class Load, class F>
__device__ inline void each_row(int across, Load load, F f) {
  const int step = kThreads / across;
  int r = static_cast<int>(threadIdx.x) / across;
  uint4 next = load(r);
#pragma unroll 1
  for (; r < kRows; r += step) {
    const uint4 raw = next;
    if (r + step < kRows) next = load(r + step);
    f(r, raw);
  }
}

// kRows rows of q.
__device__ inline void quantize_q(const QuantizeArguments& a, unsigned block, int known) {
  const AttentionParams& p = a.p;
  AttentionTile tile;
  if (!tile.find(p, kRows, a.tiles, block, known) || !tile.known()) return;
  const int across = a.to.head_dim / kVec, column = static_cast<int>(threadIdx.x) % across * kVec;
  const int64_t from = tile.q(p) + column;
  // All lanes take part in shuffles: a row beyond the last one is the last one again.
  const auto row_of = [&](int r) { return min(tile.row + r, tile.rows - 1); };
  float centre[kVec];
  load_floats(centre, a.to.centre + (int64_t{tile.batch} * p.kv_heads + tile.kv_head(p)) * a.to.head_dim + column, kVec,
              true);
  each_row(
      across, [&](int r) { return column < p.head_dim ? load16(p.q.data, from + row_of(r) * p.q.row) : uint4{}; },
      [&](int r, const uint4& raw) {
        float x[kVec], shift = 0;
        widen(x, raw, p.dtype);
#pragma unroll
        for (int i = 0; i < kVec; ++i) shift = fmaf(x[i], centre[i], shift);
        shift = over_row(shift, across, [](float a, float b) { return a + b; });
        const Scale scale(rotate_row(x, across, a.rotation));
        if (tile.row + r >= tile.rows) return;
        const int64_t to = tile.lse(p, tile.row + r);
        *reinterpret_cast<uint2*>(a.to.q + to * a.to.head_dim + column) = round_row(x, scale.inverse);
        if (column == 0) a.to.q_scale[to] = scale.scale, a.to.shift[to] = shift;
      });
}

// Which keys a block of keys has.
struct KeysOf {
  int sequence = 0, first, keys;  // keys of the sequence, and the block's first
  int64_t first_of_sequence;      // in k and v

  // False: there is no such block.
  __device__ bool find(const AttentionParams& p, int block, int known) {
    if (!p.cu_seqlens_k) {
      sequence = block / Int8Operands::blocks_of(p.keys);
    } else {
      if (known == 0) return false;
      for (int n = known; n > 1;) {  // binary search for the last sequence that does not begin behind the block
        const int half = n / 2, middle = sequence + half;
        if (Int8Operands::first_block(p, middle, p.cu_seqlens_k[middle]) <= block) sequence = middle;
        n = sequence == middle ? n - half : half;
      }
    }
    const Sequence range(p, sequence);
    first_of_sequence = range.first, keys = range.keys;
    first = static_cast<int>(block - Int8Operands::first_block(p, sequence, range.first)) * kInt8Keys;
    return first < keys;
  }
};

// x rounded to 22 bits.
__device__ inline float without_two_bits(float x) {
  const float wide = __fmul_rn(x, 5);
  return __fsub_rn(wide, __fsub_rn(wide, x));
}

// Of a row of k, eight columns of which this thread has, less the centre: rotated. Returns its largest magnitude.
__device__ inline float load_key(float (&x)[kVec], const QuantizeArguments& a, const uint4& raw,
                                 const float (&centre)[kVec], bool inside, int across) {
  widen(x, raw, a.p.dtype);
#pragma unroll
  for (int i = 0; i < kVec; ++i) x[i] = inside ? __fsub_rn(x[i], centre[i]) : 0;
  return rotate_row(x, across, a.rotation);
}

// Of a block's keys, by their magnitudes in shared memory: scales and places.
__device__ inline void put_in_order(const QuantizeArguments& a, SharedKeys& s, int64_t block, int keys) {
  __syncthreads();
  const int key = ordered_key();
  const float magnitude = s.largest[key];
  const GroupOf group(s, order_bits(magnitude, key < keys));
  const Scale scale(fabsf(magnitude) < INFINITY ? (key < keys ? group.largest : 0) : NAN);
  s.inverse[key] = scale.inverse, s.scale[key] = without_two_bits(__fmul_rn(scale.scale, 1.f / a.rotation));
  __syncthreads();
  place_keys(a.to, s, block, keys);
}

// A key's scale is its group's, so that all keys of the block are loaded before one is rounded. At 256 columns they are
// loaded again: registers hold half of them.
__device__ inline void quantize_k(const QuantizeArguments& a, SharedKeys& s, const KeysOf& keys, int head,
                                  int64_t block) {
  constexpr int kHeld = 4;  // rows that a thread has at a time
  const AttentionParams& p = a.p;
  const int across = a.to.head_dim / kVec, column = static_cast<int>(threadIdx.x) % across * kVec;
  const int step = kThreads / across, parts = max(kRows / (step * kHeld), 1);
  const int64_t from =
      keys.sequence * p.k.batch + head * p.k.head + (keys.first_of_sequence + keys.first) * p.k.row + column;
  const int left = keys.keys - keys.first;
  float centre[kVec], x[kHeld][kVec];
  load_floats(centre, a.to.centre + (int64_t{keys.sequence} * p.kv_heads + head) * a.to.head_dim + column, kVec, true);
  const auto each_held = [&](int part, auto f) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      if (i * step < kRows) f(x[i], (part * kHeld + i) * step + static_cast<int>(threadIdx.x) / across);
  };
  const auto load = [&](int part) {
    each_held(part, [&](float (&values)[kVec], int r) {
      const bool inside = r < left && column < p.head_dim;
      const float largest =
          load_key(values, a, inside ? load16(p.k.data, from + r * p.k.row) : uint4{}, centre, inside, across);
      s.largest[r] = largest;
    });
  };
#pragma unroll 1
  for (int i = 0; i < 2 * parts; ++i) {
    if (i == parts) put_in_order(a, s, block, left);
    if (i < parts || parts > 1) load(i % parts);
    if (i < parts) continue;
    each_held(i - parts, [&](const float (&values)[kVec], int r) {
      *reinterpret_cast<uint2*>(a.to.k + (block * kInt8Keys + s.slot[r]) * a.to.head_dim + column) =
          round_row(values, s.inverse[r]);
    });
  }
}
// The largest absolute values of eight channels of v: of all chunks, one or more of which each thread of 16 loads.
__device__ inline void load_largest(float (&largest)[kVec], const QuantizeArguments& a, int64_t sequence, int column) {
  constexpr int kSharing = 16;
  for (float& v : largest) v = 0;
  for (int chunk = static_cast<int>(threadIdx.x) % kSharing; chunk < a.to.chunks; chunk += kSharing) {
    float x[kVec];
    load_floats(x, a.to.largest + (sequence * a.to.chunks + chunk) * a.to.value_dim + column, kVec, true);
#pragma unroll
    for (int i = 0; i < kVec; ++i) largest[i] = ptx::max_nan(largest[i], x[i]);
  }
#pragma unroll
  for (float& v : largest) v = over_row(v, kSharing, ptx::max_nan);
}
// f(column, stored, largest, raw): of eight channels from `column` on the largest values, and four keys of v, which are
// a word of each channel. A warp reads 32 bytes of each of its keys. stored: the kernel has these columns.
template <class F>
__device__ inline void each_word(const QuantizeArguments& a, const SharedKeys& s, const KeysOf& keys, int head, F f) {
  const AttentionParams& p = a.p;
  const int word = threadIdx.x % kWords;
  const int left = keys.keys - keys.first;
  const int64_t from = keys.sequence * p.v.batch + head * p.v.head + (keys.first_of_sequence + keys.first) * p.v.row;
#pragma unroll 1
  for (int begin = 0; begin < a.to.value_dim; begin += kThreads / kWords * kVec) {  // all threads: shuffles
    const int column = begin + static_cast<int>(threadIdx.x) / kWords * kVec;
    const bool inside = column < p.value_dim, stored = column < a.to.value_dim;
    float largest[kVec];  // first: behind the loads of v it spills on a B200
    load_largest(largest, a, int64_t{keys.sequence} * p.kv_heads + head, stored ? column : 0);
    uint4 raw[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = s.key[int8_key(word, i)];
      if (inside && key < left) raw[i] = load16(p.v.data, from + key * p.v.row + column);
    }
    f(column, stored, largest, raw);
  }
}
// The largest of all threads' values that are no NaN.
__device__ inline float over_block(float v) {
  constexpr int kWarps = kThreads / 32;
  __shared__ float shared[kWarps];
  v = over_row(v, 32, fmaxf);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  return over_row(shared[threadIdx.x % kWarps], kWarps, fmaxf);
}
// The scale of a block of v whose values are in units of their channels: one for all channels, of those without a NaN.
// e4m3 has none: its steps grow with the values.
__device__ inline Scale block_scale(const QuantizeArguments& a, const SharedKeys& s, const KeysOf& keys, int head,
                                    float steps) {
  float most = 0;
  each_word(a, s, keys, head, [&](int, bool, const float (&largest)[kVec], const uint4(&raw)[4]) {
    float of_keys[kVec] = {};
#pragma unroll
    for (const uint4& key : raw) {
      float x[kVec];
      widen(x, key, a.p.dtype);
#pragma unroll
      for (int c = 0; c < kVec; ++c) of_keys[c] = fmaxf(of_keys[c], fabsf(x[c]));
    }
#pragma unroll
    for (int c = 0; c < kVec; ++c) most = fmaxf(most, __fmul_rn(of_keys[c], Scale(largest[c], steps).inverse));
  });
  return Scale(over_block(most), steps);
}
// A warp writes 64 bytes of two channels at a time.
__device__ inline void quantize_v(const QuantizeArguments& a, const SharedKeys& shared, const KeysOf& keys, int head,
                                  int64_t block) {
  const float steps = a.fp8 ? 448 : 127;
  float inverse_of_block = 1;
  if (!a.fp8) {
    const Scale s = block_scale(a, shared, keys, head, steps);
    inverse_of_block = s.inverse;
    if (threadIdx.x == 0) *a.to.v_block_scale(block) = s.scale * a.to.v_unit();
  }
  const int word = threadIdx.x % kWords;
  float* const v_scale = a.to.v_scale + (int64_t{keys.sequence} * a.p.kv_heads + head) * a.to.value_dim;
  each_word(a, shared, keys, head, [&](int column, bool stored, const float (&largest)[kVec], const uint4(&raw)[4]) {
    float inverse[kVec];
#pragma unroll
    for (int c = 0; c < kVec; ++c) {
      const Scale s(largest[c], steps);
      inverse[c] = s.inverse;
      if (stored && keys.first == 0 && word == 0) v_scale[column + c] = s.scale;
    }
    uint32_t words[kVec] = {};
    const uint32_t sign = a.to.unsigned_v ? 0x80808080 : 0;
    const auto round = [&](auto to_byte) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float x[kVec];
        widen(x, raw[i], a.p.dtype);
#pragma unroll
        for (int c = 0; c < kVec; ++c) words[c] |= to_byte(__fmul_rn(x[c], inverse[c]), inverse_of_block) << i * 8;
      }
    };
    if (a.fp8)
      round([](float v, float inverse) { return uint32_t{to_e4m3x2(0, __fmul_rn(v, inverse))}; });
    else
      round(to_int8);
    if (!stored) return;
#pragma unroll
    for (int c = 0; c < kVec; ++c)
      *reinterpret_cast<uint32_t*>(a.to.v + (block * a.to.value_dim + column + c) * kInt8Keys + word * 4) =
          words[c] ^ sign;
  });
}

// What a block does: q of rows of q, or kv of a block of keys. v's keys are where k's are.
template <class Q, class KV>
__device__ inline void each_block(const QuantizeArguments& a, Q q, KV kv) {
  const int known = known_sequences(a.p);
  int64_t block = blockIdx.x;
  if (block < a.q_blocks) return q(blockIdx.x, known);
  block -= a.q_blocks;
  KeysOf keys;
  if (!keys.find(a.p, static_cast<int>(block % a.to.blocks), known)) return;
  const int head = static_cast<int>(block / a.to.blocks);
  __shared__ SharedKeys shared;
  kv(shared, keys, head, block);
}
// Two blocks on a multiprocessor: with three the rows of k that a thread holds spill.
__global__ void __launch_bounds__(kThreads, 2) qkv_to_int8_kernel(const __grid_constant__ QuantizeArguments a) {
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  each_block(
      a, [&](unsigned block, int known) { quantize_q(a, block, known); },
      [&](SharedKeys& shared, const KeysOf& keys, int head, int64_t block) {
        quantize_k(a, shared, keys, head, block);
        quantize_v(a, shared, keys, head, block);
      });
}

// AttentionOperands, to the layout in which kernels read them or from it. a.p.q, k and v are theirs.
struct ExchangeArguments {
  QuantizeArguments a;
  AttentionOperands scales;
};

// kGive: what the caller has to the kernels; else back to the caller. Elsewhere than `inside` kernels have 0.
template <bool kGive, class T>
__device__ inline void exchange(T* callers, T* kernels, bool inside) {
  if (kGive)
    *kernels = inside ? *callers : T{};
  else if (inside)
    *callers = *kernels;
}
__device__ inline int8_t* bytes(const AttentionTensor& t) { return static_cast<int8_t*>(const_cast<void*>(t.data)); }
__device__ inline uint2* words(int8_t* x, int64_t i) { return reinterpret_cast<uint2*>(x + i); }

template <bool kGive>
__device__ inline void exchange_q(const ExchangeArguments& e, unsigned block, int known) {
  const QuantizeArguments& a = e.a;
  const AttentionParams& p = a.p;
  AttentionTile tile;
  if (!tile.find(p, kRows, a.tiles, block, known) || !tile.known()) return;
  const int across = a.to.head_dim / kVec, column = static_cast<int>(threadIdx.x) % across * kVec;
  for (int r = static_cast<int>(threadIdx.x) / across; r < min(kRows, tile.rows - tile.row); r += kThreads / across) {
    const int64_t to = tile.lse(p, tile.row + r), from = tile.q(p) + (tile.row + r) * p.q.row;
    exchange<kGive>(words(bytes(p.q), from + column), words(a.to.q, to * a.to.head_dim + column), column < p.head_dim);
    if (column > 0) continue;
    exchange<kGive>(e.scales.q_scale + from / p.head_dim, a.to.q_scale + to, true);
    exchange<kGive>(e.scales.q_shift + from / p.head_dim, a.to.shift + to, true);
  }
}

template <bool kGive>
__device__ inline void exchange_k(const ExchangeArguments& e, SharedKeys& s, const KeysOf& keys, int head,
                                  int64_t block) {
  const QuantizeArguments& a = e.a;
  const AttentionParams& p = a.p;
  const int across = a.to.head_dim / kVec, column = static_cast<int>(threadIdx.x) % across * kVec;
  const int64_t first = keys.sequence * p.k.batch + head * p.k.head + (keys.first_of_sequence + keys.first) * p.k.row;
  const int left = keys.keys - keys.first;
  if (const int key = static_cast<int>(threadIdx.x); key < kInt8Keys) {
    float* const callers = e.scales.k_scale + (first + key * p.k.row) / p.head_dim;
    if (kGive)
      s.scale[key] = key < left ? without_two_bits(*callers) : 0;
    else
      exchange<false>(callers, a.to.k_scale(block, key), key < left), s.slot[key] = s.key[key] = key;
  }
  __syncthreads();
  if (kGive) place_keys(a.to, s, block, left);
  for (int r = static_cast<int>(threadIdx.x) / across; r < kInt8Keys; r += kThreads / across)
    exchange<kGive>(words(bytes(p.k), first + r * p.k.row + column),
                    words(a.to.k, (block * kInt8Keys + s.slot[r]) * a.to.head_dim + column),
                    r < left && column < p.head_dim);
}

// Four keys of a channel, byte by byte: unrolled, it spills.
template <bool kGive>
__device__ inline void exchange_v(const ExchangeArguments& e, const SharedKeys& s, const KeysOf& keys, int head,
                                  int64_t block) {
  const QuantizeArguments& a = e.a;
  const AttentionParams& p = a.p;
  const int word = threadIdx.x % kWords;
  const int64_t from = keys.sequence * p.v.batch + head * p.v.head + keys.first_of_sequence * p.v.row;
  const int64_t sequence = int64_t{keys.sequence} * p.kv_heads + head;
  // Callers have a block's scale for each of its keys.
  if (const int r = static_cast<int>(threadIdx.x); !a.fp8 && r < (kGive ? 1 : kInt8Keys))
    exchange<kGive>(e.scales.v_block_scale + (from + (keys.first + r) * p.v.row) / p.value_dim,
                    a.to.v_block_scale(block), keys.first + r < keys.keys);
  if (kGive && a.to.unsigned_v && threadIdx.x == 0) *a.to.v_block_scale(block) *= a.to.v_unit();
#pragma unroll 1
  for (int c = static_cast<int>(threadIdx.x) / kWords; c < a.to.value_dim; c += kThreads / kWords) {
    const bool is_column = c < p.value_dim;
    if (keys.first == 0 && word == 0)
      exchange<kGive>(e.scales.v_scale + sequence * p.value_dim + c, a.to.v_scale + sequence * a.to.value_dim + c,
                      is_column);
#pragma unroll 1
    for (int i = 0; i < 4; ++i) {
      const int key = keys.first + s.key[int8_key(word, i)];
      int8_t& kernels = a.to.v[(block * a.to.value_dim + c) * kInt8Keys + word * 4 + i];
      exchange<kGive>(bytes(p.v) + from + key * p.v.row + c, &kernels, is_column && key < keys.keys);
      if (kGive && a.to.unsigned_v) kernels ^= -128;
    }
  }
}

template <bool kGive>
__global__ void __launch_bounds__(kThreads) exchange_operands_kernel(const __grid_constant__ ExchangeArguments e) {
  each_block(
      e.a, [&](unsigned block, int known) { exchange_q<kGive>(e, block, known); },
      [&](SharedKeys& shared, const KeysOf& keys, int head, int64_t block) {
        exchange_k<kGive>(e, shared, keys, head, block);
        exchange_v<kGive>(e, shared, keys, head, block);
      });
}

int quantize_attention(const Attention8bitParams& p, const Int8Operands& to, void* cuda_stream,
                       const AttentionOperands* returned) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const int64_t tiles = row_tiles(p, kRows), statistics = int64_t{p.batch} * p.kv_heads * (to.chunks + 1);
  const QuantizeArguments arguments{.p = p,
                                    .to = to,
                                    .fp8 = p.fp8,
                                    .rotation = p.rotates ? p.head_dim & -p.head_dim : 1,
                                    .tiles = static_cast<unsigned>(tiles),
                                    .q_blocks = tiles * all_heads(p),
                                    .key_blocks = to.blocks * p.kv_heads};
  const int64_t grid = arguments.q_blocks + arguments.key_blocks;
  if (grid > INT32_MAX || statistics > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (p.quantized.q) {
    exchange_operands_kernel<true><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>({arguments, p.quantized});
    return cudaGetLastError();
  }
  qkv_statistics_kernel<<<static_cast<unsigned>(statistics), kThreads, 0, stream>>>(arguments);
  if (auto e = cudaGetLastError()) return e;
  const Launch launch{.grid = grid, .block = kThreads, .dependent = waits_for_earlier_kernels(p.device.arch)};
  if (const int e = launch_kernel(qkv_to_int8_kernel, launch, stream, arguments)) return e;
  if (!returned) return cudaSuccess;
  QuantizeArguments of_caller = arguments;
  const auto tensor = [&](int8_t* data, int rows, int heads, int columns) {
    const int64_t row = int64_t{heads} * columns;
    return AttentionTensor{data, p.cu_seqlens_q ? 0 : rows * row, row, columns};
  };
  of_caller.p.q = tensor(returned->q, p.rows, p.heads, p.head_dim);
  of_caller.p.k = tensor(returned->k, p.keys, p.kv_heads, p.head_dim);
  of_caller.p.v = tensor(returned->v, p.keys, p.kv_heads, p.value_dim);
  exchange_operands_kernel<false><<<static_cast<unsigned>(grid), kThreads, 0, stream>>>({of_caller, *returned});
  return cudaGetLastError();
}

// Whatever kernel takes the operands: of a number of columns that threads of a warp share evenly.
static Int8Operands operands_of(const QuantizeAttentionParams& p) {
  const int columns = p.head_dim <= 64 ? 64 : p.head_dim <= 128 ? 128 : 256;
  return Int8Operands::of(p, columns, columns);
}

}  // namespace forwardpass

using namespace forwardpass;

int forwardpass_select_quantize_attention(const QuantizeAttentionParams* p, AttentionChoice* choice) {
  *choice = {.workspace_bytes = operands_of(*p).bytes};
  return cudaSuccess;
}
int forwardpass_quantize_attention(const QuantizeAttentionParams* p, void* stream) {
  return quantize_attention(*p, operands_of(*p), stream, &p->to);
}
