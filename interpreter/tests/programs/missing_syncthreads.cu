// Right on the day it was written, by luck: between the store and the load of another warp there is no barrier.
#include <cuda_runtime.h>

#include <cstdio>

__global__ void reverse(int* x) {
  __shared__ int tile[128];
  tile[threadIdx.x] = x[threadIdx.x];        // HAZARD
  x[threadIdx.x] = tile[127 - threadIdx.x];  // HAZARD
}

int main() {
  int host[128], *device;
  for (int i = 0; i < 128; ++i) host[i] = i;
  cudaMalloc(&device, sizeof(host));
  cudaMemcpy(device, host, sizeof(host), cudaMemcpyHostToDevice);
  reverse<<<1, 128>>>(device);
  cudaMemcpy(host, device, sizeof(host), cudaMemcpyDeviceToHost);
  std::printf("%d\n", host[0]);
  cudaFree(device);
  return 0;
}
