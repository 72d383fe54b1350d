// What driver.cu loads, as PTX.
__device__ float factor = 2;

extern "C" __global__ void __launch_bounds__(256) scale(float* x, float add, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) x[i] = factor * x[i] + add;
}

extern "C" __global__ void dynamic(int* sum) {
  extern __shared__ int values[];
  values[threadIdx.x * 256] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x) return;
  *sum = 0;
  for (int i = 0; i < blockDim.x; ++i) *sum += values[i * 256];
}
