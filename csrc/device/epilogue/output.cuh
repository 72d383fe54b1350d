#pragma once
// Where a GEMM stores, as its kernels are given it.
#include "device/epilogue/vector8.cuh"
#include "params/gemm.h"

namespace forwardpass {

// To the epilogue's output or, with split-K, as partial sums.
struct GemmOutput {
  Epilogue epilogue;
  EpilogueAccess access;
  bool direct;  // the outputs are made in the fragments' layout (fragment.cuh); a residual is aligned there, not gated
  bool plain;   // there is nothing to multiply by or to add: block scales are in the accumulators already
  int64_t rows, columns;
  void* partial;
  int64_t partial_stride, split_stride;

  // residual_first: whether the kernel makes such outputs in the fragments' layout
  explicit GemmOutput(const GemmParams& p, bool residual_first)
      : epilogue(p.epilogue),
        access(p.epilogue),
        direct(p.choice.splits == 1 && !p.epilogue.zero_point && is_of_fragments(p, residual_first)),
        plain(!p.epilogue.a_scale && !p.epilogue.b_scale && !p.epilogue.bias),
        rows(p.a.rows),
        columns(p.columns()),
        partial(p.partial),
        partial_stride(p.partial_stride),
        split_stride(p.a.rows * p.partial_stride) {
    // What an expert has begins anywhere.
    if (p.groups.ends) access.columns = access.columns && columns % kVec == 0;
  }

 private:
  // Of 16 bits, quantised in groups or, of one product of integers, in steps of an out_scale.
  bool is_of_fragments(const GemmParams& p, bool residual_first) const {
    const Epilogue& e = p.epilogue;
    const bool gated = is_gated(e.activation), integers = p.kind == GemmKind::int8 || p.kind == GemmKind::int8_conv2d;
    if (e.residual && (!access.out || gated || (e.residual_first && !residual_first))) return false;
    if (e.ada_gate && p.kind == GemmKind::w8a16) return false;
    return size_of(e.out_dtype) == 2 || e.group_scale ||
           (integers && !p.groups.ends && e.out_dtype == Dtype::i8 && !gated);
  }
};

}  // namespace forwardpass
