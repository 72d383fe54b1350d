// CUTLASS's cluster machinery, which knows nothing of the interpreter, as its GEMMs for Hopper use it: a producer
// warpgroup loads tiles by TMA, each CTA of the cluster its share for all of them, through a ring of two stages; a
// consumer warpgroup copies them out and frees the stage in every CTA. CUTLASS's own are the tensor maps and their
// slices, the multicast, the mbarriers with arrivals at other CTAs, the barriers of the cluster and setmaxnreg.
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>

#include <cstdio>
#include <cstdlib>
#include <cute/tensor.hpp>
#include <cutlass/cluster_launch.hpp>
#include <cutlass/pipeline/sm90_pipeline.hpp>
#include <vector>

using namespace cute;

constexpr int kCtas = 2, kStages = 2, kRows = 64, kColumns = 32, kTiles = 5, kGroup = 128;
using ClusterShape = Shape<Int<kCtas>, _1, _1>;
using Pipeline = cutlass::PipelineTmaAsync<kStages>;
using Stage = Layout<Shape<Int<kRows>, Int<kColumns>>, Stride<Int<kColumns>, _1>>;
using Stages = Layout<Shape<Int<kRows>, Int<kColumns>, Int<kStages>>, Stride<Int<kColumns>, _1, Int<kRows * kColumns>>>;

struct SharedStorage {
  alignas(128) int tiles[cosize_v<Stages>];
  Pipeline::SharedStorage pipeline;
};

// out [CTA, tile, row, column] = in [row, tile, column] + CTA
template <class Tma>
__global__ __launch_bounds__(2 * kGroup) void copy(const __grid_constant__ Tma tma, int* out) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(128) char memory[];
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(memory);
  const int group = threadIdx.x / kGroup, thread = threadIdx.x % kGroup;
  const uint32_t rank = cute::block_rank_in_cluster();
  Pipeline::Params params;
  params.transaction_bytes = kRows * kColumns * sizeof(int);
  params.role = group == 0 ? Pipeline::ThreadCategory::Producer : Pipeline::ThreadCategory::Consumer;
  params.is_leader = thread == 0;
  params.num_consumers = kGroup;
  Pipeline pipeline(shared.pipeline, params, ClusterShape{});
  cute::cluster_arrive_relaxed();
  Tensor in = tma.get_tma_tensor(make_shape(Int<kRows>{}, Int<kTiles * kColumns>{}));
  Tensor tiles = local_tile(in, make_shape(Int<kRows>{}, Int<kColumns>{}), make_coord(_0{}, _));  // (row, column, tile)
  Tensor staged = make_tensor(make_smem_ptr(shared.tiles), Stages{});
  auto slice = tma.get_slice(rank);
  Tensor from = group_modes<1, 3>(slice.partition_S(tiles));  // (TMA, (its loads), tile)
  Tensor to = group_modes<1, 3>(slice.partition_D(staged));
  cute::cluster_wait();

  if (group == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (thread == 0) {
      auto state = cutlass::make_producer_start_state<Pipeline>();
      for (int t = 0; t < kTiles; ++t, ++state) {
        pipeline.producer_acquire(state);
        const uint16_t all = (1 << kCtas) - 1;
        cute::copy(tma.with(*pipeline.producer_get_barrier(state), all), from(_, _, t), to(_, _, state.index()));
      }
      pipeline.producer_tail(state);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<216>();
    cutlass::PipelineState<kStages> state;
    for (int t = 0; t < kTiles; ++t, ++state) {
      pipeline.consumer_wait(state);
      for (int i = thread; i < kRows * kColumns; i += kGroup)
        out[(rank * kTiles + t) * kRows * kColumns + i] = staged(i / kColumns, i % kColumns, state.index()) + rank;
      cutlass::arch::NamedBarrier::sync(kGroup, 1);  // one thread releases what all have read
      pipeline.consumer_release(state);
    }
  }
  cute::cluster_sync();
#endif
}

int main() {
  const int n = kRows * kTiles * kColumns;
  std::vector<int> in(n), out(kCtas * n, -1);
  for (int i = 0; i < n; ++i) in[i] = 7 * i;
  int *device_in, *device_out;
  cudaMalloc(&device_in, n * sizeof(int));
  cudaMalloc(&device_out, kCtas * n * sizeof(int));
  cudaMemcpy(device_in, in.data(), n * sizeof(int), cudaMemcpyHostToDevice);
  Tensor whole = make_tensor(make_gmem_ptr(device_in), make_shape(Int<kRows>{}, Int<kTiles * kColumns>{}),
                             make_stride(Int<kTiles * kColumns>{}, _1{}));
  auto tma =
      make_tma_copy(SM90_TMA_LOAD_MULTICAST{}, whole, Stage{}, make_shape(Int<kRows>{}, Int<kColumns>{}), Int<kCtas>{});
  const void* kernel = reinterpret_cast<const void*>(&copy<decltype(tma)>);
  cutlass::ClusterLaunchParams launch{{kCtas, 1, 1}, {2 * kGroup, 1, 1}, {kCtas, 1, 1}, sizeof(SharedStorage)};
  if (cutlass::launch_kernel_on_cluster(launch, kernel, tma, device_out) != cutlass::Status::kSuccess) return 1;
  if (cudaDeviceSynchronize() != cudaSuccess) return 2;
  cudaMemcpy(out.data(), device_out, kCtas * n * sizeof(int), cudaMemcpyDeviceToHost);
  int wrong = 0;
  for (int c = 0; c < kCtas; ++c)
    for (int t = 0; t < kTiles; ++t)
      for (int r = 0; r < kRows; ++r)
        for (int k = 0; k < kColumns; ++k)
          wrong += out[((c * kTiles + t) * kRows + r) * kColumns + k] != in[(r * kTiles + t) * kColumns + k] + c;
  std::printf("%d wrong\n", wrong);
  return wrong != 0;
}
