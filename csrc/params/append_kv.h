#pragma once
#include "params/attention.h"
#include "params/device.h"
#include "params/kv_cache.h"

namespace forwardpass {

// append_kv: token i of a sequence goes to position seq_len - tokens + i, if that is at least 0. Of k, the first
// `rotated` columns are rotated:
//
//   k[c] = k[c] cos[c] + (c < rotated / 2 ? -k[c + rotated / 2] : k[c - rotated / 2]) sin[c]
//
// each operation rounded once to fp32. Scales per token are written, others divide.
struct AppendKvParams {
  static constexpr const char* kLauncher = "forwardpass_append_kv";
  AttentionTensor k, v;      // [batch, token, head, dim]
  AttentionTensor cos, sin;  // [batch, token, 0, rotated], by strides; or null
  Dtype dtype, rotary_dtype;
  int32_t tokens, rotated;
  KvCache cache;
  Device device;  // that runs it; unused on a CPU
};

void append_kv_cpu(const AppendKvParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_append_kv(const forwardpass::AppendKvParams* p, void* stream);
