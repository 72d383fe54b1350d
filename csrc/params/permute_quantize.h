#pragma once
#include "params/common.h"

namespace forwardpass {

constexpr int kCountedExperts = 512;

// permute_quantize: every choice of an expert gets a row of q, in the order of (expert, token, choice); one that is no
// expert gets none, and the rows that are then left over at the end are zeros.
struct PermuteQuantizeParams {
  static constexpr const char* kLauncher = "forwardpass_permute_quantize";
  Matrix x;           // [tokens, columns] f32, f16 or bf16
  const void* index;  // [tokens, choices], int32 or int64
  bool wide_index;    // int64
  int32_t choices, experts;
  QuantizedRows out;  // [tokens * choices, columns], symmetric, scales of rows or of groups
  int32_t* offs;      // [experts], where their rows end
  int32_t* position;  // [tokens, choices], rows of q, -1: none
  int32_t* counts;    // on a GPU: [blocks, experts], of blocks of kCountedChoices choices, where there are several

  HOST_DEVICE int64_t rows() const { return x.rows * choices; }
};

// A thread block of 512 threads counts so many: four a thread, whose loads are in flight together.
constexpr int kCountedChoices = 2048;

void permute_quantize_cpu(const PermuteQuantizeParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_permute_quantize(const forwardpass::PermuteQuantizeParams* p, void* stream);
