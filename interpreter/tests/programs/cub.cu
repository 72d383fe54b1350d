// What the toolkit's own library makes of a device: reductions, scans that look back at other blocks, radix sorts.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cub/cub.cuh>
#include <numeric>
#include <vector>

// The result of a device-wide algorithm that takes (temporary storage, its size, in, out, n).
template <class T, class F>
std::vector<T> on_device(const std::vector<T>& host, size_t results, F algorithm) {
  T *in, *out;
  void* storage = nullptr;
  size_t bytes = 0;
  const int n = static_cast<int>(host.size());
  cudaMalloc(&in, n * sizeof(T));
  cudaMalloc(&out, n * sizeof(T));
  cudaMemcpy(in, host.data(), n * sizeof(T), cudaMemcpyHostToDevice);
  algorithm(storage, bytes, in, out, n);
  cudaMalloc(&storage, bytes);
  const cudaError_t error = algorithm(storage, bytes, in, out, n);
  if (error) std::printf("%s\n", cudaGetErrorString(error));
  std::vector<T> result(results);
  cudaMemcpy(result.data(), out, results * sizeof(T), cudaMemcpyDeviceToHost);
  cudaFree(in);
  cudaFree(out);
  cudaFree(storage);
  return result;
}

int main() {
  std::vector<unsigned> x(5000), expected(5000);
  unsigned state = 1;
  for (unsigned& v : x) v = (state = state * 1664525u + 1013904223u) >> 4;
  int failed = 0;
  const auto verdict = [&](const char* name, bool right) {
    std::printf("%s: %s\n", name, right ? "PASS" : "FAIL");
    failed += !right;
  };
  const unsigned sum = std::accumulate(x.begin(), x.end(), 0u);
  verdict("sum", on_device(x, 1, [](auto&&... a) { return cub::DeviceReduce::Sum(a...); })[0] == sum);
  std::partial_sum(x.begin(), x.end(), expected.begin());
  verdict("scan", on_device(x, x.size(), [](auto&&... a) { return cub::DeviceScan::InclusiveSum(a...); }) == expected);
  expected = x;
  std::sort(expected.begin(), expected.end());
  verdict("sort", on_device(x, x.size(), [](auto&&... a) { return cub::DeviceRadixSort::SortKeys(a...); }) == expected);
  std::printf("%s\n", failed ? "FAIL" : "PASS");
  return failed;
}
