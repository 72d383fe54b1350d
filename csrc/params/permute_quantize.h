#pragma once
#include "params/common.h"

namespace forwardpass {

constexpr int kCountedExperts = 512;
// A thread block of 512 threads counts so many choices at a time: four a thread, whose loads are in flight together.
constexpr int kCountedChoices = 2048;
// Thread blocks that count. Each adds up what all have counted: of 512 experts that is 256 KB from L2, 32 MB together.
// A block for every 2048 choices would read 8 GB where there are 2^22.
constexpr int kCountingBlocks = 128;

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
  int32_t* counts;  // on a GPU: [counting_blocks(), experts], choices that each block counted, where there are several

  HOST_DEVICE int64_t rows() const { return x.rows * choices; }
  // A block has consecutive choices: how many times kCountedChoices. One counts without choices too.
  int64_t counting_rounds() const {
    constexpr int64_t kOfRound = int64_t{kCountingBlocks} * kCountedChoices;
    return rows() > kOfRound ? (rows() + kOfRound - 1) / kOfRound : 1;
  }
  int64_t counting_blocks() const {
    const int64_t choices_of_one = counting_rounds() * kCountedChoices;
    return rows() > choices_of_one ? (rows() + choices_of_one - 1) / choices_of_one : 1;
  }
};

void permute_quantize_cpu(const PermuteQuantizeParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_permute_quantize(const forwardpass::PermuteQuantizeParams* p, void* stream);
