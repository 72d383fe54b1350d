// Which kernel computes a call of attention: of those that take it, one of the newest architecture, with the fewest
// columns; and which calls of attention_decode such a kernel computes. Also attention's entry points.
#include <algorithm>

#include "kernels/attention/kernel.h"

namespace forwardpass {
namespace {

bool takes(const AttentionKernel& k, const AttentionParams& p) {
  const bool modified = p.softcap > 0 || p.alibi_slopes || p.mask.kind != AttentionMaskKind::none;
  return runs_on(k.arch, p.device) && k.instance.dtype == p.dtype && k.instance.modified == modified && k.reads(p) &&
         k.instance.head_dim >= p.head_dim && k.instance.value_dim >= p.value_dim;
}
bool better(const AttentionKernel& a, const AttentionKernel& b) {
  const auto columns = [](const AttentionInstance& i) { return i.head_dim + i.value_dim; };
  return a.arch.number != b.arch.number ? a.arch.number > b.arch.number : columns(a.instance) < columns(b.instance);
}

// Whether a kernel of prefill, which computes 128 rows of a head in a block, takes less time than decode's, which
// computes sixteen rows of all heads that share keys. Both divide the keys among all multiprocessors (split-KV),
// prefill unless that is for the batch to say. In clocks of a multiprocessor per key at head dim 128, modelled on an
// A100 and an H100: a tile of prefill takes 55 to 76 on mma.sync, 20 on wgmma, and decode's sixteen rows 19 to 23, as
// they read the keys anew from L2. At 8 of 32 heads and 2048 keys the two are equal at about 50 rows on mma.sync.
bool takes_less(const AttentionKernel& prefill, const AttentionDecodeParams& p) {
  constexpr int64_t kMma = 60, kWgmma = 20, kDecode = 20, kTileRows = 128, kDecodeRows = 16;
  const auto ceiling = [](int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; };
  // A row's bits depend on the kernel, which is not for the batch to choose where it must not change them.
  const int64_t batch = p.batch_invariant ? 1 : p.cache.batch, sms = std::max<int64_t>(p.device.sms, 1);
  const int64_t tiles = batch * p.heads * ceiling(p.rows, kTileRows);
  const int64_t groups = batch * p.cache.heads * ceiling(int64_t{p.heads / p.cache.heads} * p.rows, kDecodeRows);
  const int64_t blocks = tiles < sms && !p.batch_invariant ? tiles : ceiling(tiles, sms) * sms;
  return blocks * (prefill.arch.number < 90 ? kMma : kWgmma) < groups * kDecode;
}

// The kernel for a call, of those that were built; null: none takes it.
const AttentionKernel* kernel_for(const AttentionParams& p) {
  const AttentionKernel* best = nullptr;
  AttentionKernels::for_each([&](const AttentionKernel& k) {
    if (takes(k, p) && (!best || better(k, *best))) best = &k;
  });
  return best;
}

AttentionParams prefill_of(const AttentionDecodeParams& p) {
  const KvCache& c = p.cache;
  const auto tensor = [](const CacheTensor& t) { return AttentionTensor{t.data, t.first, t.row, t.head}; };
  AttentionParams prefill{};
  prefill.q = p.q, prefill.k = tensor(c.k), prefill.v = tensor(c.v);
  prefill.out = p.out, prefill.lse = p.lse, prefill.dtype = p.dtype;
  prefill.batch = c.batch, prefill.heads = p.heads, prefill.kv_heads = c.heads, prefill.rows = p.rows;
  prefill.head_dim = c.head_dim, prefill.value_dim = c.value_dim;
  prefill.scale = p.scale, prefill.softcap = p.softcap, prefill.left = p.left;  // and causal: right is 0
  prefill.alibi_slopes = p.alibi_slopes, prefill.alibi_batch_stride = p.alibi_batch_stride;
  prefill.sinks = p.sinks, prefill.sinks_dtype = p.sinks_dtype;
  prefill.cache = c, prefill.batch_invariant = p.batch_invariant, prefill.device = p.device;
  prefill.choice = p.choice.prefill, prefill.workspace = p.workspace;
  return prefill;
}
int launch_prefill(const AttentionDecodeParams& p, void* stream) {
  return p.choice.prefill.launch(prefill_of(p), stream);
}

}  // namespace

// Not of 8 bits, nor of sequences that are padded on the left.
bool choose_prefill(const AttentionDecodeParams& p, AttentionDecodeChoice& choice) {
  if (p.rows <= kFewRows || size_of(p.cache.dtype) == 1 || p.leftpad) return false;
  const AttentionParams prefill = prefill_of(p);
  const AttentionKernel* kernel = kernel_for(prefill);
  if (!kernel || !takes_less(*kernel, p)) return false;
  choice = {};
  choice.launch = launch_prefill, choice.prefill = kernel->choose(prefill);
  choice.workspace_bytes = choice.prefill.workspace_bytes;
  return true;
}

}  // namespace forwardpass

using namespace forwardpass;

int forwardpass_select_attention(const AttentionParams* p, AttentionChoice* choice) {
  const AttentionKernel* kernel = kernel_for(*p);
  if (!kernel) return cudaErrorNoKernelImageForDevice;
  *choice = kernel->choose(*p);
  return cudaSuccess;
}
int forwardpass_attention(const AttentionParams* p, void* stream) { return p->choice.launch(*p, stream); }
