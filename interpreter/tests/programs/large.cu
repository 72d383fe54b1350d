// Tensors of 32 GB: what nobody writes costs nothing.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

constexpr size_t kElements = size_t{1} << 33;
constexpr int kTouched = 1000;
constexpr size_t kStep = kElements / kTouched;

__global__ void touch(int* x, int n) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k < n) x[k * kStep] += k;
}

// 1024 rows of 2^23 columns. As an int, the offset wraps from row 256 on.
template <typename Index>
__global__ void touch_rows(float* x, Index columns) {
  const Index row = blockIdx.x * blockDim.x + threadIdx.x;
  x[row * columns] += 1;  // HAZARD
}

bool passed = true;
void check(bool good, const char* what) {
  std::printf("%s: %s\n", what, good ? "PASS" : "FAIL");
  passed &= good;
}

// The most that the process has had, in kB. getrusage has that of the process it was forked from too.
long most_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.rfind("VmHWM:", 0) == 0) return std::stol(line.substr(6));
  return -1;
}

// Whether element k * kStep is `first + k`, and its neighbours are what they were.
bool touched(const int* device, int first, int neighbour) {
  bool good = true;
  for (int k = 0; k < kTouched; k += 37) {
    int three[3];
    const size_t begin = k * kStep - (k > 0);
    good &= cudaMemcpy(three, device + begin, sizeof(three), cudaMemcpyDeviceToHost) == cudaSuccess;
    good &= three[k > 0] == first + k && three[2] == neighbour;
  }
  return good;
}

int touch_all_rows(bool wide) {
  float* x;
  if (cudaMalloc(&x, kElements * 4) != cudaSuccess || cudaMemset(x, 0, kElements * 4) != cudaSuccess) return 1;
  if (wide) {
    touch_rows<int64_t><<<8, 128>>>(x, kElements / 1024);
  } else {
    touch_rows<int><<<8, 128>>>(x, kElements / 1024);
  }
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf("%ld MB\n", most_memory() / 1024);
  return error == cudaSuccess ? 0 : 1;
}

int main(int argc, char** argv) {
  if (argc > 1) return touch_all_rows(!std::strcmp(argv[1], "wide"));
  int *a, *b, *c;
  if (cudaMalloc(&a, kElements * 4) != cudaSuccess || cudaMalloc(&b, kElements * 4) != cudaSuccess) {
    std::printf("no memory for two of 32 GB\n");
    return 1;
  }
  check(cudaMalloc(&c, kElements * 4) == cudaErrorMemoryAllocation, "no third in 80 GB");
  touch<<<4, 256>>>(a, kTouched);
  check(cudaDeviceSynchronize() == cudaSuccess && touched(a, -1, -1), "poison where nothing was written");
  check(cudaMemset(b, 0, kElements * 4) == cudaSuccess, "zeros");
  touch<<<4, 256>>>(b, kTouched);
  check(cudaDeviceSynchronize() == cudaSuccess && touched(b, 0, 0), "zeros where nothing was written");
  check(cudaMemset(reinterpret_cast<char*>(b) + 5, 0xff, kElements * 4 - 9) == cudaSuccess, "poison again");
  int ends[2];
  cudaMemcpy(ends, b, 8, cudaMemcpyDeviceToHost);
  check(ends[0] == 0 && ends[1] == static_cast<int>(0xffffff00), "from a byte on");
  cudaMemcpy(ends, b + kElements - 2, 8, cudaMemcpyDeviceToHost);
  check(ends[0] == -1 && ends[1] == 0, "up to a byte");
  check(cudaFree(a) == cudaSuccess && cudaMalloc(&c, kElements * 4) == cudaSuccess, "memory that was freed");
  int one = 0;
  cudaMemcpy(&one, c + kStep, 4, cudaMemcpyDeviceToHost);
  check(one == -1 && cudaMemcpy(c + kElements - 1, c + 1, 8, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue,
        "is poison, and has an end");
  cudaFree(b);
  cudaFree(c);
  const long most = most_memory();
  std::printf("%ld MB\n", most / 1024);
  check(most > 0 && most < 200 * 1024, "less than 200 MB");
  std::printf("%s\n", passed ? "PASS" : "FAIL");
  return passed ? 0 : 1;
}
