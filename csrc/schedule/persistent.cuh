#pragma once
// The iteration of persistent kernels: which tiles a worker, a block or a cluster of them, computes one after the
// other.
namespace forwardpass {

// f(index of a tile) for each tile of this worker. In every round each worker takes one. Alternating: every second
// round goes through the workers backwards, so that each gets long tiles and short ones where they are sorted.
template <class Index, class F>
__device__ inline void for_each_tile(Index tiles, unsigned worker, unsigned workers, bool alternating, F f) {
  for (unsigned round = 0;; ++round) {
    const bool backwards = alternating && round % 2;
    const Index index = Index{round} * workers + (backwards ? workers - 1 - worker : worker);
    if (index >= tiles) return;
    f(index);
  }
}

}  // namespace forwardpass
