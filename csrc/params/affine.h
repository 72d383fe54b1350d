#pragma once
#include "params/common.h"

namespace forwardpass {

// A vector over the columns, in the values' dtype or fp32; null: none.
struct Affine {
  const void* data;
  Dtype dtype;
};

}  // namespace forwardpass
