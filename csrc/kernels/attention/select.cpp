// Which kernel computes a call of attention: of those that take it, one of the newest architecture, with the fewest
// columns; and which calls of attention_decode such a kernel computes. Also attention's entry points.
#include <algorithm>

#include "kernels/attention/kernel.h"

namespace forwardpass {
namespace {

int64_t ceiling(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

// elements: the kernel's dtype.
bool takes(const AttentionKernel& k, const AttentionParams& p, Dtype elements) {
  const bool modified = p.softcap > 0 || p.alibi_slopes || p.mask.kind != AttentionMaskKind::none;
  return runs_on(k.arch, p.device) && k.instance.dtype == elements && k.instance.modified >= modified && k.reads(p) &&
         k.instance.head_dim >= p.head_dim && k.instance.value_dim >= p.value_dim;
}
bool better(const AttentionKernel& a, const AttentionKernel& b) {
  const auto columns = [](const AttentionInstance& i) { return i.head_dim + i.value_dim; };
  if (a.arch.number != b.arch.number) return a.arch.number > b.arch.number;
  const int of_a = columns(a.instance), of_b = columns(b.instance);
  return of_a != of_b ? of_a < of_b : a.instance.modified < b.instance.modified;
}

// Whether a kernel of prefill, which computes 128 rows in a block, takes less time than decode's, which computes
// sixteen rows of all heads that share keys. Both divide the keys among all multiprocessors (split-KV), prefill unless
// that is for the batch to say, and neither is faster than memory. In clocks of a multiprocessor per key at head dim
// 128, modelled on an A100 and an H100: a tile of prefill takes 55 to 76 on mma.sync, 20 on wgmma, and decode's sixteen
// rows 19 to 23, as they read the keys anew from L2; memory takes 37 to 50. At 8 of 32 heads and 2048 keys the two are
// equal at about 50 rows on mma.sync; with packed rows on wgmma prefill takes less from 33 rows that share keys.
bool takes_less(const AttentionKernel& kernel, const AttentionParams& prefill, const AttentionDecodeParams& p) {
  constexpr int64_t kMma = 60, kWgmma = 20, kDecode = 20, kMemory = 40, kTileRows = 128, kDecodeRows = 16;
  // A row's bits depend on the kernel, which is not for the batch to choose where it must not change them.
  const int64_t batch = p.batch_invariant ? 1 : p.cache.batch, sms = std::max<int64_t>(p.device.sms, 1);
  const int64_t lists = batch * p.cache.heads, groups = lists * ceiling(p.sharing_rows(), kDecodeRows);
  const int64_t tiles = batch * prefill.heads * ceiling(prefill.rows, kTileRows);
  const int64_t blocks = tiles < sms && !p.batch_invariant ? tiles : ceiling(tiles, sms) * sms;
  return std::max(blocks * (kernel.arch.number < 90 ? kMma : kWgmma), lists * kMemory) < groups * kDecode;
}

// The kernel for a call, of those that were built; null: none takes it.
template <class Kernels = AttentionKernels>
const AttentionKernel* kernel_for(const AttentionParams& p, Dtype elements) {
  const AttentionKernel* best = nullptr;
  Kernels::for_each([&](const AttentionKernel& k) {
    if (takes(k, p, elements) && (!best || better(k, *best))) best = &k;
  });
  return best;
}
template <class Kernels = AttentionKernels>
int select(const AttentionParams& p, Dtype elements, AttentionChoice& choice) {
  const AttentionKernel* kernel = kernel_for<Kernels>(p, elements);
  if (!kernel) return cudaErrorNoKernelImageForDevice;
  choice = kernel->choose(p);
  return cudaSuccess;
}

// How many query heads of a kv head prefill packs as rows, as AttentionParams::packed has it: all, where they are a
// power of two that divides a tile's rows, and their rows fill fewer tiles so.
int32_t packed_heads(const AttentionDecodeParams& p) {
  constexpr int64_t kTileRows = 128, kMost = 64;  // the latter divides the 192 rows of three consumers too
  const int64_t heads = p.heads / p.cache.heads, step = heads * p.q.head, rows = p.sharing_rows();
  const bool power = heads > 1 && heads <= kMost && (heads & (heads - 1)) == 0 && rows <= INT32_MAX;
  if (!power || p.alibi_slopes || step <= 0 || p.q.batch % step || (p.rows > 1 && p.q.row <= 0)) return 0;
  if (ceiling(rows, kTileRows) >= heads * ceiling(p.rows, kTileRows)) return 0;
  int32_t log2 = 0;
  while (1 << log2 < heads) ++log2;
  return log2;
}

AttentionParams prefill_of(const AttentionDecodeParams& p, int32_t packed) {
  const KvCache& c = p.cache;
  const auto tensor = [](const CacheTensor& t) { return AttentionTensor{t.data, t.first, t.row, t.head}; };
  AttentionParams prefill{};
  prefill.q = p.q, prefill.k = tensor(c.k), prefill.v = tensor(c.v);
  prefill.out = p.out, prefill.lse = p.lse, prefill.dtype = p.dtype;
  prefill.batch = c.batch, prefill.heads = p.heads >> packed, prefill.kv_heads = c.heads;
  prefill.rows = p.rows << packed, prefill.packed = packed;
  prefill.head_dim = c.head_dim, prefill.value_dim = c.value_dim;
  prefill.scale = p.scale, prefill.softcap = p.softcap, prefill.left = p.left;  // and causal: right is 0
  prefill.alibi_slopes = p.alibi_slopes, prefill.alibi_batch_stride = p.alibi_batch_stride;
  prefill.sinks = p.sinks, prefill.sinks_dtype = p.sinks_dtype;
  prefill.cache = c, prefill.batch_invariant = p.batch_invariant, prefill.device = p.device;
  prefill.choice = p.choice.prefill, prefill.workspace = p.workspace;
  return prefill;
}
int launch_prefill(const AttentionDecodeParams& p, void* stream) {
  return p.choice.prefill.launch(prefill_of(p, p.choice.packed), stream);
}

}  // namespace

// Not of 8 bits, nor of sequences that are padded on the left.
bool choose_prefill(const AttentionDecodeParams& p, AttentionDecodeChoice& choice) {
  if (p.sharing_rows() <= kFewRows || size_of(p.cache.dtype) == 1 || p.leftpad) return false;
  int32_t packed = packed_heads(p);
  AttentionParams prefill = prefill_of(p, packed);
  const AttentionKernel* kernel = kernel_for(prefill, p.dtype);
  if (!kernel && packed) prefill = prefill_of(p, packed = 0), kernel = kernel_for(prefill, p.dtype);
  if (!kernel || !takes_less(*kernel, prefill, p)) return false;
  choice = {};
  choice.launch = launch_prefill, choice.packed = packed, choice.prefill = kernel->choose(prefill);
  choice.workspace_bytes = choice.prefill.workspace_bytes;
  return true;
}

}  // namespace forwardpass

using namespace forwardpass;

int forwardpass_select_attention(const AttentionParams* p, AttentionChoice* choice) {
  return select(*p, p->dtype, *choice);
}
int forwardpass_attention(const AttentionParams* p, void* stream) { return p->choice.launch(*p, stream); }
int forwardpass_select_attention_8bit(const Attention8bitParams* p, AttentionChoice* choice) {
  return select<Attention8bitKernels>(*p, p->fp8 ? Dtype::e4m3 : Dtype::i8, *choice);
}
int forwardpass_attention_8bit(const Attention8bitParams* p, void* stream) { return p->choice.launch(*p, stream); }
