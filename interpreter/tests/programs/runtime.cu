// The corners of the runtime API: what a launch refuses, with which code and words, memory in all its kinds, copies
// with a pitch, function attributes, managed variables, host functions, the driver's entry point for tensor maps.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>

#define CHECK(call)                                                                                           \
  do {                                                                                                        \
    cudaError_t error = (call);                                                                               \
    if (error != cudaSuccess) {                                                                               \
      std::printf("%s:%d: %s: %s\n", __FILE__, __LINE__, cudaGetErrorName(error), cudaGetErrorString(error)); \
      std::exit(2);                                                                                           \
    }                                                                                                         \
  } while (0)

__managed__ int managed = 41;
__device__ const char* words[2] = {"zero", "one"};
__device__ double pi = 3.25;

__global__ void __launch_bounds__(128, 4) write(int* out, int value) { out[threadIdx.x] = value; }
__global__ void dynamic(float* out) {
  extern __shared__ float shared[];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void statically(float* out) {
  __shared__ float shared[1024];
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void read_variables(char* out) {
  out[threadIdx.x] = words[1][threadIdx.x];
  if (threadIdx.x == 0) managed += pi == 3.25;
}
struct Large {
  char bytes[3];
  double number;
  int* out;
};
__global__ void by_value(char first, Large large, short last) {
  *large.out = first + large.bytes[2] + int(large.number) + last;
}

int major_version() {
  int major;
  CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major;
}

// Launches `write` with attributes of cudaLaunchKernelEx.
cudaError_t launch_with(int* out, dim3 grid, dim3 block, cudaLaunchAttribute attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaError_t error = cudaLaunchKernelEx(&config, write, out, 1);
  return cudaGetLastError() == error ? error : cudaErrorUnknown;
}

template <class... Args>
cudaError_t launch(void (*kernel)(Args...), dim3 grid, dim3 block, size_t shared, Args... args) {
  kernel<<<grid, block, shared>>>(args...);
  return cudaGetLastError();
}

bool refused_launches() {
  int* out;
  CHECK(cudaMalloc(&out, 4096));
  float* floats = reinterpret_cast<float*>(out);
  bool right = launch(write, 1, 0, 0, out, 1) == cudaErrorInvalidConfiguration &&
               launch(write, 0, 1, 0, out, 1) == cudaErrorInvalidConfiguration &&
               launch(write, 1, dim3(1, 1, 65), 0, out, 1) == cudaErrorInvalidConfiguration &&
               launch(write, dim3(1, 65536), 1, 0, out, 1) == cudaErrorInvalidConfiguration &&
               launch(dynamic, 1, 1025, 0, floats) == cudaErrorInvalidConfiguration &&
               launch(write, 1, 129, 0, out, 1) != cudaSuccess &&  // over the launch bounds
               launch(statically, 1, 32, (48 << 10) - 4096 + 1, floats) == cudaErrorInvalidValue &&
               launch(statically, 1, 32, (48 << 10) - 4096, floats) == cudaSuccess;
  int optin;
  CHECK(cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  const auto allow = [](auto kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  right &= allow(dynamic, optin + 1) == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue &&
           allow(dynamic, optin) == cudaSuccess && launch(dynamic, 1, 32, optin, floats) == cudaSuccess &&
           launch(dynamic, 1, 32, optin + 1, floats) == cudaErrorInvalidValue &&
           allow(statically, optin - 4095) == cudaErrorInvalidValue && cudaGetLastError() == cudaErrorInvalidValue &&
           allow(statically, optin - 4096) == cudaSuccess;

  cudaLaunchAttribute cluster = {}, programmatic = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {16, 1, 1};
  programmatic.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  programmatic.val.programmaticStreamSerializationAllowed = 1;
  right &= launch_with(out, 32, 32, cluster) == cudaErrorInvalidClusterSize;  // 8 are portable, and none before 9.0
  // It may begin before those above have ended, so it writes elsewhere.
  right &= launch_with(out + 512, 1, 32, programmatic) == (major_version() < 9 ? cudaErrorNotSupported : cudaSuccess);

  int value = 7, blocks, multiprocessors;
  void* args[] = {&out, &value};
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, write, 128, 0));
  CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  right &= blocks >= 4 && cudaLaunchCooperativeKernel(write, 1, 32, args) == cudaSuccess &&
           cudaLaunchCooperativeKernel(write, blocks * multiprocessors + 1, 128, args) ==
               cudaErrorCooperativeLaunchTooLarge &&
           cudaGetLastError() == cudaErrorCooperativeLaunchTooLarge;
  CHECK(cudaFree(out));
  return right;
}

// What was asked for and what the limit is, behind cudart's text of the code; that alone for what comes without words.
bool reasons() {
  const auto says = [](cudaError_t error, std::initializer_list<std::string> words) {
    const std::string text = cudaGetErrorString(error);
    bool all = error != cudaSuccess;
    for (const std::string& word : words) all &= text.find(word) != std::string::npos;
    if (!all) std::printf("%d: %s\n", error, text.c_str());
    return all;
  };
  int *out, optin;
  CHECK(cudaMalloc(&out, 1000));
  float* floats = reinterpret_cast<float*>(out);
  CHECK(cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  const std::string arch = major_version() == 8 ? "sm_8" : major_version() == 9 ? "sm_90a" : "sm_1";
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const char* early = cudaGetErrorString(cudaErrorInvalidValue);
  bool right = says(cudaFuncSetAttribute(statically, most, optin),
                    {"invalid argument: " + std::to_string(optin) + " bytes of dynamic", "4096 of the kernel's own",
                     arch, "has " + std::to_string(optin)});
  right &=
      says(cudaFuncSetAttribute(dynamic, cudaFuncAttributePreferredSharedMemoryCarveout, 101), {"101", "per cent"});
  right &= says(launch(statically, 1, 32, 48 << 10, floats), {"49152 bytes", "45056 dynamic ones by default"});
  right &= says(launch(write, 1, 129, 0, out, 1), {"(129, 1, 1) threads", "at most 128 (__launch_bounds__)"});
  right &= says(launch(write, dim3(1, 65536), 1, 0, out, 1), {"(1, 65536, 1) blocks", "(2147483647, 65535, 65535)"});
  right &= says(launch(write, 1, dim3(1, 1, 65), 0, out, 1), {"(1, 1, 65) threads", "(1024, 1024, 64)"});
  right &= says(cudaMemset(out, 0, 1001), {"invalid argument: 1001 bytes at 0x", "one allocation"});
  right &= says(cudaFree(out + 1), {"is freed, where no allocation begins"});
  void* huge;
  right &= says(cudaMalloc(&huge, size_t{1} << 50), {"out of memory: 1125899906842624 bytes", "are left"});
  right &= says(cudaGraphLaunch(nullptr, nullptr), {"invalid argument"});
  right &= cudaGetErrorString(cudaErrorInvalidValue) == std::string("invalid argument") &&
           early == std::string("invalid argument");
  cudaGetLastError();
  CHECK(cudaFree(out));
  return right;
}

bool memory() {
  int* out;
  float* pinned;
  double* shared;
  size_t before, after, total;
  CHECK(cudaMemGetInfo(&before, &total));
  CHECK(cudaMalloc(&out, 1000));
  CHECK(cudaMemGetInfo(&after, &total));
  CHECK(cudaHostAlloc(&pinned, 64, cudaHostAllocMapped));
  CHECK(cudaMallocManaged(&shared, 64));
  cudaPointerAttributes a[4];
  int on_stack;
  CHECK(cudaPointerGetAttributes(&a[0], out + 3));
  CHECK(cudaPointerGetAttributes(&a[1], pinned));
  CHECK(cudaPointerGetAttributes(&a[2], shared));
  CHECK(cudaPointerGetAttributes(&a[3], &on_stack));
  bool right = before - after == 1000 && a[0].type == cudaMemoryTypeDevice && a[1].type == cudaMemoryTypeHost &&
               a[2].type == cudaMemoryTypeManaged && a[3].type == cudaMemoryTypeUnregistered;
  char host[1001] = {};
  right &= cudaMemcpy(out, host, 1000, cudaMemcpyHostToDevice) == cudaSuccess &&
           cudaMemcpy(out, host, 1001, cudaMemcpyHostToDevice) == cudaErrorInvalidValue &&
           cudaMemset(host, 0, 8) == cudaErrorInvalidValue && cudaMemset(out, 1, 1000) == cudaSuccess;
  CHECK(cudaFree(out));
  right &= cudaFree(out) == cudaErrorInvalidValue && cudaFree(nullptr) == cudaSuccess;
  right &= cudaMalloc(&out, size_t{1} << 40) == cudaErrorMemoryAllocation;
  cudaGetLastError();
  CHECK(cudaFreeHost(pinned));
  CHECK(cudaFree(shared));
  return right;
}

bool pitched_copies() {
  char from[4][10], to[4][20] = {}, *rows;
  size_t pitch;
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 10; ++c) from[r][c] = static_cast<char>(10 * r + c);
  CHECK(cudaMallocPitch(&rows, &pitch, 10, 4));
  CHECK(cudaMemset2D(rows, pitch, 1, 10, 4));
  CHECK(cudaMemcpy2D(rows, pitch, from, 10, 10, 3, cudaMemcpyHostToDevice));
  CHECK(cudaMemcpy2D(to, 20, rows, pitch, 10, 4, cudaMemcpyDeviceToHost));
  bool right =
      pitch >= 10 && cudaMemcpy2D(rows, 9, from, 10, 10, 4, cudaMemcpyHostToDevice) == cudaErrorInvalidPitchValue;
  cudaGetLastError();
  for (int r = 0; r < 4; ++r)
    right &= !std::memcmp(to[r], r < 3 ? from[r] : "\1\1\1\1\1\1\1\1\1\1", 10) && to[r][10] == 0;
  CHECK(cudaFree(rows));
  return right;
}

bool variables() {
  char* out;
  char host[4] = {};
  double value = 2.5;
  size_t size;
  CHECK(cudaMalloc(&out, 4));
  CHECK(cudaGetSymbolSize(&size, pi));
  read_variables<<<1, 4>>>(out);
  CHECK(cudaMemcpy(host, out, 4, cudaMemcpyDeviceToHost));
  bool right = !std::strcmp(host, "one") && managed == 42 && size == 8;
  right &= cudaMemcpyToSymbol(pi, &value, 8, 1) == cudaErrorInvalidValue;  // one byte too far
  cudaGetLastError();
  CHECK(cudaMemcpyToSymbol(pi, &value, 8));
  managed = 7;
  read_variables<<<1, 4>>>(out);
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaFree(out));
  return right && managed == 7;
}

bool arguments_by_value() {
  int *out, result = 0;
  CHECK(cudaMalloc(&out, 4));
  by_value<<<1, 1>>>(1, Large{{0, 0, 20}, 300.0, out}, short(4000));
  CHECK(cudaMemcpy(&result, out, 4, cudaMemcpyDeviceToHost));
  CHECK(cudaFree(out));
  return result == 4321;
}

bool attributes() {
  cudaFuncAttributes a;
  CHECK(cudaFuncGetAttributes(&a, statically));
  bool right = a.sharedSizeBytes == 4096 && a.maxThreadsPerBlock == 1024;
  CHECK(cudaFuncGetAttributes(&a, write));
  right &= a.sharedSizeBytes == 0 && a.maxThreadsPerBlock == 128 && a.numRegs > 0 && a.numRegs <= 128;
  size_t available;
  int blocks;
  CHECK(cudaOccupancyAvailableDynamicSMemPerBlock(&available, dynamic, 2, 128));
  CHECK(cudaFuncSetAttribute(dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(available)));
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, dynamic, 128, available));
  return right && blocks == 2;
}

bool host_functions() {
  int count = 0;
  cudaStream_t stream;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaLaunchHostFunc(stream, [](void* n) { ++*static_cast<int*>(n); }, &count));
  CHECK(cudaStreamSynchronize(stream));
  CHECK(cudaStreamDestroy(stream));
  return count == 1;
}

bool tensor_maps() {
  void *encode = nullptr, *unknown = &encode;
  cudaDriverEntryPointQueryResult status;
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &status));
  float* x;
  CHECK(cudaMalloc(&x, 4096));
  CUtensorMap map;
  cuuint64_t sizes[] = {32, 32}, strides[] = {128};
  cuuint32_t box[] = {32, 8}, one[] = {1, 1};
  const auto make = [&](void* address) {
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(encode)(
        &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, address, sizes, strides, box, one, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  const bool right =
      status == cudaDriverEntryPointSuccess && make(x) == CUDA_SUCCESS && make(x + 1) == CUDA_ERROR_INVALID_VALUE;
  const cudaError_t refused =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeIm2colWide", &unknown, 12000, cudaEnableDefault, &status);
  CHECK(cudaFree(x));
  return right && refused == cudaErrorNotSupported && !unknown && cudaGetLastError() == cudaErrorNotSupported;
}

bool driver_fills() {
  unsigned char* out;
  unsigned host[4];
  const char* text = nullptr;
  CHECK(cudaMalloc(&out, 16));
  const auto at = reinterpret_cast<CUdeviceptr>(out);
  bool right = !cuMemsetD32Async(at, 0x01020304, 4, nullptr) && !cuMemsetD16Async(at + 4, 0x0506, 2, nullptr) &&
               !cuMemsetD8Async(at + 8, 7, 4, nullptr);
  CHECK(cudaMemcpy(host, out, 16, cudaMemcpyDeviceToHost));
  right &= host[0] == 0x01020304 && host[1] == 0x05060506 && host[2] == 0x07070707 && host[3] == 0x01020304;
  right &= cuMemsetD32Async(at, 0, 5, nullptr) == CUDA_ERROR_INVALID_VALUE &&
           cuMemsetD32Async(at + 2, 0, 1, nullptr) == CUDA_ERROR_INVALID_VALUE;
  cudaGetLastError();
  right &= !cuGetErrorString(CUDA_ERROR_INVALID_VALUE, &text) && !std::strcmp(text, "invalid argument");
  CHECK(cudaFree(out));
  return right;
}

int main() {
  const struct {
    const char* name;
    bool (*run)();
  } features[] = {
      {"reasons", reasons},  // before kernels have got more shared memory
      {"refused launches", refused_launches},
      {"memory", memory},
      {"pitched copies", pitched_copies},
      {"variables", variables},
      {"arguments by value", arguments_by_value},
      {"attributes", attributes},
      {"host functions", host_functions},
      {"tensor maps", tensor_maps},
      {"driver fills", driver_fills},
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
