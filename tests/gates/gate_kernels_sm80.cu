// For test_gates.py: one right kernel, and one for each way to fail a gate. They are compiled, never run.
#include <cstdint>

#include "device/shared_bytes.cuh"

__device__ inline void mma_s8(int4& c, const int4& a, const int2& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c.x), "+r"(c.y), "+r"(c.z), "+r"(c.w)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

__device__ inline void mma_f16(float4& c, const int4& a, const int2& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Right. Three loops with an mma: over tiles, over k with a mask (4 mma), over k without (4 mma and fewer
// instructions).
__global__ void __launch_bounds__(128)
    int8_gemm_kernel(const int4* a, const int2* b, int4* out, int k, int masked, int n) {
  for (int tile = blockIdx.x; tile < n; tile += gridDim.x) {
    int4 c[4] = {};
#pragma unroll 1
    for (int i = 0; i < masked; ++i) {
      int4 x = a[i * 128 + threadIdx.x];
      if (x.x % n > k) x.x = x.y = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_s8(c[j], x, b[i * 32 + threadIdx.x % 32]);
    }
#pragma unroll 1
    for (int i = masked; i < k; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) mma_s8(c[j], a[i * 128 + threadIdx.x], b[i * 32 + threadIdx.x % 32]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) out[(tile * 4 + j) * 128 + threadIdx.x] = c[j];
  }
}

__global__ void __launch_bounds__(128) int8_gemm_dp4a_kernel(const int4* a, const int4* b, int* out, int k) {
  int c = 0;
  for (int i = 0; i < k; ++i) c = __dp4a(a[i * 128 + threadIdx.x].x, b[i].x, c);
  out[threadIdx.x] = c;
}

__global__ void __launch_bounds__(128) int8_gemm_f16_kernel(const int4* a, const int2* b, float4* out, int k) {
  float4 c = {};
  for (int i = 0; i < k; ++i) mma_f16(c, a[i * 128 + threadIdx.x], b[i]);
  out[threadIdx.x] = c;
}

__global__ void __launch_bounds__(128) int8_gemm_straight_kernel(const int4* a, const int2* b, int4* out) {
  int4 c = {};
  mma_s8(c, a[threadIdx.x], b[threadIdx.x]);
  out[threadIdx.x] = c;
}

// 32 registers a thread for 64 values that are alive throughout
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float* x, float* out, int n) {
  float v[64] = {};
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int j = 0; j < 64; ++j) v[j] = fmaf(v[j], v[(j + 7) % 64], x[i * 64 + j]);
  }
#pragma unroll
  for (int j = 0; j < 64; ++j) out[j] = v[j];
}

struct Config {
  static constexpr int kThreads = 256;
  struct SharedStorage {
    float values[32000];
  };
};

extern __shared__ unsigned char dynamic[];

// 128000 bytes and 256 static ones: within the limit of 8.0, not of 8.9
template <class C, class = forwardpass::SharedBytesOf<C>>
__global__ void __launch_bounds__(C::kThreads) declared_kernel(float* x, int n) {
  __shared__ float partial[64];
  auto& storage = reinterpret_cast<typename C::SharedStorage&>(dynamic);
  storage.values[threadIdx.x] = partial[threadIdx.x % 64] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = storage.values[n] + partial[n % 64];
}
template __global__ void declared_kernel<Config>(float*, int);

__global__ void undeclared_kernel(float* x, int n) {
  __shared__ float partial[64];
  auto values = reinterpret_cast<float*>(dynamic);
  values[threadIdx.x] = partial[threadIdx.x % 64] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = values[n] + partial[n % 64];
}
