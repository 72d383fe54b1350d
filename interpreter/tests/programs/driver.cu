// The driver's API alone: modules from PTX text, launches, memory, streams, events, attributes, occupancy, tensor maps.
// usage: driver module.ptx
#include <cuda.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

int failures = 0;
#define EXPECT(condition)                                           \
  do {                                                              \
    if (!(condition)) {                                             \
      std::printf("line %d: %s is not so\n", __LINE__, #condition); \
      ++failures;                                                   \
    }                                                               \
  } while (0)
#define OK(call) EXPECT((call) == CUDA_SUCCESS)

std::string read(const char* path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

void devices() {
  int version, count, major, minor, can;
  char name[100], id[20];
  size_t bytes;
  CUdevice device;
  CUuuid uuid;
  OK(cuDriverGetVersion(&version));
  EXPECT(version >= 12000);
  OK(cuDeviceGetCount(&count));
  EXPECT(count == 1);
  OK(cuDeviceGet(&device, 0));
  EXPECT(cuDeviceGet(&device, 1) == CUDA_ERROR_INVALID_DEVICE);
  OK(cuDeviceGetName(name, sizeof name, 0));
  EXPECT(std::strstr(name, "interpreted"));
  OK(cuDeviceTotalMem(&bytes, 0));
  EXPECT(bytes >= size_t{40} << 30);
  OK(cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 0));
  OK(cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0));
  EXPECT(major == 8 || major == 9);
  OK(cuDeviceGetPCIBusId(id, sizeof id, 0));
  OK(cuDeviceGetUuid(&uuid, 0));
  OK(cuDeviceCanAccessPeer(&can, 0, 0));
}

void contexts() {
  CUcontext context, current, primary;
  CUdevice device;
  size_t stack;
  OK(cuCtxGetCurrent(&current));
  EXPECT(!current);
  EXPECT(cuCtxPopCurrent(&current) == CUDA_ERROR_INVALID_CONTEXT);
#if CUDA_VERSION >= 13000
  OK(cuCtxCreate(&context, nullptr, 0, 0));
#else
  OK(cuCtxCreate(&context, 0, 0));
#endif
  OK(cuCtxGetCurrent(&current));
  EXPECT(context && current == context);
  OK(cuCtxPopCurrent(&current));
  OK(cuCtxPushCurrent(context));
  OK(cuCtxGetDevice(&device));
  OK(cuCtxGetLimit(&stack, CU_LIMIT_STACK_SIZE));
  OK(cuCtxSynchronize());
  OK(cuDevicePrimaryCtxRetain(&primary, 0));
  OK(cuCtxSetCurrent(primary));
  OK(cuDevicePrimaryCtxRelease(0));
}

void launches(const char* path) {
  const std::string text = read(path);
  char log[1000] = "untouched";
  CUjit_option options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES, CU_JIT_TARGET_FROM_CUCONTEXT};
  void* values[] = {log, reinterpret_cast<void*>(sizeof log), nullptr};
  CUmodule module, from_file;
  CUfunction scale, missing, dynamic;
  OK(cuModuleLoadDataEx(&module, text.c_str(), 3, options, values));
  EXPECT(!*log);
  OK(cuModuleLoad(&from_file, path));
  EXPECT(cuModuleLoad(&from_file, "/nowhere") == CUDA_ERROR_FILE_NOT_FOUND);
  OK(cuModuleGetFunction(&scale, module, "scale"));
  OK(cuModuleGetFunction(&dynamic, module, "dynamic"));
  EXPECT(cuModuleGetFunction(&missing, module, "scales") == CUDA_ERROR_NOT_FOUND);

  constexpr int kCount = 1000;
  std::vector<float> x(kCount), y(kCount);
  for (int i = 0; i < kCount; ++i) x[i] = i - 7;
  CUdeviceptr device, factor, begin;
  size_t bytes;
  OK(cuMemAlloc(&device, kCount * 4));
  EXPECT(cuMemAlloc(&begin, 0) == CUDA_ERROR_INVALID_VALUE);
  OK(cuMemGetAddressRange(&begin, &bytes, device + 44));
  EXPECT(begin == device && bytes == kCount * 4);
  unsigned type;
  OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, device + 8));
  EXPECT(type == CU_MEMORYTYPE_DEVICE);
  EXPECT(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, reinterpret_cast<CUdeviceptr>(&type)) ==
         CUDA_ERROR_INVALID_VALUE);
  OK(cuModuleGetGlobal(&factor, &bytes, module, "factor"));
  EXPECT(bytes == 4);
  EXPECT(cuModuleGetGlobal(&begin, &bytes, module, "scale") == CUDA_ERROR_NOT_FOUND);
  const float three = 3;
  OK(cuMemcpyHtoD(factor, &three, 4));
  OK(cuMemcpyHtoD(device, x.data(), kCount * 4));
  EXPECT(cuMemcpyHtoD(reinterpret_cast<CUdeviceptr>(x.data()), x.data(), 4) == CUDA_ERROR_INVALID_VALUE);

  int count = kCount;
  float add = 0.5;
  void* arguments[] = {&device, &add, &count};
  CUstream stream;
  CUevent start, end;
  float milliseconds = -1;
  OK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  OK(cuEventCreate(&start, CU_EVENT_DEFAULT));
  OK(cuEventCreate(&end, CU_EVENT_DEFAULT));
  OK(cuEventRecord(start, stream));
  OK(cuLaunchKernel(scale, (kCount + 127) / 128, 1, 1, 128, 1, 1, 0, stream, arguments, nullptr));
  OK(cuEventRecord(end, stream));
  OK(cuEventSynchronize(end));
  OK(cuEventElapsedTime(&milliseconds, start, end));
  EXPECT(milliseconds >= 0);
  OK(cuMemcpyDtoHAsync(y.data(), device, kCount * 4, stream));
  OK(cuStreamSynchronize(stream));
  for (int i = 0; i < kCount; ++i) EXPECT(y[i] == 3 * x[i] + 0.5f);

  struct {
    CUdeviceptr x;
    float add;
    int count;
  } packed = {device, 1, kCount};
  size_t size = sizeof packed, offset;
  void* extra[] = {CU_LAUNCH_PARAM_BUFFER_POINTER, &packed, CU_LAUNCH_PARAM_BUFFER_SIZE, &size, CU_LAUNCH_PARAM_END};
  CUlaunchConfig config{};
  config.gridDimX = 8, config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = 128, config.blockDimY = config.blockDimZ = 1;
  config.hStream = stream;
  OK(cuLaunchKernelEx(&config, scale, nullptr, extra));
  OK(cuMemcpyDtoH(x.data(), device, kCount * 4));
  for (int i = 0; i < kCount; ++i) EXPECT(x[i] == 3 * y[i] + 1);
  OK(cuFuncGetParamInfo(scale, 2, &offset, &size));
  EXPECT(offset == 12 && size == 4);
  EXPECT(cuFuncGetParamInfo(scale, 3, &offset, &size) == CUDA_ERROR_INVALID_VALUE);

  EXPECT(cuLaunchKernel(scale, 1, 1, 1, 2000, 1, 1, 0, stream, arguments, nullptr) == CUDA_ERROR_INVALID_VALUE);
  const char* why;
  EXPECT(!cuGetErrorString(CUDA_ERROR_INVALID_VALUE, &why) && std::strstr(why, "blocks of (2000, 1, 1) threads: "));
  constexpr int kDynamic = 80 << 10;
  int value, grid, block, blocks;
  CUdeviceptr sum;
  OK(cuMemAlloc(&sum, 4));
  void* of_dynamic[] = {&sum};
  EXPECT(cuLaunchKernel(dynamic, 1, 1, 1, 64, 1, 1, kDynamic, stream, of_dynamic, nullptr) == CUDA_ERROR_INVALID_VALUE);
  OK(cuFuncSetAttribute(dynamic, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kDynamic));
  OK(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, dynamic));
  EXPECT(value == kDynamic);
  OK(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, dynamic));
  EXPECT(value == 0);
  OK(cuLaunchKernel(dynamic, 1, 1, 1, 64, 1, 1, kDynamic, stream, of_dynamic, nullptr));
  OK(cuMemcpyDtoH(&value, sum, 4));
  EXPECT(value == 64 * 63 / 2);
  OK(cuOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, dynamic, 64, kDynamic));
  EXPECT(blocks >= 1 && blocks <= 2);
  OK(cuOccupancyMaxPotentialBlockSize(&grid, &block, scale, nullptr, 0, 0));
  EXPECT(block == 256 && grid > 0);  // of the launch bounds

  OK(cuMemsetD32(device, 0x40000000, kCount));
  OK(cuMemsetD16Async(device, 0x3f80, 2, stream));
  OK(cuMemcpyDtoH(x.data(), device, kCount * 4));
  EXPECT(std::fabs(x[0] - 1) < 0.01f && x[1] == 2 && x[kCount - 1] == 2);
  CUDA_MEMCPY2D copy{};
  copy.srcMemoryType = CU_MEMORYTYPE_DEVICE, copy.dstMemoryType = CU_MEMORYTYPE_HOST;
  copy.srcDevice = device, copy.srcPitch = 400, copy.srcXInBytes = 4, copy.srcY = 1;
  copy.dstHost = y.data(), copy.dstPitch = 8, copy.WidthInBytes = 8, copy.Height = 2;
  OK(cuMemcpyHtoD(device + 404, std::vector<float>{5, 6}.data(), 8));
  OK(cuMemcpy2D(&copy));
  EXPECT(y[0] == 5 && y[1] == 6 && y[2] == 2 && y[3] == 2);

  alignas(64) CUtensorMap map;
  const cuuint64_t sizes[] = {16, 4}, strides[] = {64};
  const cuuint32_t box[] = {16, 4}, ones[] = {1, 1};
  const auto encode = [&](CUtensorMapInterleave interleave) {
    return cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, reinterpret_cast<void*>(device), sizes,
                                  strides, box, ones, interleave, CU_TENSOR_MAP_SWIZZLE_NONE,
                                  CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  OK(encode(CU_TENSOR_MAP_INTERLEAVE_NONE));
  EXPECT(encode(CU_TENSOR_MAP_INTERLEAVE_16B) == CUDA_ERROR_NOT_SUPPORTED);

  OK(cuEventDestroy(start));
  OK(cuEventDestroy(end));
  OK(cuStreamDestroy(stream));
  OK(cuMemFree(device));
  EXPECT(cuMemFree(device) == CUDA_ERROR_INVALID_VALUE);
  OK(cuMemFree(sum));
  OK(cuModuleUnload(module));
}

void errors() {
  const char* text;
  OK(cuGetErrorName(CUDA_ERROR_NO_BINARY_FOR_GPU, &text));
  EXPECT(!std::strcmp(text, "CUDA_ERROR_NO_BINARY_FOR_GPU"));
  EXPECT(cuGetErrorName(static_cast<CUresult>(12345), &text) == CUDA_ERROR_INVALID_VALUE && !text);
  OK(cuGetErrorString(CUDA_ERROR_OUT_OF_MEMORY, &text));
  EXPECT(!std::strcmp(text, "out of memory"));
  EXPECT(cudaGetLastError() == cudaSuccess);  // not the driver's business

  CUresult (*alloc)(CUdeviceptr*, size_t) = nullptr;
  CUdriverProcAddressQueryResult status;
  OK(cuGetProcAddress("cuMemAlloc", reinterpret_cast<void**>(&alloc), CUDA_VERSION, CU_GET_PROC_ADDRESS_DEFAULT,
                      &status));
  EXPECT(alloc == cuMemAlloc && status == CU_GET_PROC_ADDRESS_SUCCESS);
  OK(cuGetProcAddress("cuTensorMapEncodeTiled", reinterpret_cast<void**>(&alloc), CUDA_VERSION, 0, nullptr));
}

// What ends in an error, by name, with a sentence on stderr.
int broken(const char* what) {
  CUmodule module;
  const char *name, *reason;
  const std::string cubin = std::string("\177ELF") + std::string(60, '\0');
  CUresult error = CUDA_SUCCESS;
  if (!std::strcmp(what, "cubin")) error = cuModuleLoadData(&module, cubin.c_str());
  if (!std::strcmp(what, "newer"))
    error = cuModuleLoadData(&module, ".version 8.7\n.target sm_100a\n.address_size 64\n");
  if (!std::strcmp(what, "syntax"))
    error = cuModuleLoadData(&module, ".version 8.7\n.target sm_80\n.address_size 64\nx\n");
  if (!std::strcmp(what, "nothing")) error = cuModuleLoadData(&module, "hello world");
  if (!std::strcmp(what, "unknown")) {
    void* function;
    error = cuGetProcAddress("cuCoffee", &function, CUDA_VERSION, 0, nullptr);
  }
  cuGetErrorName(error, &name);
  cuGetErrorString(error, &reason);
  std::printf("%s: %s\n", name, reason);
  return 0;
}

int main(int argc, char** argv) {
  OK(cuInit(0));
  if (argc > 2) return broken(argv[2]);
  devices();
  contexts();
  launches(argv[1]);
  errors();
  std::printf("%s\n", failures ? "FAIL" : "PASS");
  return failures != 0;
}
