#pragma once
// Torch side of the GEMMs on the GPU: selects the kernel, allocates one workspace for what passes between kernels,
// launches.
#include "params/gemm.h"
#include "params/pad_rows.h"
#include "params/quantize.h"
#include "torch/quantized_rows.h"

namespace forwardpass {

// One allocation for all buffers of a call. Buffers are reserved first, and have addresses after allocate().
class Workspace {
 public:
  int64_t reserve(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += round_up(bytes, 256);
    return offset;
  }
  void allocate(const Tensor& like) {
    if (bytes_) memory_ = contiguous_rows({bytes_}, ScalarType::Char, like);
  }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_->mutable_data_ptr()) + offset);
  }

 private:
  int64_t bytes_ = 0;
  OptionalTensor memory_;
};

KernelChoice select_kernel(Backend backend, const char* name, KernelSelector* selector, const GemmParams& p,
                           int32_t group, const Tensor& like);
// Selects the kernel of the GEMM that Params names; group as in GemmShape.
template <class Params>
KernelChoice select_kernel(Backend backend, const GemmParams& p, const Tensor& like, int32_t group = 0) {
  static LibraryFunction<KernelSelector> selector(Params::kSelector);
  return select_kernel(backend, Params::kSelector, selector.of(backend), p, group, like);
}

// A GEMM whose kernel is selected, and what that needs in the workspace: aligned copies of unaligned operands, and
// partial sums.
class GemmCall {
 public:
  GemmCall(Backend backend, const GemmParams& p, const Tensor& like, Workspace& workspace);
  // After workspace.allocate(): calls the launcher that Params names.
  template <class Params>
  void run() {
    place();
    launch(backend_, Params{params}, like_);
  }

  GemmParams params;

 private:
  void place();
  void pad(Matrix& m, int64_t offset);

  Backend backend_;
  const Tensor& like_;
  Workspace& workspace_;
  int64_t a_ = -1, b_ = -1, partial_ = -1;  // offsets of the copies and of the partial sums; -1: none
};

// A GEMM of the operands in p. Selects the kernel, unless p.choice has one.
template <class Params>
void run_gemm(Backend backend, GemmParams p, const Tensor& like) {
  if (p.a.rows == 0 || p.b.rows == 0) return;
  if (!p.choice.kernel) p.choice = select_kernel<Params>(backend, p, like);
  Workspace workspace;
  GemmCall call(backend, p, like, workspace);
  workspace.allocate(like);
  call.run<Params>();
}

// A Linear: quantises x into the workspace, as q.out says, and multiplies it by the weight, which is p.b. Fills in p.a
// and its scales.
template <class Params>
void quantize_and_multiply(Backend backend, QuantizeParams q, GemmParams p, const Tensor& x) {
  if (q.x.rows == 0 || p.b.rows == 0) return;
  Workspace workspace;
  const int64_t rows = q.x.rows, groups = ceil_div(q.out.columns, q.out.group);
  q.out.q_stride = round_up(q.out.columns, 16);
  q.out.scale_stride = round_up(rows, 4);
  const bool dynamic = !q.out.static_scale;
  const int64_t q_offset = workspace.reserve(rows * q.out.q_stride),
                scale_offset = dynamic ? workspace.reserve(groups * q.out.scale_stride * 4) : 0,
                zero_point_offset = dynamic && !q.out.symmetric ? workspace.reserve(rows * 4) : 0;
  p.a = {nullptr, q.out.dtype, rows, q.out.columns, q.out.q_stride};
  p.choice = select_kernel<Params>(backend, p, x);
  p.b_first = true;  // the quantisation begins when all that came before it has ended
  GemmCall gemm(backend, p, x, workspace);
  workspace.allocate(x);
  q.out.q = workspace.at<void>(q_offset);
  if (dynamic) q.out.scale = workspace.at<float>(scale_offset);
  if (dynamic && !q.out.symmetric) q.out.zero_point = workspace.at<int32_t>(zero_point_offset);

  gemm.params.a.data = q.out.q;
  if (gemm.params.blocks.b) {
    gemm.params.blocks.a = q.out.scale;
    gemm.params.blocks.a_stride = q.out.scale_stride;
  } else {
    undo_quantization(gemm.params.epilogue, q.out);
  }
  launch(backend, q, x, quantize_cpu);
  gemm.run<Params>();
}

}  // namespace forwardpass
