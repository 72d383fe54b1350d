#pragma once
// A matrix of bytes to rows that begin at multiples of 16 bytes, for the main loops of the GEMMs.
#include "params/common.h"

namespace forwardpass {

struct PadRowsParams {
  static constexpr const char* kLauncher = "forwardpass_pad_rows";
  Matrix from;        // elements of 1 or 2 bytes
  void* to;           // the same rows, to_stride elements apart
  int64_t to_stride;  // a multiple of 16 bytes
};

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_pad_rows(const forwardpass::PadRowsParams* p, void* stream);
