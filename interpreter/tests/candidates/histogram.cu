// Counts of 16 values: the functions right_... are right, wrong_... are what verify has to refuse.
namespace {

constexpr int kBins = 16, kThreads = 128;

__global__ void clear(int* y) { y[threadIdx.x] = 0; }

__global__ void in_global(const int* x, int* y, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < n) atomicAdd(y + x[i], 1);
}

template <bool kAtomic, bool kClear>
__global__ void in_shared(const int* x, int* y, int n) {
  __shared__ int bins[kBins];
  if (kClear && threadIdx.x < kBins) bins[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kThreads)
    if (kAtomic)
      atomicAdd(bins + x[i], 1);
    else
      ++bins[x[i]];
  __syncthreads();
  if (threadIdx.x < kBins) y[threadIdx.x] = bins[threadIdx.x];
}

__global__ void not_atomic(const int* x, int* y, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < n) ++y[x[i]];
}

}  // namespace

extern "C" {

void right_global(const int* x, int* y, int n) {
  clear<<<1, kBins>>>(y);
  in_global<<<(n + kThreads - 1) / kThreads, kThreads>>>(x, y, n);
}
void right_shared(const int* x, int* y, int n) { in_shared<true, true><<<1, kThreads>>>(x, y, n); }
void wrong_not_cleared(const int* x, int* y, int n) { in_global<<<(n + kThreads - 1) / kThreads, kThreads>>>(x, y, n); }
void wrong_not_atomic(const int* x, int* y, int n) {
  clear<<<1, kBins>>>(y);
  not_atomic<<<(n + kThreads - 1) / kThreads, kThreads>>>(x, y, n);
}
void wrong_shared_race(const int* x, int* y, int n) { in_shared<false, true><<<1, kThreads>>>(x, y, n); }
void wrong_shared_not_cleared(const int* x, int* y, int n) { in_shared<true, false><<<1, kThreads>>>(x, y, n); }
void wrong_too_far(const int* x, int* y, int n) {
  clear<<<1, kBins>>>(y);
  in_global<<<(n + kThreads - 1) / kThreads, kThreads>>>(x, y, (n + kThreads - 1) / kThreads * kThreads);
}
}
