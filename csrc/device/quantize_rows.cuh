#pragma once
// The kernel half of every op that ends in a quantisation. A segment (a row, or one group of it) is read once into the
// registers of the threads that share it, reduced to its range, and stored as int8 or e4m3. For bf16 to int8 an H100
// can issue 26 instructions per element while its 3 bytes move; the aligned path takes 13, and another 13 are what a
// thread does once for its 32 elements (counted in the SASS for sm_90).
#include <type_traits>

#include "device/ptx_sm80.cuh"
#include "device/rotate.cuh"
#include "device/vec.cuh"

namespace forwardpass {

struct RowsConfig {
  static constexpr int kVecs = 4;        // vectors of 8 per thread in registers: 32 floats, 64 bytes of fp16 in flight
  static constexpr int kMaxWidth = 512;  // threads that share a segment: 16384 columns are read once (1024 spill)
  static constexpr int kBlock = 128;     // threads of a block that holds several segments
};

// How a launch maps segments to threads: `width` consecutive threads, a power of two, share a segment.
struct RowsLaunch {
  int width, block;
  int64_t segments, groups;
  unsigned grid() const { return static_cast<unsigned>((segments * width + block - 1) / block); }
};

inline RowsLaunch rows_launch(int64_t rows, const QuantizedRows& out) {
  const int64_t vectors = (out.group + kVec - 1) / kVec;
  RowsLaunch l{};
  l.groups = (out.columns + out.group - 1) / out.group;
  l.segments = rows * l.groups;
  l.width = out.rotation ? 32 : 1;  // as few threads as hold the segment: the registers bind; unmeasured
  while (l.width < RowsConfig::kMaxWidth && l.width * RowsConfig::kVecs < vectors) l.width *= 2;
  l.block = l.width > 32 ? l.width : RowsConfig::kBlock;  // reduce_segment: warps of a block share its slots
  return l;
}

inline bool aligned16(const void* p, int64_t stride_bytes, int64_t group_bytes, int64_t groups) {
  return is_aligned(p) && stride_bytes % 16 == 0 && (groups == 1 || group_bytes % 16 == 0);
}

// This thread is `lane` of the `width` threads of segment (row, group), which has columns [begin, begin + length).
struct Segment {
  int64_t row, group, begin;
  int length, lane, width;
  bool active;

  __device__ Segment(const RowsLaunch& l, const QuantizedRows& out, bool rotates = false) {
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, index = thread / l.width;
    active = index < l.segments;  // idle threads of the last block still take part in barriers and shuffles
    row = index / l.groups;
    group = index % l.groups;
    begin = group * out.group;
    length = active ? static_cast<int>(min(out.group, out.columns - begin)) : 0;
    lane = threadIdx.x % l.width;
    if (rotates) lane = rotated_lane(lane);
    width = l.width;
  }
};

// Reduces over the segment's threads; every thread gets the result. Within a warp by shuffles; a wider segment is the
// block, and reduces through shared memory. slot: 32 values there, different ones for each call, as nothing guards them
// afterwards.
template <class T, class Op>
__device__ T reduce_segment(T v, const Segment& s, T* slot, Op op) {
  for (int offset = min(s.width, 32) / 2; offset > 0; offset /= 2) v = op(v, __shfl_xor_sync(0xffffffffu, v, offset));
  if (s.width > 32) {
    if (threadIdx.x % 32 == 0) slot[threadIdx.x / 32] = v;
    __syncthreads();
    v = slot[0];
    for (int i = 1; i < s.width / 32; ++i) v = op(v, slot[i]);
  }
  return v;
}

// What a thread holds of a segment at a time: vectors of 8 columns, `width` vectors apart, the first at column `base`.
using Chunk = float[RowsConfig::kVecs][kVec];

// f(i, column, n) for each vector of a chunk that begins inside the segment; n of its columns are inside.
template <class F>
__device__ void for_each_vector(const Segment& s, int base, F f) {
#pragma unroll
  for (int i = 0; i < RowsConfig::kVecs; ++i) {
    const int column = base + i * s.width * kVec, n = min(kVec, s.length - column);
    if (n <= 0) break;
    f(i, column, n);
  }
}

// Loads a chunk of a segment whose column c is p[offset_of(c)]; the columns of a vector are contiguous. A vector that
// crosses the segment's end gets 0 there, one beyond it anything. All loads are issued before the first is used: one at
// a time, the 640 threads that fit a multiprocessor at 89 registers would have 10 KB in flight, and 3.35 TB/s (H100) at
// an assumed latency of 600 ns need 15 KB per multiprocessor.
template <class T, class Offset>
__device__ void load_chunk(Chunk& v, const T* p, const Segment& s, int base, bool aligned, Offset offset_of) {
  if (aligned && s.length % kVec == 0) {
    Vec<T> raw[RowsConfig::kVecs];
#pragma unroll
    for (int i = 0; i < RowsConfig::kVecs; ++i) {
      const int column = base + i * s.width * kVec;
      const int clamped = column < s.length ? column : base;  // no branch between loads
      raw[i] = *reinterpret_cast<const Vec<T>*>(p + offset_of(clamped));
    }
#pragma unroll
    for (int i = 0; i < RowsConfig::kVecs; ++i)
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] = to_float(raw[i].e[j]);
  } else {
    for_each_vector(s, base, [&](int i, int column, int n) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] = j < n ? to_float(p[offset_of(column + j)]) : 0;
    });
  }
}
template <class T>
__device__ void load_chunk(Chunk& v, const T* p, const Segment& s, int base, bool aligned) {
  load_chunk(v, p, s, base, aligned, [](int column) { return column; });
}

// A segment's values, a chunk at a time, kept in registers where they fit; load(base, Chunk&) reads a chunk.
template <class Load>
struct SegmentValues {
  Load load;
  const Segment& s;
  Chunk v;
  bool loaded = false;

  __device__ SegmentValues(const Segment& segment, Load l) : load(l), s(segment) {}

  __device__ bool resident() const { return s.length <= s.width * RowsConfig::kVecs * kVec; }

  // f(column, n, float (&)[8]) for each of this thread's vectors, of which n columns are inside the segment. What f
  // writes is kept only if the segment is resident.
  template <class F>
  __device__ void for_each(F f) {
    for (int base = s.lane * kVec; base < s.length; base += s.width * kVec * RowsConfig::kVecs) {
      if (!loaded || !resident()) load(base, v);
      for_each_vector(s, base, [&](int i, int column, int n) { f(column, n, v[i]); });
    }
    loaded = true;
  }

  // The same by whole warps, for f that all lanes take part in: those behind the segment have zeros, and n <= 0.
  template <class F>
  __device__ void for_each_of_warp(F f) {
    const int step = s.width * kVec, within = s.lane % 32 * kVec;
    for (int first = s.lane * kVec - within; first < s.length; first += step * RowsConfig::kVecs) {
      if ((!loaded || !resident()) && first + within < s.length) load(first + within, v);
#pragma unroll
      for (int i = 0; i < RowsConfig::kVecs; ++i) {
        const int of_warp = first + i * step, n = s.length - of_warp - within;
        if (of_warp >= s.length) break;
        if (of_warp + 32 * kVec > s.length) {
#pragma unroll
          for (int j = 0; j < kVec; ++j) v[i][j] = n > 0 ? v[i][j] : 0;
        }
        f(of_warp + within, min(kVec, n), v[i]);
      }
    }
    loaded = true;
  }
};

struct NoRotation {
  __device__ explicit NoRotation(int) {}
  __device__ float factor() const { return 1; }
};

// A segment's values times channel_scale and, if kRotates, rotated.
template <bool kRotates, class Values>
struct ScaledValues {
  Values& values;
  const float* channel_scale;  // [length], or null
  bool aligned;
  std::conditional_t<kRotates, Rotation, NoRotation> rotate;
  bool done = false;  // what the registers have; without a rotation they keep the values as they were

  __device__ ScaledValues(Values& v, const Segment& s, const QuantizedRows& out, bool whole_vectors)
      : values(v),
        channel_scale(out.channel_scale ? out.channel_scale + s.begin : nullptr),
        aligned(whole_vectors && reinterpret_cast<uintptr_t>(out.channel_scale) % 16 == 0),
        rotate(static_cast<int>(out.rotation)) {}

  __device__ void scale(int column, int n, float (&v)[kVec]) const {
    float factors[kVec];
    load_floats(factors, channel_scale + column, n, aligned);
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = __fmul_rn(v[i], factors[i]);
  }

  // f(column, n, const float (&)[8])
  template <class F>
  __device__ void for_each(F f) {
    if constexpr (kRotates) {
      values.for_each_of_warp([&](int column, int n, float (&v)[kVec]) {
        if (!done) {
          if (channel_scale && n > 0) scale(column, n, v);
          __syncwarp();
          rotate(v);
        }
        if (n > 0) f(column, n, v);
      });
      done = values.resident();
    } else {
      values.for_each([&](int column, int n, float (&v)[kVec]) {
        if (!channel_scale) return f(column, n, v);
        float scaled[kVec];
#pragma unroll
        for (int i = 0; i < kVec; ++i) scaled[i] = v[i];
        scale(column, n, scaled);
        f(column, n, scaled);
      });
    }
  }
};

// Range -> scale and zero point -> q. The formula is forwardpass.ops.common.quantized_rows.quantize_values, operation
// by operation; _rn intrinsics keep the compiler from fusing a multiplication and an addition.
template <bool kRotates = false, class Values>
__device__ void quantize_segment(Values& values, const Segment& s, const QuantizedRows& out) {
  __shared__ float slots[2][32];  // of the two reductions
  const bool e4m3 = out.dtype == Dtype::e4m3;
  const bool whole_vectors = out.group % kVec == 0 || out.group == out.columns;  // a group begins where a vector may
  ScaledValues<kRotates, Values> scaled(values, s, out, whole_vectors);

  const float factor = scaled.rotate.factor();
  float inverse;
  int zero_point = 0;
  if (out.static_scale) {
    inverse = __fdiv_rn(factor, *out.static_scale);
    if (out.static_zero_point) zero_point = *out.static_zero_point;
  } else {
    float high = 0, low = 0;  // a NaN becomes both, and then the scale
    scaled.for_each([&](int, int, const float (&v)[kVec]) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        high = ptx::max_nan(high, v[i]);
        low = ptx::min_nan(low, v[i]);
      }
    });
    high = reduce_segment(high, s, slots[0], ptx::max_nan);
    low = -reduce_segment(low, s, slots[1], ptx::min_nan);
    float range = __fmul_rn(out.symmetric ? ptx::max_nan(high, low) : __fadd_rn(high, low), factor);
    range = range < kLeastRange ? kLeastRange : range;
    const float steps = e4m3 ? 448.0f : out.symmetric ? 127.0f : 255.0f;
    inverse = __fdiv_rn(__fmul_rn(steps, factor), range);
    if (!out.symmetric) zero_point = __float2int_rn(__fmul_rn(low, inverse)) - 128;
    if (s.active && s.lane == 0) {
      out.scale[s.row + s.group * out.scale_stride] = __fdiv_rn(range, steps);
      if (out.zero_point) out.zero_point[s.row + s.group * out.scale_stride] = zero_point;
    }
  }

  auto q = static_cast<uint8_t*>(out.q) + s.row * out.q_stride + s.begin;  // its rows are ours: 16-byte aligned
  const float low = (out.symmetric ? -127 : -128) - zero_point, high = 127 - zero_point;
  scaled.for_each([&](int column, int n, const float (&v)[kVec]) {
    Vec<uint8_t> packed;
    if (e4m3) {
      packed = to_e4m3_vector(v, inverse);
    } else {
#pragma unroll
      for (int i = 0; i < kVec; ++i) packed.e[i] = to_int(__fmul_rn(v[i], inverse), low, high) + zero_point;
    }
    store_vec(packed, q + column, n, whole_vectors);
  });
}

}  // namespace forwardpass
