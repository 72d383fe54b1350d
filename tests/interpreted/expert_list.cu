// The list of experts that a block of a grouped GEMM makes (schedule/expert_list.cuh), written down: what every
// `step`th row of tiles is of, and what every `step`th row is. One block.
#include "schedule/expert_list.cuh"

using namespace forwardpass;

// tiles [.., 3]: expert, first row, the row behind the expert's last. kinds: 0 an expert's, 1 no one's, 2 it is
// unknown whose.
extern "C" __global__ void write_list(const int* ends, int experts, int sorted, int room, int rows, int tile_bits,
                                      uint32_t share_bits, int step, int* count, int* tiles, uint8_t* kinds) {
  __shared__ ExpertStorage<512> storage;
  const Groups groups{ends, experts, sorted != 0, room};
  const ExpertList list(groups, tile_bits, share_bits, storage);
  if (threadIdx.x < 32) list.make(rows);
  __syncthreads();
  if (threadIdx.x == 0) *count = list.tile_rows();
  for (int i = threadIdx.x; i * step < list.tile_rows(); i += blockDim.x) {
    const int expert = list.expert_of(i * step);
    tiles[i * 3] = expert;
    tiles[i * 3 + 1] = list.rows_begin(expert) + ((i * step - list.tile_begin(expert)) << tile_bits << share_bits);
    tiles[i * 3 + 2] = list.rows_end(expert);
  }
  for (int i = threadIdx.x; i * step < rows; i += blockDim.x)
    kinds[i] = i * step < list.first_unowned() || !list.unowned(i * step) ? 0 : list.unknown(i * step) ? 2 : 1;
}
