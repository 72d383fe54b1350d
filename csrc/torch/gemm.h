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

// group: as in GemmShape.
KernelChoice select_kernel(Backend backend, const GemmParams& p, const Tensor& like, int32_t group = 0);

// A GEMM whose kernel is selected, and what that needs in the workspace: aligned copies of unaligned operands, and
// partial sums.
class GemmCall {
 public:
  GemmCall(Backend backend, const GemmParams& p, const Tensor& like, Workspace& workspace);
  // After workspace.allocate().
  void run();

  GemmParams params;

 private:
  void pad(Matrix& m, int64_t offset);

  Backend backend_;
  const Tensor& like_;
  Workspace& workspace_;
  int64_t a_ = -1, b_ = -1, partial_ = -1;  // offsets of the copies and of the partial sums; -1: none
};

// A GEMM of the operands in p. Selects the kernel, unless p.choice has one.
void run_gemm(Backend backend, GemmParams p, const Tensor& like);

// A GEMM with the options of an operation, but for its output of q and scales. The epilogue quantises where it has each
// segment whole, of which p.choice has the kernel; otherwise the GEMM in fp32 comes first, which moves 8 more bytes per
// output. multiply: of `a`, as run_gemm.
std::tuple<Tensor, Tensor> quantized_gemm(Backend backend, GemmParams p, bool epilogue_quantizes,
                                          const std::vector<int64_t>& sizes, const QuantizeOptions& options,
                                          const Tensor& a, const char* op, decltype(run_gemm)* multiply = run_gemm);

// A Linear: quantises x into the workspace, as q.out says, and multiplies it by the weight, which is p.b. Fills in p.a
// and its scales.
void quantize_and_multiply(Backend backend, QuantizeParams q, GemmParams p, const Tensor& x);

}  // namespace forwardpass
