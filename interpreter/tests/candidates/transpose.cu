// Transposed matrices: the functions right_... are right, wrong_... are what verify has to refuse.
namespace {

constexpr int kTile = 32;

__global__ void element(const float* x, float* y, int rows, int cols) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x, r = blockIdx.y;
  if (c < cols) y[c * rows + r] = x[r * cols + c];
}

template <int kPadding, bool kFirstBarrier, bool kBounds>
__global__ void tiled(const float* x, float* y, int rows, int cols) {
  __shared__ float tile[kTile][kTile + kPadding];
  const int c = blockIdx.x * kTile + threadIdx.x, r = blockIdx.y * kTile + threadIdx.y;
  if (!kBounds || (r < rows && c < cols)) tile[threadIdx.y][threadIdx.x] = x[r * cols + c];
  if (kFirstBarrier) __syncthreads();
  const int to_c = blockIdx.y * kTile + threadIdx.x, to_r = blockIdx.x * kTile + threadIdx.y;
  if (to_r < cols && to_c < rows) y[to_r * rows + to_c] = tile[threadIdx.x][threadIdx.y];
}

// One block for all tiles.
template <bool kSecondBarrier>
__global__ void one_block(const float* x, float* y, int rows, int cols) {
  __shared__ float tile[kTile][kTile + 1];
  for (int r0 = 0; r0 < rows; r0 += kTile)
    for (int c0 = 0; c0 < cols; c0 += kTile) {
      const int r = r0 + threadIdx.y, c = c0 + threadIdx.x;
      if (r < rows && c < cols) tile[threadIdx.y][threadIdx.x] = x[r * cols + c];
      __syncthreads();
      if (c0 + threadIdx.y < cols && r0 + threadIdx.x < rows)
        y[(c0 + threadIdx.y) * rows + r0 + threadIdx.x] = tile[threadIdx.x][threadIdx.y];
      if (kSecondBarrier) __syncthreads();
    }
}

dim3 tiles(int rows, int cols) { return dim3((cols + kTile - 1) / kTile, (rows + kTile - 1) / kTile); }
const dim3 threads(kTile, kTile);

}  // namespace

extern "C" {

void right_element(const float* x, float* y, int rows, int cols) {
  element<<<dim3((cols + 63) / 64, rows), 64>>>(x, y, rows, cols);
}
void right_tiled(const float* x, float* y, int rows, int cols) {
  tiled<1, true, true><<<tiles(rows, cols), threads>>>(x, y, rows, cols);
}
void right_bank_conflicts(const float* x, float* y, int rows, int cols) {
  tiled<0, true, true><<<tiles(rows, cols), threads>>>(x, y, rows, cols);
}
void right_one_block(const float* x, float* y, int rows, int cols) {
  one_block<true><<<1, threads>>>(x, y, rows, cols);
}
void wrong_no_barrier(const float* x, float* y, int rows, int cols) {
  tiled<1, false, true><<<tiles(rows, cols), threads>>>(x, y, rows, cols);
}
void wrong_no_bounds(const float* x, float* y, int rows, int cols) {
  tiled<1, true, false><<<tiles(rows, cols), threads>>>(x, y, rows, cols);
}
void wrong_second_barrier(const float* x, float* y, int rows, int cols) {
  one_block<false><<<1, threads>>>(x, y, rows, cols);
}
void wrong_whole_tiles(const float* x, float* y, int rows, int cols) {
  const dim3 grid(cols < kTile ? 1 : cols / kTile, rows < kTile ? 1 : rows / kTile);
  tiled<1, true, true><<<grid, threads>>>(x, y, rows, cols);
}
void wrong_copy(const float* x, float* y, int rows, int cols) {
  element<<<dim3((rows * cols + 63) / 64, 1), 64>>>(x, y, 1, rows * cols);
}
void wrong_grid(const float* x, float* y, int rows, int cols) {
  tiled<1, true, true><<<tiles(cols, rows), threads>>>(x, y, rows, cols);
}
}
