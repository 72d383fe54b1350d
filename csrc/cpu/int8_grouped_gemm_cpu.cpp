#include "cpu/expert_rows.h"
#include "torch/int8_operands.h"
#include "torch/torch_ops.h"

namespace forwardpass {

// Expert by expert, each a product that all threads share.
void int8_grouped_gemm_cpu(const Tensor& a, const GemmParams& p) {
  const Epilogue& all = p.epilogue;
  const int64_t columns = p.columns();
  for_each_expert(p, [&](int64_t expert, int64_t begin, int64_t end) {
    Matrix rows = p.a, b = p.b;
    rows.data = static_cast<const int8_t*>(p.a.data) + begin * p.a.stride, rows.rows = end - begin;
    b.data = static_cast<const int8_t*>(p.b.data) + expert * columns * p.b.stride, b.rows = columns;
    Epilogue e = rows_from(all, begin);
    take_expert(e, all, expert * columns);
    int8_gemm_cpu(reshaped(a, {rows.rows, rows.columns}, {rows.stride, 1}, begin * rows.stride), rows, b, e, nullptr);
  });
}

}  // namespace forwardpass
