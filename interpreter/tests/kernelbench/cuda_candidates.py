"""Answers to softmax_problem.py, linear_problem.py and convolution_problem.py in CUDA, right ones and wrong ones."""

import torch
import torch.nn as nn
from torch.utils.cpp_extension import load_inline

CPP = """
torch::Tensor softmax(torch::Tensor x, bool race, int64_t past);
torch::Tensor torch_softmax(torch::Tensor x);
torch::Tensor zeros(torch::Tensor x);
torch::Tensor linear(torch::Tensor x, torch::Tensor w, torch::Tensor b, double slope, bool stale);
torch::Tensor scale_clamp(torch::Tensor x, torch::Tensor scale);
"""
CUDA = """
__device__ float block_reduce(float value, float* part, bool maximum, bool race) {
  part[threadIdx.x] = value;
  __syncthreads();
  for (int half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half) {
      float other = part[threadIdx.x + half];
      part[threadIdx.x] = maximum ? fmaxf(part[threadIdx.x], other) : part[threadIdx.x] + other;
    }
    if (!race) __syncthreads();
  }
  float result = part[0];
  __syncthreads();
  return result;
}

__global__ void softmax_kernel(const float* x, float* y, int columns, bool race, int past) {
  __shared__ float part[128];
  x += size_t(blockIdx.x) * columns;
  y += size_t(blockIdx.x) * columns;
  float largest = -INFINITY, sum = 0;
  bool nan = false;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) {
    largest = fmaxf(largest, x[i]);
    nan |= isnan(x[i]);
  }
  largest = block_reduce(largest, part, true, race);
  if (__syncthreads_or(nan)) largest = NAN;
  for (int i = threadIdx.x; i < columns; i += blockDim.x) sum += expf(x[i] - largest);
  sum = block_reduce(sum, part, false, race);
  for (int i = threadIdx.x; i < columns; i += blockDim.x) y[i] = expf(x[i] - largest) / sum;
  if (threadIdx.x < past) y[columns + threadIdx.x] = 0;
}

torch::Tensor softmax(torch::Tensor x, bool race, int64_t past) {
  TORCH_CHECK(x.is_cuda() && x.is_contiguous() && x.scalar_type() == torch::kFloat, "x is no contiguous float tensor");
  auto y = torch::empty_like(x);
  softmax_kernel<<<x.size(0), 128>>>(x.data_ptr<float>(), y.data_ptr<float>(), x.size(1), race, past);
  return y;
}

torch::Tensor torch_softmax(torch::Tensor x) {
  softmax(x, false, 0);
  return torch::softmax(x, 1);
}

torch::Tensor zeros(torch::Tensor x) {
  softmax(x, false, 0);
  return torch::zeros_like(x);
}

__global__ void linear_kernel(const float* x, const float* w, const float* b, float* y, int m, int n, int k, float slope,
                              bool stale) {
  __shared__ float xs[16][17], ws[16][17];
  int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x, other = blockIdx.x * 16 + threadIdx.y;
  float sum = 0;
  for (int begin = 0; begin < k; begin += 16) {
    int i = begin + threadIdx.x;
    xs[threadIdx.y][threadIdx.x] = row < m && i < k ? x[size_t(row) * k + i] : 0;
    ws[threadIdx.y][threadIdx.x] = other < n && i < k ? w[size_t(other) * k + i] : 0;
    __syncthreads();
    for (int j = 0; j < 16; j++) sum += xs[threadIdx.y][j] * ws[threadIdx.x][j];
    if (!stale) __syncthreads();
  }
  if (row >= m || column >= n) return;
  sum += b[column];
  y[size_t(row) * n + column] = sum < 0 ? sum * slope : sum;
}

torch::Tensor linear(torch::Tensor x, torch::Tensor w, torch::Tensor b, double slope, bool stale) {
  int m = x.size(0), n = w.size(0), k = x.size(1);
  auto y = torch::empty({m, n}, x.options());
  linear_kernel<<<dim3((n + 15) / 16, (m + 15) / 16), dim3(16, 16)>>>(
      x.data_ptr<float>(), w.data_ptr<float>(), b.data_ptr<float>(), y.data_ptr<float>(), m, n, k, slope, stale);
  return y;
}

__global__ void scale_clamp_kernel(const float* x, const float* scale, float* y, int64_t size, int channels, int inner) {
  int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  if (i >= size) return;
  float value = x[i] * scale[i / inner % channels];
  y[i] = isnan(value) ? value : fminf(fmaxf(value, -1.0f), 1.0f);
}

torch::Tensor scale_clamp(torch::Tensor x, torch::Tensor scale) {
  auto y = torch::empty_like(x);
  scale_clamp_kernel<<<(x.numel() + 255) / 256, 256>>>(x.data_ptr<float>(), scale.data_ptr<float>(), y.data_ptr<float>(),
                                                       x.numel(), x.size(1), x.size(2) * x.size(3));
  return y;
}
"""
operators = load_inline(
    name="kernelbench_candidates",
    cpp_sources=CPP,
    cuda_sources=CUDA,
    functions=["softmax", "torch_softmax", "zeros", "linear", "scale_clamp"],
)


class RightSoftmax(nn.Module):
    def forward(self, x):
        return operators.softmax(x, False, 0)


class WrongRace(nn.Module):
    def forward(self, x):
        return operators.softmax(x, True, 0)


class WrongOverrun(nn.Module):
    def forward(self, x):
        return operators.softmax(x, False, 1)


class WrongReference(nn.Module):
    """torch's softmax is called in C++."""

    def forward(self, x):
        return operators.torch_softmax(x)


class WrongZeros(nn.Module):
    def forward(self, x):
        return operators.zeros(x)


class WrongRemembered(nn.Module):
    """The result of the first call that had its input at this address."""

    def __init__(self):
        super().__init__()
        self.results = {}

    def forward(self, x):
        y = operators.softmax(x, False, 0)
        return self.results.setdefault((x.data_ptr(), x.shape), y).clone()


class RightLinear(nn.Module):
    stale = False

    def __init__(self, in_features, out_features, negative_slope):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.slope = negative_slope

    def forward(self, x):
        return operators.linear(x, self.linear.weight, self.linear.bias, self.slope, self.stale)


class WrongStale(RightLinear):
    """The second barrier of the loop is missing."""

    stale = True


class RightConvolution(nn.Module):
    """torch convolves, which has to be allowed."""

    def __init__(self, in_channels, out_channels, kernel_size, groups, scale_shape):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups)
        self.scale = nn.Parameter(torch.randn(scale_shape))

    def forward(self, x):
        return operators.scale_clamp(self.conv(x), self.scale)
