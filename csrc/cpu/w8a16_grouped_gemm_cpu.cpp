// Threads share one list of work over all experts: some columns of one's product at a time, those of the most rows
// first. So each row of a chosen weight is read once, where it is, and one token's eight experts keep every thread
// busy.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/expert_rows.h"
#include "cpu/few_rows.h"
#include "cpu/w8a16_gemm.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

// Columns that a thread takes at a time, at most: of a weight of 2048 columns that is 512 KB, 30 us of one core.
constexpr int64_t kMostColumns = 256;

struct ExpertProduct {
  W8a16Product product;
  int64_t first_row;
};

// Of the experts that have rows, which are `x` by then. Fills the rows of none.
std::vector<ExpertProduct> products_of(const GemmParams& p, const float* x, int64_t stride) {
  const int64_t columns = p.columns();
  std::vector<ExpertProduct> products;
  for_each_expert(p, [&](int64_t expert, int64_t begin, int64_t end) {
    Matrix b = p.b;
    b.data = static_cast<const char*>(p.b.data) + expert * columns * p.b.stride, b.rows = columns;
    Epilogue e = rows_from(p.epilogue, begin);
    take_expert(e, p.epilogue, expert * columns);
    const float* block_scale =
        p.blocks.b ? p.blocks.b + expert * columns * ceil_div(p.b.columns, kScaleBlock) : nullptr;
    const Matrix rows{x + begin * stride, Dtype::f32, end - begin, p.b.columns, stride};
    products.push_back({{rows, b, block_scale, e}, begin});
  });
  std::stable_sort(products.begin(), products.end(),
                   [](const ExpertProduct& a, const ExpertProduct& b) { return a.product.a.rows > b.product.a.rows; });
  return products;
}

}  // namespace

void w8a16_grouped_gemm_cpu(const Tensor& x, const GemmParams& p) {
  const int64_t stride = round_up(p.a.columns, W8a16Product::kDepth), columns = p.columns();
  const Tensor x_fp32 = contiguous_rows({p.a.rows, stride}, ScalarType::Float, x);
  auto rows = static_cast<float*>(x_fp32.mutable_data_ptr());
  const auto products = products_of(p, rows, stride);
  if (products.empty()) return;
  int64_t product_rows = 0;
  for (const auto& [product, first_row] : products) product_rows += product.a.rows;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(),
                                            product_rows * columns * p.a.columns / cpu::kLeastProducts + 1);
  const auto on_threads = [&](auto work) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work();
    });
  };
  std::atomic<int64_t> next_product{0}, next_item{0};
  on_threads([&] {
    for (int64_t i; (i = next_product++) < static_cast<int64_t>(products.size());) {
      const auto& [product, first_row] = products[i];
      convert_rows(p.a, first_row, product.a);
    }
  });

  const int64_t all_columns = static_cast<int64_t>(products.size()) * columns,
                chunk = std::min(kMostColumns, round_up((all_columns + threads - 1) / threads, 16)),
                chunks = (columns + chunk - 1) / chunk;
  const int64_t most_few_rows = W8a16Product::most_few_rows(p.b.dtype);
  on_threads([&] {
    OptionalTensor buffer;
    for (int64_t i; (i = next_item++) < static_cast<int64_t>(products.size()) * chunks;) {
      const auto& [product, first_row] = products[i / chunks];
      const int64_t first = i % chunks * chunk, last = std::min(first + chunk, columns);
      if (product.a.rows <= most_few_rows) {
        product.few_rows(first, last);
      } else {
        if (!buffer) buffer = contiguous_rows({chunk, p.a.columns}, ScalarType::Float, x);
        product.many_rows(reshaped(x_fp32, {product.a.rows, p.a.columns}, {stride, 1}, first_row * stride), first, last,
                          *buffer);
      }
    }
  });
}

}  // namespace forwardpass
