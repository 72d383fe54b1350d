// A program of the kind people write to try CUDA out: plain runtime API, and its own verdict. It knows nothing of the
// interpreter. Each feature is one function; `features assert` tries a device assert that fails, which ends a context.
#include <cuda_runtime.h>

#include <cassert>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define CHECK(call)                                                                                           \
  do {                                                                                                        \
    cudaError_t error = (call);                                                                               \
    if (error != cudaSuccess) {                                                                               \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, cudaGetErrorName(error), cudaGetErrorString(error)); \
      std::exit(2);                                                                                           \
    }                                                                                                         \
  } while (0)

// An array on the device.
template <typename T>
struct Device {
  T* data;
  size_t bytes;
  explicit Device(size_t n) : bytes(n * sizeof(T)) { CHECK(cudaMalloc(&data, bytes)); }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    CHECK(cudaMemcpy(data, host.data(), bytes, cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  ~Device() { CHECK(cudaFree(data)); }
  std::vector<T> host() const {
    std::vector<T> result(bytes / sizeof(T));
    CHECK(cudaMemcpy(result.data(), data, bytes, cudaMemcpyDeviceToHost));
    return result;
  }
};

std::vector<float> ramp(int n) {
  std::vector<float> x(n);
  for (int i = 0; i < n; ++i) x[i] = static_cast<float>(i % 97 - 48);
  return x;
}

// Templated kernels, one instance a type.
template <typename T, int UNROLL>
__global__ void axpy(const T* x, T* y, T a, int n) {
  int first = (blockIdx.x * blockDim.x + threadIdx.x) * UNROLL;
#pragma unroll
  for (int i = first; i < first + UNROLL; ++i) {
    if (i < n) y[i] += a * x[i];
  }
}

template <typename T>
bool axpy_of() {
  std::vector<T> x(1000), y(1000);
  for (int i = 0; i < 1000; ++i) x[i] = T(i), y[i] = T(2 * i + 1);
  Device<T> dx(x), dy(y);
  axpy<T, 4><<<2, 128>>>(dx.data, dy.data, T(3), 1000);
  CHECK(cudaGetLastError());
  CHECK(cudaDeviceSynchronize());
  std::vector<T> result = dy.host();
  for (int i = 0; i < 1000; ++i) {
    if (result[i] != T(5 * i + 1)) return false;
  }
  return true;
}
bool templates() { return axpy_of<float>() && axpy_of<double>() && axpy_of<int>() && axpy_of<long long>(); }

// Constant memory and a device variable, both ways.
__constant__ float coefficients[4];
__device__ int evaluations;
__device__ float offset = 0.5f;

__global__ void polynomial(const float* x, float* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float value = 0;
  for (int k = 3; k >= 0; --k) value = value * x[i] + coefficients[k];
  y[i] = value + offset;
  atomicAdd(&evaluations, 1);
}

bool symbols() {
  const float c[4] = {1, -2, 0.5f, 0.25f};
  int zero = 0, count = -1;
  float half = -1;
  CHECK(cudaMemcpyToSymbol(coefficients, c, sizeof(c)));
  CHECK(cudaMemcpyToSymbol(evaluations, &zero, sizeof(zero)));
  CHECK(cudaMemcpyFromSymbol(&half, offset, sizeof(half)));
  std::vector<float> x = ramp(300);
  Device<float> dx(x), dy(300);
  polynomial<<<3, 128>>>(dx.data, dy.data, 300);
  CHECK(cudaMemcpyFromSymbol(&count, evaluations, sizeof(count)));
  std::vector<float> y = dy.host();
  for (int i = 0; i < 300; ++i) {
    if (y[i] != ((c[3] * x[i] + c[2]) * x[i] + c[1]) * x[i] + c[0] + 0.5f) return false;
  }
  void* address = nullptr;
  size_t size = 0;
  CHECK(cudaGetSymbolAddress(&address, coefficients));
  CHECK(cudaGetSymbolSize(&size, coefficients));
  return count == 300 && half == 0.5f && address && size == sizeof(c);
}

// More dynamic shared memory than a kernel gets without asking.
__global__ void reverse(const float* x, float* y, int n) {
  extern __shared__ float tile[];
  for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = x[i];
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = tile[n - 1 - i];
}

bool dynamic_shared_memory() {
  const int n = 16000, bytes = n * sizeof(float);
  std::vector<float> x = ramp(n);
  Device<float> dx(x), dy(n);
  reverse<<<1, 256, bytes>>>(dx.data, dy.data, n);
  if (cudaGetLastError() != cudaErrorInvalidValue) return false;  // 64,000 bytes without the attribute
  CHECK(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  reverse<<<1, 256, bytes>>>(dx.data, dy.data, n);
  CHECK(cudaGetLastError());
  std::vector<float> y = dy.host();
  for (int i = 0; i < n; ++i) {
    if (y[i] != x[n - 1 - i]) return false;
  }
  return true;
}

bool launch_errors() {
  Device<float> x(1);
  reverse<<<1, 2048>>>(x.data, x.data, 0);  // 1024 threads at most
  if (cudaPeekAtLastError() != cudaErrorInvalidConfiguration) return false;
  if (cudaGetLastError() != cudaErrorInvalidConfiguration || cudaGetLastError() != cudaSuccess) return false;
  cudaError_t error = cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, 1 << 20);
  return error == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue;
}

// Streams and events, and copies in order with the kernels between them.
bool streams_and_events() {
  const int n = 512;
  cudaStream_t stream[2];
  cudaEvent_t start, stop, ready;
  for (cudaStream_t& s : stream) CHECK(cudaStreamCreate(&s));
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));
  CHECK(cudaEventCreateWithFlags(&ready, cudaEventDisableTiming));
  float *pinned, *x, *y;
  CHECK(cudaMallocHost(&pinned, n * sizeof(float)));
  CHECK(cudaMallocAsync(&x, n * sizeof(float), stream[0]));
  CHECK(cudaMalloc(&y, n * sizeof(float)));
  for (int i = 0; i < n; ++i) pinned[i] = i;
  CHECK(cudaEventRecord(start, stream[0]));
  CHECK(cudaMemcpyAsync(x, pinned, n * sizeof(float), cudaMemcpyHostToDevice, stream[0]));
  CHECK(cudaEventRecord(ready, stream[0]));
  CHECK(cudaStreamWaitEvent(stream[1], ready, 0));
  CHECK(cudaMemsetAsync(y, 0, n * sizeof(float), stream[1]));
  axpy<float, 4><<<1, 128, 0, stream[1]>>>(x, y, 2.f, n);
  CHECK(cudaMemcpyAsync(pinned, y, n * sizeof(float), cudaMemcpyDeviceToHost, stream[1]));
  CHECK(cudaEventRecord(stop, stream[1]));
  CHECK(cudaEventSynchronize(stop));
  CHECK(cudaStreamSynchronize(stream[1]));
  bool right = cudaStreamQuery(stream[1]) == cudaSuccess && cudaEventQuery(stop) == cudaSuccess;
  float milliseconds = -1;
  CHECK(cudaEventElapsedTime(&milliseconds, start, stop));
  for (int i = 0; i < n; ++i) right &= pinned[i] == 2.f * i;
  CHECK(cudaFreeAsync(x, stream[0]));
  CHECK(cudaFree(y));
  CHECK(cudaFreeHost(pinned));
  for (cudaEvent_t e : {start, stop, ready}) CHECK(cudaEventDestroy(e));
  for (cudaStream_t s : stream) CHECK(cudaStreamDestroy(s));
  return right && milliseconds >= 0;
}

// printf of every kind of argument; the test that runs this program looks for these lines.
__global__ void speak(const char* name) {
  if (threadIdx.x % 32 == 0)
    printf("block %d warp %u: %s %5.2f %lld %c %%\n", blockIdx.x, threadIdx.x / 32, name, 1.5, 1ll << 40, 'x');
}

bool device_printf() {
  Device<char> name(std::vector<char>{'h', 'e', 'l', 'l', 'o', '\0'});
  speak<<<2, 64>>>(name.data);
  CHECK(cudaDeviceSynchronize());
  return true;
}

__global__ void assert_below(const int* x, int limit) { assert(x[threadIdx.x] < limit); }

cudaError_t assert_with(int limit) {
  std::vector<int> x(32);
  for (int i = 0; i < 32; ++i) x[i] = i;
  Device<int>* dx = new Device<int>(x);  // not freed: after a failed assert no call succeeds
  assert_below<<<1, 32>>>(dx->data, limit);
  return cudaDeviceSynchronize();
}
bool device_assert() { return assert_with(32) == cudaSuccess; }

// Atomics: integers of both sizes, floats, compare and swap, minimum, bits.
struct Totals {
  int sum, minimum, maximum;
  unsigned bits;
  unsigned long long wide;
  float real, cas;
};

__device__ void atomic_add_by_cas(float* address, float value) {
  int* word = reinterpret_cast<int*>(address);
  int seen = *static_cast<volatile int*>(word), expected;
  do {
    expected = seen;
    seen = atomicCAS(word, expected, __float_as_int(__int_as_float(expected) + value));
  } while (seen != expected);
}

__global__ void accumulate(Totals* totals) {
  __shared__ int block_sum;
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x == 0) block_sum = 0;
  __syncthreads();
  atomicAdd(&block_sum, i);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&totals->sum, block_sum);
  atomicMin(&totals->minimum, i - 7);
  atomicMax(&totals->maximum, i);
  atomicOr(&totals->bits, 1u << (i % 32));
  atomicAdd(&totals->wide, 1ull << 33);
  atomicAdd(&totals->real, 0.25f);
  atomic_add_by_cas(&totals->cas, 2.f);
}

bool atomics() {
  Device<Totals> totals(1);
  CHECK(cudaMemset(totals.data, 0, sizeof(Totals)));
  accumulate<<<4, 64>>>(totals.data);
  Totals t = totals.host()[0];
  return t.sum == 255 * 128 && t.minimum == -7 && t.maximum == 255 && t.bits == 0xffffffffu && t.wide == 256ull << 33 &&
         t.real == 64 && t.cas == 512;
}

// The last block to finish adds up what all have written.
__global__ void sum_by_last_block(const float* x, volatile float* partial, unsigned* finished, float* sum) {
  __shared__ bool last;
  float value = x[blockIdx.x * 32 + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xffffffffu, value, distance);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = value;
    __threadfence();
    last = atomicAdd(finished, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += partial[i];
    *sum = total;
  }
}

bool last_block() {
  std::vector<float> x = ramp(8 * 32);
  float expected = 0;
  for (float v : x) expected += v;
  Device<float> dx(x), partial(8), sum(1);
  Device<unsigned> finished(std::vector<unsigned>{0});
  sum_by_last_block<<<8, 32>>>(dx.data, partial.data, finished.data, sum.data);
  return sum.host()[0] == expected;
}

// Calls that stay calls, recursion among them, and an array in local memory.
__device__ __noinline__ int collatz_steps(long long n) {
  int steps = 0;
  for (; n != 1; ++steps) n = n % 2 ? 3 * n + 1 : n / 2;
  return steps;
}
__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }

__global__ void call(int* steps, int* numbers) {
  steps[threadIdx.x] = collatz_steps(threadIdx.x + 1);
  numbers[threadIdx.x] = fibonacci(threadIdx.x % 11);
}

bool calls_and_recursion() {
  Device<int> dsteps(64), dnumbers(64);
  call<<<1, 64>>>(dsteps.data, dnumbers.data);
  std::vector<int> steps = dsteps.host(), numbers = dnumbers.host();
  const int fibonaccis[] = {0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55};
  for (int i = 0; i < 64; ++i) {
    int expected = 0;
    for (long long n = i + 1; n != 1; ++expected) n = n % 2 ? 3 * n + 1 : n / 2;
    if (steps[i] != expected || numbers[i] != fibonaccis[i % 11]) return false;
  }
  return true;
}

__global__ void sort_rows(const int* x, int* y) {
  int row[16];
  for (int i = 0; i < 16; ++i) {
    int j = i;
    for (; j > 0 && row[j - 1] > x[threadIdx.x * 16 + i]; --j) row[j] = row[j - 1];
    row[j] = x[threadIdx.x * 16 + i];
  }
  for (int i = 0; i < 16; ++i) y[threadIdx.x * 16 + i] = row[i];
}

bool local_array() {
  std::vector<int> x(32 * 16);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<int>(i * 7919 % 1000);
  Device<int> dx(x), dy(x.size());
  sort_rows<<<1, 32>>>(dx.data, dy.data);
  std::vector<int> y = dy.host();
  for (int row = 0; row < 32; ++row) {
    long long in = x[row * 16], out = y[row * 16];
    for (int i = 1; i < 16; ++i) {
      if (y[row * 16 + i - 1] > y[row * 16 + i]) return false;
      in += x[row * 16 + i], out += y[row * 16 + i];
    }
    if (in != out) return false;
  }
  return true;
}

bool device_properties() {
  int count = 0, device = -1, major = 0, optin = 0;
  cudaDeviceProp p;
  CHECK(cudaGetDeviceCount(&count));
  CHECK(cudaSetDevice(0));
  CHECK(cudaGetDevice(&device));
  CHECK(cudaGetDeviceProperties(&p, 0));
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  CHECK(cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  std::printf("device: %s, sm_%d%d, %d SMs\n", p.name, p.major, p.minor, p.multiProcessorCount);
  return count >= 1 && device == 0 && major == p.major && p.warpSize == 32 && p.maxThreadsPerBlock == 1024 &&
         p.multiProcessorCount > 0 && p.totalGlobalMem > 0 && p.sharedMemPerBlock == 48 << 10 &&
         static_cast<size_t>(optin) == p.sharedMemPerBlockOptin;
}

bool occupancy() {
  int whole = 0, half = 0, minimum_grid = 0, block = 0, limit = 0;
  CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0));
  CHECK(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, limit / 2 - 1024));
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&half, reverse, 128, limit / 2 - 1024));
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&whole, reverse, 1024, 0));
  CHECK(cudaOccupancyMaxPotentialBlockSize(&minimum_grid, &block, reverse, 0, 0));
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, reverse));
  return half == 2 && whole >= 1 && whole <= 2 && block % 32 == 0 && block > 0 && minimum_grid > 0 &&
         attributes.maxThreadsPerBlock == 1024 && attributes.sharedSizeBytes == 0;
}

// cudaLaunchKernelEx; where there is programmatic dependent launch, the second kernel is started by it.
__global__ void add_one(float* x, int n) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] += 1;
}

bool launch_kernel_ex() {
  cudaDeviceProp p;
  CHECK(cudaGetDeviceProperties(&p, 0));
  std::vector<float> x = ramp(200);
  Device<float> dx(x);
  cudaLaunchAttribute programmatic = {};
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = 2;
  config.blockDim = 128;
  config.attrs = &programmatic;
  CHECK(cudaLaunchKernelEx(&config, add_one, dx.data, 200));
  config.numAttrs = p.major >= 9;
  CHECK(cudaLaunchKernelEx(&config, add_one, dx.data, 200));
  std::vector<float> y = dx.host();
  for (int i = 0; i < 200; ++i) {
    if (y[i] != x[i] + 2) return false;
  }
  return true;
}

int main(int argc, char** argv) {
  if (argc > 1 && !std::strcmp(argv[1], "assert")) {
    cudaError_t error = assert_with(31);
    std::printf("%s\n", cudaGetErrorName(error));
    return error == cudaErrorAssert ? 0 : 1;
  }
  const struct {
    const char* name;
    bool (*run)();
  } features[] = {
      {"templates", templates},
      {"symbols", symbols},
      {"dynamic shared memory", dynamic_shared_memory},
      {"launch errors", launch_errors},
      {"streams and events", streams_and_events},
      {"printf", device_printf},
      {"assert", device_assert},
      {"atomics", atomics},
      {"last block", last_block},
      {"calls and recursion", calls_and_recursion},
      {"local array", local_array},
      {"device properties", device_properties},
      {"occupancy", occupancy},
      {"cudaLaunchKernelEx", launch_kernel_ex},
  };
  int failed = 0;
  for (const auto& feature : features) {
    bool right = feature.run();
    std::printf("%s: %s\n", feature.name, right ? "PASS" : "FAIL");
    failed += !right;
  }
  std::printf("%s\n", failed ? "FAIL" : "PASS");
  return failed ? 1 : 0;
}
