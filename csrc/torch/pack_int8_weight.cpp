#include "cpu/int8_kernel.h"
#include "torch/ops.h"

namespace forwardpass {

Tensor pack_int8_weight(const Tensor& weight, bool verify) {
  const Matrix b = operand(weight, Dtype::i8, weight, "pack_int8_weight", "weight");
  STD_TORCH_CHECK(weight.dim() == 2, "pack_int8_weight: weight must be [N, K]");
  Tensor packed = contiguous_rows({0}, ScalarType::Char, weight);
  const auto allocate = [&](int64_t bytes) {
    packed = contiguous_rows({bytes}, ScalarType::Char, weight);
    return static_cast<uint8_t*>(packed.mutable_data_ptr());
  };
  if (weight.numel()) cpu::pack_weight(cpu::tier(), b, verify, allocate);
  return packed;
}

std::string cpu_tiers() {
  std::string names;
  for (const cpu::Tier t : cpu::tiers()) names += (names.empty() ? "" : ",") + std::string(cpu::name_of(t));
  return names;
}

std::string cpu_tier() { return std::string(cpu::name_of(cpu::tier())); }

}  // namespace forwardpass
