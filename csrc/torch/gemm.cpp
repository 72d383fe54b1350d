#include "torch/gemm.h"

namespace forwardpass {
namespace {

bool is_aligned(const Matrix& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * size_of(m.dtype) % 16 == 0;
}

int64_t padded_stride(const Matrix& m) { return round_up(m.columns, 16 / size_of(m.dtype)); }

}  // namespace

KernelChoice select_kernel(Backend backend, const char* name, KernelSelector* selector, const GemmParams& p,
                           int32_t group, const Tensor& like) {
  const int32_t experts = p.groups.ends ? p.groups.experts : 1;
  const GemmShape shape{ceil_div(p.a.rows, experts),
                        p.columns(),
                        p.a.columns,
                        group,
                        p.blocks.b && is_gated(p.epilogue.activation),
                        experts};
  STD_TORCH_CHECK(std::max(p.a.rows, p.b.rows) < (int64_t{1} << 31) && shape.k < (1 << 30),
                  "a GEMM takes fewer than 2^31 rows and 2^30 columns of an operand, not [", p.a.rows, ", ", shape.k,
                  "] and [", p.b.rows, ", ", shape.k, "]: split them");
  const Device device = device_of(backend, like);
  KernelChoice choice{};
  check_cuda(backend, name, selector(&shape, &device, &choice));
  return choice;
}

GemmCall::GemmCall(Backend backend, const GemmParams& p, const Tensor& like, Workspace& workspace)
    : params(p), backend_(backend), like_(like), workspace_(workspace) {
  const int64_t m = p.a.rows, n = p.b.rows;
  if (!is_aligned(p.a)) a_ = workspace.reserve(m * padded_stride(p.a) * size_of(p.a.dtype));
  if (!is_aligned(p.b)) b_ = workspace.reserve(n * padded_stride(p.b) * size_of(p.b.dtype)), params.b_first = false;
  if (params.choice.splits > 1 && !params.choice.cluster_sums) {
    params.partial_stride = round_up(n, 8);
    partial_ = workspace.reserve(params.choice.splits * m * params.partial_stride * 4);
  }
}

void GemmCall::pad(Matrix& m, int64_t offset) {
  if (offset < 0) return;
  const PadRowsParams copy{m, workspace_.at<void>(offset), padded_stride(m)};
  launch(backend_, copy, like_);
  m.data = copy.to, m.stride = copy.to_stride;
}

void GemmCall::place() {
  pad(params.a, a_);
  pad(params.b, b_);
  if (partial_ >= 0) params.partial = workspace_.at<void>(partial_);
}

}  // namespace forwardpass
