#pragma once
// Where a GEMM stores, as its kernels are given it.
#include "device/epilogue/vector8.cuh"
#include "params/gemm.h"

namespace forwardpass {

// To the epilogue's output or, with split-K, as partial sums.
struct GemmOutput {
  Epilogue epilogue;
  EpilogueAccess access;
  bool direct;  // the outputs are made in the fragments' layout (fragment.cuh); a residual is aligned there, not gated,
                // and follows the activation
  bool plain;   // there is nothing to multiply by or to add: block scales are in the accumulators already
  int64_t rows, columns;
  void* partial;
  int64_t partial_stride, split_stride;

  explicit GemmOutput(const GemmParams& p)
      : epilogue(p.epilogue),
        access(p.epilogue),
        direct(
            p.choice.splits == 1 && !p.epilogue.zero_point &&
            (size_of(p.epilogue.out_dtype) == 2 || p.epilogue.group_scale) &&
            (!p.epilogue.residual || (access.out && !is_gated(p.epilogue.activation) && !p.epilogue.residual_first)) &&
            (!p.epilogue.ada_gate || p.kind != GemmKind::w8a16)),
        plain(!p.epilogue.a_scale && !p.epilogue.b_scale && !p.epilogue.bias),
        rows(p.a.rows),
        columns(p.columns()),
        partial(p.partial),
        partial_stride(p.partial_stride),
        split_stride(p.a.rows * p.partial_stride) {
    // What an expert has begins anywhere.
    if (p.groups.ends) access.columns = access.columns && columns % kVec == 0;
  }
};

}  // namespace forwardpass
