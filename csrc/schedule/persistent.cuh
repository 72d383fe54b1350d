#pragma once
// The iteration of persistent kernels: which tiles a worker, a block or a cluster of them, computes one after the
// other.
namespace forwardpass {

// f(index of a tile) for each tile of this worker. In every round each worker takes one.
template <class Index, class F>
__device__ inline void for_each_tile(Index tiles, unsigned worker, unsigned workers, F f) {
  for (Index index = worker; index < tiles; index += workers) f(index);
}

}  // namespace forwardpass
