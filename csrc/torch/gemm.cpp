#include "torch/gemm.h"

namespace forwardpass {
namespace {

bool is_aligned(const Matrix& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * size_of(m.dtype) % 16 == 0;
}

int64_t padded_stride(const Matrix& m) { return round_up(m.columns, 16 / size_of(m.dtype)); }

}  // namespace

GemmCall::GemmCall(Backend backend, const GemmParams& p, const Tensor& like, Workspace& workspace)
    : params(p), backend_(backend), like_(like), workspace_(workspace) {
  const int64_t m = p.a.rows, n = p.b.rows;
  STD_TORCH_CHECK(std::max(m, n) < (int64_t{1} << 31) && p.a.columns < (1 << 30),
                  "a GEMM takes fewer than 2^31 rows and 2^30 columns of an operand, not [", m, ", ", p.a.columns,
                  "] and [", n, ", ", p.a.columns, "]: split them");
  if (!params.plan.tile_m) params.plan = plan_gemm(m, n, p.a.columns, p.a.dtype, device_of(backend, like));
  if (!is_aligned(p.a)) a_ = workspace.reserve(m * padded_stride(p.a) * size_of(p.a.dtype));
  if (!is_aligned(p.b)) b_ = workspace.reserve(n * padded_stride(p.b) * size_of(p.b.dtype));
  if (params.plan.splits > 1) {
    params.partial_stride = round_up(n, 8);
    partial_ = workspace.reserve(params.plan.splits * m * params.partial_stride * 4);
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
