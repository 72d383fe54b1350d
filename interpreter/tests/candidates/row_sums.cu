// Sums of rows, one block for each: the functions right_... are right, wrong_... are what verify has to refuse.
namespace {

constexpr int kThreads = 256;

__device__ float partial(const float* row, int cols) {
  float sum = 0;
  for (int k = threadIdx.x; k < cols; k += kThreads) sum += row[k];
  return sum;
}

__global__ void tree(const float* x, float* y, int cols) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = partial(x + static_cast<long>(blockIdx.x) * cols, cols);
  __syncthreads();
  for (int n = kThreads / 2; n; n /= 2) {
    if (threadIdx.x < n) s[threadIdx.x] += s[threadIdx.x + n];
    __syncthreads();
  }
  if (!threadIdx.x) y[blockIdx.x] = s[0];
}

__global__ void shuffles(const float* x, float* y, int cols) {
  __shared__ float s[kThreads / 32];
  float sum = partial(x + static_cast<long>(blockIdx.x) * cols, cols);
  for (int n = 16; n; n /= 2) sum += __shfl_xor_sync(~0u, sum, n);
  if (threadIdx.x % 32 == 0) s[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < kThreads / 32 ? s[threadIdx.x] : 0;
    for (int n = 16; n; n /= 2) sum += __shfl_xor_sync(~0u, sum, n);
    if (!threadIdx.x) y[blockIdx.x] = sum;
  }
}

__global__ void atomics(const float* x, float* y, int cols) {
  if (!threadIdx.x) y[blockIdx.x] = 0;
  __syncthreads();
  atomicAdd(y + blockIdx.x, partial(x + static_cast<long>(blockIdx.x) * cols, cols));
}

// None after the last addition: the thread that made it stores it.
__global__ void barrier_before(const float* x, float* y, int cols) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = partial(x + static_cast<long>(blockIdx.x) * cols, cols);
  for (int n = kThreads / 2; n; n /= 2) {
    __syncthreads();
    if (threadIdx.x < n) s[threadIdx.x] += s[threadIdx.x + n];
  }
  if (!threadIdx.x) y[blockIdx.x] = s[0];
}

__global__ void no_first_barrier(const float* x, float* y, int cols) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = partial(x + static_cast<long>(blockIdx.x) * cols, cols);
  for (int n = kThreads / 2; n; n /= 2) {
    if (threadIdx.x < n) s[threadIdx.x] += s[threadIdx.x + n];
    __syncthreads();
  }
  if (!threadIdx.x) y[blockIdx.x] = s[0];
}

__global__ void atomics_on_what_is_there(const float* x, float* y, int cols) {
  atomicAdd(y + blockIdx.x, partial(x + static_cast<long>(blockIdx.x) * cols, cols));
}

__global__ void one_pass(const float* x, float* y, int cols) {
  __shared__ float s[kThreads];
  s[threadIdx.x] = threadIdx.x < cols ? x[blockIdx.x * cols + threadIdx.x] : 0;
  __syncthreads();
  for (int n = kThreads / 2; n; n /= 2) {
    if (threadIdx.x < n) s[threadIdx.x] += s[threadIdx.x + n];
    __syncthreads();
  }
  if (!threadIdx.x) y[blockIdx.x] = s[0];
}

__global__ void by_fours(const float* x, float* y, int cols) {
  const float* row = x + static_cast<long>(blockIdx.x) * cols;
  float sum = 0;
  for (int k = 4 * threadIdx.x; k < cols; k += 128) sum += row[k] + row[k + 1] + row[k + 2] + row[k + 3];
  for (int n = 16; n; n /= 2) sum += __shfl_xor_sync(~0u, sum, n);
  if (!threadIdx.x) y[blockIdx.x] = sum;
}

__global__ void one_row_too_many(const float* x, float* y, int rows, int cols) {
  if (blockIdx.x > rows) return;
  float sum = 0;
  for (int k = 0; k < cols; ++k) sum += x[static_cast<long>(blockIdx.x) * cols + k];
  y[blockIdx.x] = sum;
}

__global__ void nothing() {}

}  // namespace

extern "C" {

void right_tree(const float* x, float* y, int rows, int cols) { tree<<<rows, kThreads>>>(x, y, cols); }
void right_shuffles(const float* x, float* y, int rows, int cols) { shuffles<<<rows, kThreads>>>(x, y, cols); }
void right_atomics(const float* x, float* y, int rows, int cols) { atomics<<<rows, kThreads>>>(x, y, cols); }
void right_barrier_before(const float* x, float* y, int rows, int cols) {
  barrier_before<<<rows, kThreads>>>(x, y, cols);
}
void wrong_first_barrier(const float* x, float* y, int rows, int cols) {
  no_first_barrier<<<rows, kThreads>>>(x, y, cols);
}
void wrong_not_cleared(const float* x, float* y, int rows, int cols) {
  atomics_on_what_is_there<<<rows, kThreads>>>(x, y, cols);
}
void wrong_one_pass(const float* x, float* y, int rows, int cols) { one_pass<<<rows, kThreads>>>(x, y, cols); }
void wrong_by_fours(const float* x, float* y, int rows, int cols) { by_fours<<<rows, 32>>>(x, y, cols); }
void wrong_row(const float* x, float* y, int rows, int cols) { one_row_too_many<<<rows + 1, 1>>>(x, y, rows, cols); }
void wrong_nothing(const float*, float*, int, int) { nothing<<<1, 1>>>(); }
void wrong_threads(const float* x, float* y, int rows, int cols) { tree<<<rows, kThreads / 2>>>(x, y, cols); }
void wrong_too_many_threads(const float* x, float* y, int rows, int cols) { tree<<<rows, 2048>>>(x, y, cols); }
void wrong_order(float* y, const float* x, int rows, int cols) { tree<<<rows, kThreads>>>(x, y, cols); }
void wrong_host(const float* x, float* y, int rows, int cols) {
  for (int r = 0; r < rows; ++r) {
    y[r] = 0;
    for (int k = 0; k < cols; ++k) y[r] += x[r * cols + k];
  }
}
}
