#pragma once
// attention_decode on a CPU in two passes that threads share, for kernels that have threads already.
#include <memory>

#include "params/attention_decode.h"

namespace forwardpass::cpu {

class SharedDecode {
 public:
  // In `most` shares at most; the bits do not depend on how many.
  SharedDecode(const AttentionDecodeParams& p, int64_t most);
  ~SharedDecode();

  int64_t shares() const;
  // What the passes hand over; 0: there is no second pass.
  int64_t workspace_floats() const;
  // Shares from `first` to `last` of the first pass.
  void attend(int64_t first, int64_t last, float* workspace) const;
  // How many heads there are in the second pass; those from `first` to `last`.
  int64_t heads() const;
  void combine(int64_t first, int64_t last, float* workspace) const;

 private:
  struct Parts;
  const std::unique_ptr<const Parts> parts_;
};

}  // namespace forwardpass::cpu
