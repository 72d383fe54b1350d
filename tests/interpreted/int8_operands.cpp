// attention_8bit's operands in 8 bits, as the kernels of a library write them: its entry points, called with a
// workspace that the caller has, and where in that workspace they are. Contiguous q [batch, rows, heads, head_dim], k
// and v; or packed sequences, which begin where cu_seqlens say, batch of them.
#include "kernels/attention/int8_operands.h"

#include <dlfcn.h>

using namespace forwardpass;

struct Case {
  const void *q, *k, *v;
  void *out, *workspace;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int64_t batch, rows, keys, heads, kv_heads, head_dim, value_dim, is_bf16, fp8, rotates, arch;
};

// places: of q, q_scale, shift, k, scales, v, v_scale in the workspace; room: the columns of q and k, and of v;
// blocks. Without a workspace: only how large it has to be.
extern "C" int64_t quantized(const char* library, void* stream, const Case& c, int64_t (&places)[10]) {
  void* const opened = dlopen(library, RTLD_NOW);
  const auto select =
      reinterpret_cast<decltype(&forwardpass_select_attention_8bit)>(dlsym(opened, Attention8bitParams::kSelector));
  const auto launch =
      reinterpret_cast<decltype(&forwardpass_attention_8bit)>(dlsym(opened, Attention8bitParams::kLauncher));
  if (!select || !launch) return -1;
  Attention8bitParams p{};
  const bool varlen = c.cu_seqlens_q;
  const auto tensor = [&](const void* data, int64_t rows, int64_t heads, int64_t columns) {
    return AttentionTensor{data, varlen ? 0 : rows * heads * columns, heads * columns, columns};
  };
  p.q = tensor(c.q, c.rows, c.heads, c.head_dim), p.k = tensor(c.k, c.keys, c.kv_heads, c.head_dim);
  p.v = tensor(c.v, c.keys, c.kv_heads, c.value_dim), p.out = c.out;
  p.dtype = c.is_bf16 ? Dtype::bf16 : Dtype::f16, p.fp8 = c.fp8, p.rotates = c.rotates;
  p.batch = c.batch, p.heads = c.heads, p.kv_heads = c.kv_heads, p.rows = c.rows, p.keys = c.keys;
  p.head_dim = c.head_dim, p.value_dim = c.value_dim, p.scale = 1;
  p.left = p.right = kUnlimited;
  p.cu_seqlens_q = c.cu_seqlens_q, p.cu_seqlens_k = c.cu_seqlens_k;
  p.device = {.sms = 8, .index = 0, .arch = static_cast<int32_t>(c.arch), .shared_kib = 100};
  p.workspace = static_cast<float*>(c.workspace);
  if (select(&p, &p.choice)) return -2;
  if (!c.workspace) return p.choice.workspace_bytes;
  const int room = p.head_dim <= 64 ? 64 : p.head_dim <= 128 ? 128 : 256;
  const auto x = Int8Operands::of(p, room, room, !c.fp8);
  const void* const parts[] = {x.q, x.q_scale, x.shift, x.k, x.scales, x.v, x.v_scale};
  for (int i = 0; i < 7; ++i) places[i] = static_cast<const char*>(parts[i]) - static_cast<const char*>(c.workspace);
  places[7] = x.head_dim, places[8] = x.value_dim, places[9] = x.blocks;
  return launch(&p, stream) ? -3 : p.choice.workspace_bytes;
}
