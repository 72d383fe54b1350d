// Layers of a decoder in one call. A step of one token reads all weights once, 106 MB of SmolLM2-135M's layers in int8:
// their bytes bind, and what is between them. So threads are forked once for all layers, share the columns of each
// product, and meet between the steps (team.h); what concerns whole rows, norms and quantisation, each thread does for
// itself, which takes less time than to meet once more. Of many rows each thread takes some through all that concerns
// rows alone, as encoder_layer does: attention, its output, the MLP, and q, k and v of the next layer. Threads then
// meet once per layer, as rows attend to the keys of others.
#include <algorithm>
#include <cmath>

#include "cpu/append_kv.h"
#include "cpu/attention_decode.h"
#include "cpu/attention_rows.h"
#include "cpu/decoder_layer.h"
#include "cpu/norm_rows.h"
#include "cpu/team.h"
#include "cpu/vector.h"

namespace forwardpass {
namespace {

using namespace cpu;

// Rows of `columns` floats, which are `stride` apart, as a dtype has them.
void round_rows(float* x, int64_t rows, int64_t columns, int64_t stride, Dtype dtype) {
  if (dtype == Dtype::f32) return;
  with_vectors(VECTOR_CODE {
    with_float_dtype(dtype, [&](auto D) __attribute__((always_inline)) {
      for (int64_t r = 0; r < rows; ++r)
        for_each_vector<V>(
            0, columns, VECTOR_BODY(&) {
              V rounded[1];
              store<D()>(load<V, Dtype::f32>(x + r * stride, c, n), rounded, 0, n);
              store<Dtype::f32>(load<V, D()>(rounded, 0, n), x + r * stride, c, n);
            });
    });
  });
}

// Sizes of a call's rows.
struct Sizes {
  int64_t rows, columns, q_columns, qkv_columns, mid = 0, depth;

  explicit Sizes(const DecoderLayerParams& p)
      : rows(p.x.rows),
        columns(p.x.columns),
        q_columns(int64_t{p.heads} * p.head_dim),
        qkv_columns(int64_t{p.heads + 2 * p.kv_heads} * p.head_dim) {
    for (const DecoderLayer& layer : p.layers) mid = std::max(mid, layer.down.weight.columns);
    depth = round_up(std::max({columns, q_columns, mid}), kTileBytes);
  }
};

// Rows between the steps of a layer: [rows, H], [rows, H], [rows, I].
struct Buffers {
  float *sum, *normed, *mid;
};

// The steps of a layer, written once for both ways. Steps: linear(linear layer, x, outputs); meet(), where what follows
// reads columns that other threads write.
class Formula {
 public:
  explicit Formula(const DecoderLayerParams& p) : sizes(p), p_(p) {}

  const Sizes sizes;

  // q, k and v, one after another, of rows x of a layer's input.
  template <class Steps>
  void qkv(const DecoderLayer& layer, Steps& steps, const float* x, int64_t rows, const Buffers& b, void* to) const {
    norm(x, rows, layer.norm1, b.normed);
    steps.linear(layer.qkv, floats(b.normed, rows, sizes.columns), {to, sizes.qkv_columns, p_.x.dtype});
  }

  // From what attention gave for rows x on to the end of the layer, in the place of x.
  template <class Steps>
  void rest(const DecoderLayer& layer, Steps& steps, float* x, int64_t rows, const void* attended,
            const Buffers& b) const {
    const int64_t h = sizes.columns, q = sizes.q_columns, mid = layer.down.weight.columns;
    steps.linear(layer.out, {attended, p_.x.dtype, rows, q, q}, {b.sum, h, Dtype::f32, x});
    steps.meet();
    norm(b.sum, rows, layer.norm2, b.normed);
    steps.linear(layer.up, floats(b.normed, rows, h), {b.mid, mid, Dtype::f32, nullptr, p_.activation});
    steps.meet();
    steps.linear(layer.down, floats(b.mid, rows, mid), {x, h, Dtype::f32, b.sum});
  }

  // What puts keys and values of all rows, qkv, into a layer's cache, and queries, rotated, to q.
  AppendKvParams append(const DecoderLayer& layer, const void* qkv, void* q) const {
    AppendKvParams a{};
    a.q = projected(qkv, 0), a.k = projected(qkv, p_.heads), a.v = projected(qkv, p_.heads + p_.kv_heads);
    a.q_out = q, a.q_heads = p_.heads, a.tokens = p_.tokens, a.dtype = p_.x.dtype, a.cache = layer.cache;
    a.cos = p_.cos, a.sin = p_.sin, a.rotary_dtype = p_.rotary_dtype, a.rotated = p_.rotated;
    return a;
  }

  AttentionDecodeParams attention(const DecoderLayer& layer, const void* q, void* out) const {
    AttentionDecodeParams a{};
    a.q = {q, p_.tokens * sizes.q_columns, sizes.q_columns, p_.head_dim}, a.out = out, a.dtype = p_.x.dtype;
    a.heads = p_.heads, a.rows = p_.tokens, a.scale = p_.scale, a.left = kUnlimited;
    a.leftpad = p_.leftpad, a.cache = layer.cache;
    return a;
  }

 private:
  AttentionTensor projected(const void* qkv, int64_t head) const {
    const void* data = static_cast<const char*>(qkv) + head * p_.head_dim * size_of(p_.x.dtype);
    return {data, p_.tokens * sizes.qkv_columns, sizes.qkv_columns, p_.head_dim};
  }

  void norm(const float* x, int64_t rows, const Affine& weight, float* out) const {
    NormQuantizeParams n{};
    n.x = floats(x, rows, sizes.columns), n.weight = weight, n.eps = p_.eps, n.kind = Norm::rms;
    n.rows_per_sample = INT64_MAX;
    norm_rows(n, p_.x.dtype, out, Dtype::f32);
  }

  const DecoderLayerParams& p_;
};

// Few rows: threads share the columns of each product.
class SharedSteps {
 public:
  SharedSteps(const DecoderLayerParams& p, const Tensor& x, const Int8Kernel* kernel)
      : p_(p), tensor_(x), kernel_(kernel), one_(p), team_(shares()) {
    const auto& [rows, h, q, qkv, mid, depth] = one_.sizes;
    const int64_t size = size_of(p.x.dtype);
    x_ = allocate(rows * h * 4), sum_ = allocate(rows * h * 4), mid_ = allocate(rows * mid * 4);
    qkv_ = allocate(rows * qkv * size), q_ = allocate(rows * q * size);
    attended_ = allocate(rows * q * size);
    // All layers attend to as many keys.
    workspace_ = allocate(4 * decode(p.layers[0]).workspace_floats());
  }

  void run() {
    team_.run([&](int64_t begin, int64_t end) { Member(*this, begin, end).run(); });
  }

 private:
  class Member : TeamMember {
   public:
    Member(SharedSteps& all, int64_t begin, int64_t end)
        : TeamMember(all.team_, begin, end),
          all_(all),
          p_(all.p_),
          sizes_(all.one_.sizes),
          products_(all.kernel_, sizes_.rows, p_.weight_only() ? 0 : sizes_.depth, all.tensor_),
          normed_(allocate(sizes_.rows * sizes_.columns * 4)) {
      if (p_.weight_only()) floats_ = allocate(sizes_.rows * sizes_.depth * 4);
    }

    using TeamMember::meet;

    void run() {
      const Formula& one = all_.one_;
      const int64_t h = sizes_.columns, size = size_of(p_.x.dtype);
      const Range rows = range(sizes_.rows), columns = TeamMember::columns(h);
      const auto x = at<float>(all_.x_);
      const Buffers b{at<float>(all_.sum_), at<float>(normed_), at<float>(all_.mid_)};
      for (int64_t r = rows.first; r < rows.last; ++r)
        convert(static_cast<const char*>(p_.x.data) + r * p_.x.stride * size, p_.x.dtype, x + r * h, h);
      meet();
      for (const DecoderLayer& layer : p_.layers) {
        one.qkv(layer, *this, x, sizes_.rows, b, at<char>(all_.qkv_));
        meet();
        append(one.append(layer, at<char>(all_.qkv_), at<char>(all_.q_)), rows.first, rows.last);
        meet();
        attend(layer);
        one.rest(layer, *this, x, sizes_.rows, at<char>(all_.attended_), b);
        round_rows(x + columns.first, sizes_.rows, columns.last - columns.first, h, p_.x.dtype);
        meet();
      }
      for (int64_t r = rows.first; r < rows.last; ++r)
        convert(x + r * h, static_cast<char*>(p_.out) + r * h * size, p_.x.dtype, h);
    }

    void linear(const LayerLinear& linear, const Matrix& x, const Outputs& o) {
      const Range columns = TeamMember::columns(linear.weight.rows);
      if (linear.weight_only) {
        const W8a16Product product = weight_only_product(linear, x, o, Dtype::f32, at<float>(floats_));
        return product.few_rows(columns.first, columns.last);
      }
      products_.quantize(linear, x, {0, x.rows});
      products_.multiply(linear, x, o, columns);
    }

   private:
    void attend(const DecoderLayer& layer) {
      const auto attention = all_.one_.attention(layer, at<char>(all_.q_), at<char>(all_.attended_));
      const SharedDecode decode(attention, all_.team_.shares());
      if (const Range shares = range(decode.shares()); shares.first < shares.last)
        decode.attend(shares.first, shares.last, at<float>(all_.workspace_));
      meet();
      if (!decode.workspace_floats()) return;
      const Range heads = range(decode.heads());
      decode.combine(heads.first, heads.last, at<float>(all_.workspace_));
      meet();
    }

    SharedSteps& all_;
    const DecoderLayerParams& p_;
    const Sizes& sizes_;
    const FewRowsProducts products_;
    CacheLines normed_, floats_;
  };

  // A thread has so many products in a layer that meeting the others does not take a tenth of its time.
  int64_t shares() const {
    if (!kernel_) return 1;
    const auto& [rows, h, q, qkv, mid, depth] = one_.sizes;
    const int64_t products = rows * (h * (qkv + q) + 3 * h * mid);
    return std::clamp<int64_t>(products / kLeastProducts, 1, torch::stable::get_num_threads());
  }

  SharedDecode decode(const DecoderLayer& layer) const {
    return {one_.attention(layer, nullptr, nullptr), team_.shares()};
  }

  const DecoderLayerParams& p_;
  const Tensor& tensor_;
  const Int8Kernel* const kernel_;
  const Formula one_;
  Team team_;
  CacheLines x_, sum_, mid_, qkv_, q_, attended_, workspace_;
};

// What one thread has for its rows, a block of at most 32 at a time.
class Block {
 public:
  Block(const DecoderLayerParams& p, const Sizes& sizes, const Int8Kernel& kernel)
      : products_(kernel, sizes.depth, operand(p)),
        attended_(allocate(kMostRows * sizes.q_columns * size_of(p.x.dtype))),
        floats_(allocate(kBlockRows * (3 * sizes.columns + sizes.mid) * 4)) {
    const int64_t each = kBlockRows * sizes.columns;
    x = at<float>(floats_), buffers = {x + each, x + 2 * each, x + 3 * each};
  }

  float* x;  // of the block's rows
  Buffers buffers;

  char* attended() const { return at<char>(attended_); }
  void take(const BlockLayer& layer) { layer_ = &layer; }
  void meet() {}

  void linear(const LayerLinear& linear, const Matrix& x, const Outputs& o) { products_.linear(*layer_, linear, x, o); }

 private:
  static Dtype operand(const DecoderLayerParams& p) {
    return p.weight_only() ? W8a16Product::operand(p.x.dtype, kBlockRows) : Dtype::i8;
  }

  BlockProducts products_;
  const BlockLayer* layer_ = nullptr;
  CacheLines attended_, floats_;
};

// Many rows: some at a time, each by one thread.
class Blocks {
 public:
  Blocks(const DecoderLayerParams& p, const Int8Kernel& kernel) : p_(p), one_(p), kernel_(kernel) {
    for (const DecoderLayer& l : p.layers) layers_.push_back(BlockLayer({&l.qkv, &l.out, &l.up, &l.down}));
  }

  void run() {
    const auto& [rows, h, q, qkv, mid, depth] = one_.sizes;
    const int64_t threads = torch::stable::get_num_threads(), each = (rows + threads - 1) / threads;
    // Four parts a thread, so that threads have equal shares, but blocks that are full.
    const int64_t part = each <= kBlockRows ? each : std::min(kMostRows, round_up(each / 4 + 1, kBlockRows)),
                  parts = (rows + part - 1) / part, slots = (parts + threads - 1) / threads;
    const int64_t size = size_of(p_.x.dtype);
    const CacheLines of_qkv = allocate(rows * qkv * size), of_q = allocate(rows * q * size);
    for (int64_t l = -1; l < std::ssize(layers_); ++l) {
      if (l + 1 < std::ssize(layers_)) layers_[l + 1].pack(kernel_, l > 0 ? &layers_[l - 1] : nullptr);
      // Each thread has parts from everywhere, as later rows attend to more keys.
      torch::stable::parallel_for(0, threads * slots, 1, [&](int64_t begin, int64_t end) {
        Block block(p_, one_.sizes, kernel_);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t first = (i % slots * threads + i / slots) * part;
          if (first < rows) layer(block, l, first, std::min(rows, first + part), at<char>(of_qkv), at<char>(of_q));
        }
      });
    }
  }

 private:
  // Layer l but its q, k and v, which are in q and in its cache; and those of the next layer. -1: of the first alone.
  void layer(Block& block, int64_t l, int64_t first, int64_t last, char* qkv, char* q) const {
    const int64_t h = one_.sizes.columns, size = size_of(p_.x.dtype);
    if (l >= 0) attend(p_.layers[l], first, last, q, block.attended());
    for (int64_t r = first; r < last; r += kBlockRows) {
      const int64_t count = std::min(kBlockRows, last - r);
      for (int64_t i = 0; i < count; ++i) convert(input(l, r + i), p_.x.dtype, block.x + i * h, h);
      if (l >= 0) {
        block.take(layers_[l]);
        one_.rest(p_.layers[l], block, block.x, count, block.attended() + (r - first) * one_.sizes.q_columns * size,
                  block.buffers);
        convert(block.x, out(r), p_.x.dtype, count * h);
        round_rows(block.x, 1, count * h, 0, p_.x.dtype);
      }
      if (l + 1 == std::ssize(layers_)) continue;
      const DecoderLayer& next = p_.layers[l + 1];
      block.take(layers_[l + 1]);
      one_.qkv(next, block, block.x, count, block.buffers, qkv + r * one_.sizes.qkv_columns * size);
      append(one_.append(next, qkv, q), r, r + count);
    }
  }

  // Rows from `first` to `last`, which sequences may share.
  void attend(const DecoderLayer& layer, int64_t first, int64_t last, const char* q, char* out) const {
    for (int64_t row = first; row < last;) {
      const int64_t b = row / p_.tokens, end = std::min(last, (b + 1) * p_.tokens);
      const int64_t bytes = one_.sizes.q_columns * size_of(p_.x.dtype);
      attend(layer, b, row - b * p_.tokens, end - b * p_.tokens, q + row * bytes, out + (row - first) * bytes);
      row = end;
    }
  }

  // Rows of one sequence.
  void attend(const DecoderLayer& layer, int64_t b, int64_t first, int64_t last, const char* q, char* out) const {
    AttentionDecodeParams a = one_.attention(layer, q, out);
    // Of the last row on, as the sequence's rows end there.
    const int32_t length = p_.seq_lens[b] - p_.tokens + static_cast<int32_t>(last);
    const int32_t padding = p_.leftpad ? p_.leftpad[b] : 0;
    const int64_t size = size_of(p_.x.dtype);
    const auto sequence = [&](const CacheTensor& t) { return static_cast<char*>(t.data) + b * t.first * size; };
    const bool known = a.in_range(b);
    a.rows = static_cast<int32_t>(last - first);
    if (known && length > padding && has_attention_rows(p_.x.dtype, p_.head_dim)) {
      const auto keys = [&](const CacheTensor& t) {
        return AttentionTensor{sequence(t) + padding * t.row * size, 0, t.row, t.head};
      };
      AttentionRows r{};
      r.dtype = p_.x.dtype, r.q = a.q, r.out = {out, 0, one_.sizes.q_columns, p_.head_dim};
      r.k = keys(a.cache.k), r.v = keys(a.cache.v);
      r.batch = 1, r.heads = p_.heads, r.kv_heads = p_.kv_heads, r.rows = a.rows, r.columns = p_.head_dim;
      r.keys = length - padding, r.scale = p_.scale, r.first_position = r.keys - a.rows;
      r.left = kUnlimited, r.right = 0;
      return attention_rows_here(r);
    }
    // Of no known length, without keys, or of columns that attention_rows has not. -1 is no length.
    const int32_t keys = known ? std::max(length, 0) : -1;
    if (known && length < 0) a.rows = 0;
    a.cache.k.data = sequence(a.cache.k), a.cache.v.data = sequence(a.cache.v);
    a.cache.batch = a.cache.pages = 1, a.cache.seq_lens = &keys, a.leftpad = known && p_.leftpad ? &padding : nullptr;
    if (a.rows) return attention_decode_cpu(a);
    std::fill_n(out, (last - first) * one_.sizes.q_columns * size, 0);
  }

  const char* input(int64_t l, int64_t row) const {
    if (l > 0) return out(row);
    return static_cast<const char*>(p_.x.data) + row * p_.x.stride * size_of(p_.x.dtype);
  }

  char* out(int64_t row) const { return static_cast<char*>(p_.out) + row * one_.sizes.columns * size_of(p_.x.dtype); }

  const DecoderLayerParams& p_;
  const Formula one_;
  const Int8Kernel& kernel_;
  std::vector<BlockLayer> layers_;
};

// The most rows of which threads share the columns; for more, weights that no one keeps packed are packed on each call.
int64_t most_shared_rows(const DecoderLayerParams& p, const Int8Kernel& kernel) {
  return p.weight_only() || kernel.keeps_packed ? kernel.few_rows : kernel.few_rows_unpacked;
}

}  // namespace

void decoder_layer_cpu(const DecoderLayerParams& p, const Tensor& x) {
  if (p.x.rows == 0) return;
  const Int8Kernel* kernel = int8_kernel(tier());
  if (kernel && p.x.rows > most_shared_rows(p, *kernel)) {
    Blocks(p, *kernel).run();
  } else {
    SharedSteps(p, x, kernel).run();
  }
}

}  // namespace forwardpass
