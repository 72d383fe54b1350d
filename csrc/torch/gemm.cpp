#include "torch/gemm.h"

#include "torch/epilogue.h"

namespace forwardpass {
namespace {

bool is_aligned(const Matrix& m) {
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * size_of(m.dtype) % 16 == 0;
}

int64_t padded_stride(const Matrix& m) { return round_up(m.columns, 16 / size_of(m.dtype)); }

}  // namespace

KernelChoice select_kernel(Backend backend, const GemmParams& p, const Tensor& like, int32_t group) {
  static LibraryFunction<KernelSelector> selector(GemmParams::kSelector);
  const int32_t experts = p.groups.ends ? p.groups.experts : 0;
  const GemmShape shape{ceil_div(p.a.rows, std::max(experts, 1)),      p.columns(), p.a.columns, p.kind, group,
                        p.blocks.b && is_gated(p.epilogue.activation), experts};
  const Device device = device_of(backend, like);
  KernelChoice choice{};
  const int error = selector.of(backend)(&shape, &device, &choice);
  STD_TORCH_CHECK(error != kBeyondEveryKernel,
                  "a GEMM takes fewer than 2^31 rows and 2^30 columns of an operand, and "
                  "2^31 tiles of its output, not [",
                  p.a.rows, ", ", shape.k, "] and [", p.b.rows, ", ", shape.k, "]: split them");
  check_cuda(backend, GemmParams::kSelector, error);
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

void GemmCall::run() {
  pad(params.a, a_);
  pad(params.b, b_);
  if (partial_ >= 0) params.partial = workspace_.at<void>(partial_);
  launch(backend_, params, like_);
}

void run_gemm(Backend backend, GemmParams p, const Tensor& like) {
  if (p.a.rows == 0 || p.b.rows == 0) return;
  if (!p.choice.kernel) p.choice = select_kernel(backend, p, like);
  Workspace workspace;
  GemmCall call(backend, p, like, workspace);
  workspace.allocate(like);
  call.run();
}

std::tuple<Tensor, Tensor> quantized_gemm(Backend backend, GemmParams p, bool epilogue_quantizes,
                                          const std::vector<int64_t>& sizes, const QuantizeOptions& options,
                                          const Tensor& a, const char* op, decltype(run_gemm)* multiply) {
  if (!epilogue_quantizes) {
    const Tensor out = epilogue_output(p.epilogue, sizes, ScalarType::Float, a);
    multiply(backend, p, a);
    auto [q, scale, zero_point] = run_quantize(backend, out, options, op);
    return {q, scale};
  }
  auto [quantized, rows] = quantized_rows(sizes, options, a, op);
  Epilogue& e = p.epilogue;
  e.out = rows.q, e.out_stride = rows.q_stride, e.out_dtype = rows.dtype;
  e.group_scale = rows.scale, e.group_scale_stride = options.group_size ? rows.scale_stride : 0;
  multiply(backend, p, a);
  return {std::get<0>(quantized), std::get<1>(quantized)};
}

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
  p.choice = select_kernel(backend, p, x);
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
  gemm.run();
}

}  // namespace forwardpass
