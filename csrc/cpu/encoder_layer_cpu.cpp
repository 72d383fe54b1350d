// Layers of an encoder in one call. All steps of a layer but attention's keys and values concern one row each. So a
// thread takes some rows through all of it, in its core's caches: attention, its output, residual and norm, the MLP,
// residual and norm, and q, k and v of the next layer. Then all threads meet, once a layer, as rows attend to all keys
// of their sequence. Where rows are too few for that, threads are forked once for all layers, share the columns of each
// product, the heads, and the rows of what concerns rows alone, and meet between these steps (team.h).
//
// A layer of MiniLM (384, 12 heads of 32, 1536) and 1024 rows is 1.81 G multiply-adds in int8, 7.9 ms of a core that
// does 230 G a second; attention, 8 x 128, .1 G in fp32 or bf16; 3072 + 1536 values of a row through epilogues and
// quantisation, 4.7 M of each. Its weights are 1.8 MB, which blocks of 32 rows read from L3 at 7 GB a second. With 16
// rows those bytes bind.
#include <algorithm>
#include <cmath>

#include "cpu/attention.h"
#include "cpu/attention_rows.h"
#include "cpu/encoder_layer.h"
#include "cpu/norm_rows.h"
#include "cpu/rotary.h"
#include "cpu/sequences.h"
#include "cpu/team.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

using namespace cpu;

struct Sequence {
  int64_t first, last, keys;
  bool known;
};

// All rows, in the order in which they are; those of no known sequence are one that is not.
std::vector<Sequence> sequences_of(const EncoderLayerParams& p) {
  const int64_t known = known_before(p.cu_seqlens, p.batch, p.x.rows);
  std::vector<Sequence> all;
  int64_t row = 0;
  for (int64_t b = 0; b < known; ++b) {
    const int64_t last = p.cu_seqlens[b + 1], rows = last - row, keys = p.key_lens ? p.key_lens[b] : rows;
    const bool fits = !p.score_bias.data || rows <= p.score_bias.size;
    all.push_back({row, last, keys, keys >= 0 && keys <= rows && fits});
    row = last;
  }
  if (row < p.x.rows) all.push_back({row, p.x.rows, 0, false});
  return all;
}

void fill_nan(void* to, Dtype dtype, int64_t n) {
  const float nan = NAN;
  for (int64_t i = 0; i < n; ++i) convert(&nan, static_cast<char*>(to) + i * size_of(dtype), dtype, 1);
}

// Whether both give one input the same bytes, scales and zero points.
bool quantize_alike(const LayerLinear& a, const LayerLinear& b) {
  return a.channel_scale == b.channel_scale && !a.sum == !b.sum;
}

// Where rows of a call are between the steps of a layer.
struct Buffers {
  void* attended;             // [rows, H] of the attention's dtype
  float *sum, *normed, *mid;  // [rows, H], [rows, H], [rows, I]
};

// The steps of a layer, written once for both ways. Steps:
//   range(rows)                          the rows that the calling thread takes through what concerns rows alone
//   linear(layer, x, outputs, quantized) quantized: x is as the call before had it
//   meet()                               where what follows reads what other threads write
class Formula {
 public:
  explicit Formula(const EncoderLayerParams& p) : p_(p) {}

  int64_t columns() const { return p_.x.columns; }
  int64_t mid_columns(const EncoderLayer& layer) const {
    return layer.up.weight.rows / (is_gated(p_.activation) ? 2 : 1);
  }

  // q, k and v, those rotated that are, of x: rows from `first` on of a layer's input of x's dtype.
  template <class Steps>
  void qkv(const EncoderLayer& layer, Steps& steps, const Matrix& x, int64_t first, float* normed, void* to) const {
    const Range rows = steps.range(x.rows);
    Matrix in = x;
    if (layer.norms_first) {
      norm(as_floats(x, rows, normed), rows, layer.norm1_weight, layer.norm1_bias, normed, Dtype::f32);
      in = floats(normed, x.rows, columns());
    }
    const int64_t h = columns();
    for (int64_t i = 0; i < std::ssize(layer.qkv); ++i) {
      const bool is_quantized = i > 0 && quantize_alike(layer.qkv[i - 1], layer.qkv[i]);
      if (i > 0 && !is_quantized) steps.meet();
      const Outputs outputs{static_cast<char*>(to) + i * h * size_of(p_.attention), 3 * h, p_.attention};
      steps.linear(layer.qkv[i], in, outputs, is_quantized);
    }
    if (!p_.rotated) return;
    steps.meet();
    rotate_heads(layer.rotary, first, rows, static_cast<char*>(to));
  }

  // From what attention gave for rows of x on to the end of the layer, out.
  template <class Steps>
  void rest(const EncoderLayer& layer, Steps& steps, const Matrix& x, const Buffers& b, void* out) const {
    const int64_t h = columns(), i = mid_columns(layer);
    const Range rows = steps.range(x.rows);
    const auto residual = static_cast<const float*>(as_floats(x, rows, b.normed).data);
    steps.linear(layer.out, {b.attended, p_.attention, x.rows, h, h}, {b.sum, h, Dtype::f32, residual});
    steps.meet();
    const bool pre = p_.pre_norm;
    norm(floats(b.sum, x.rows, h), rows, pre ? layer.norm2_weight : layer.norm1_weight,
         pre ? layer.norm2_bias : layer.norm1_bias, b.normed, Dtype::f32);
    steps.linear(layer.up, floats(b.normed, x.rows, h), {b.mid, i, Dtype::f32, nullptr, p_.activation});
    steps.meet();
    // Not in place: the epilogue adds the residual to what it has stored.
    float *to = pre ? b.normed : b.sum, *second = pre ? b.sum : b.normed;
    steps.linear(layer.down, floats(b.mid, x.rows, i), {to, h, Dtype::f32, second});
    steps.meet();
    if (!pre) return norm(floats(b.sum, x.rows, h), rows, layer.norm2_weight, layer.norm2_bias, out, p_.x.dtype);
    convert(to + rows.first * h, static_cast<char*>(out) + rows.first * h * size_of(p_.x.dtype), p_.x.dtype,
            (rows.last - rows.first) * h);
  }

 private:
  // q and k of some rows of qkv, which are x's from `first` on.
  void rotate_heads(const LayerRotary& r, int64_t first, Range rows, char* qkv) const {
    const int64_t n = p_.rotated, heads = 2 * p_.heads, head_dim = columns() / p_.heads;
    const CacheLines memory = allocate(4 * 3 * n);
    float *row = at<float>(memory), *cos = row + n, *sin = cos + n;
    const auto of_row = [&](const void* data, int64_t stride, int64_t i) {
      return static_cast<const char*>(data) + (first + i) * stride * size_of(p_.rotary_dtype);
    };
    with_vectors(VECTOR_CODE {
      for (int64_t i = rows.first; i < rows.last; ++i) {
        to_floats<V>(of_row(r.cos, r.cos_row, i), p_.rotary_dtype, n, cos);
        to_floats<V>(of_row(r.sin, r.sin_row, i), p_.rotary_dtype, n, sin);
        for (int64_t head = 0; head < heads; ++head) {
          char* x = qkv + (i * 3 * columns() + head * head_dim) * size_of(p_.attention);
          to_floats<V>(x, p_.attention, n, row);
          rotate<V>(row, cos, sin, n, false);
          from_floats<V>(row, p_.attention, n, x);
        }
      }
    });
  }

  // x, contiguous: itself, or `to`, with some of its rows.
  static Matrix as_floats(const Matrix& x, Range rows, float* to) {
    if (x.dtype == Dtype::f32 && x.stride == x.columns) return x;
    for (int64_t r = rows.first; r < rows.last; ++r)
      convert(static_cast<const char*>(x.data) + r * x.stride * size_of(x.dtype), x.dtype, to + r * x.columns,
              x.columns);
    return floats(to, x.rows, x.columns);
  }

  // Some rows of x, which are floats and contiguous.
  void norm(Matrix x, Range rows, const Affine& weight, const Affine& bias, void* out, Dtype out_dtype) const {
    x.data = static_cast<const float*>(x.data) + rows.first * x.columns, x.rows = rows.last - rows.first;
    NormQuantizeParams n{};
    n.x = x, n.weight = weight, n.bias = bias, n.eps = p_.eps, n.kind = Norm::layer, n.rows_per_sample = INT64_MAX;
    norm_rows(n, p_.x.dtype, static_cast<char*>(out) + rows.first * x.columns * size_of(out_dtype), out_dtype);
  }

  const EncoderLayerParams& p_;
};

int64_t most_mid_columns(const EncoderLayerParams& p) {
  const Formula one(p);
  int64_t most = 0;
  for (const EncoderLayer& layer : p.layers) most = std::max(most, one.mid_columns(layer));
  return most;
}

// q, k or v of a row and of a head, within the product's rows.
struct Projected {
  const void* data;
  Dtype dtype;
  int64_t columns;  // H

  AttentionTensor at(int64_t row, int64_t which, int64_t column) const {
    const int64_t element = (row * 3 + which) * columns + column;
    return {static_cast<const char*>(data) + element * size_of(dtype), 0, 3 * columns, 0};
  }
};

// Some rows of a sequence, and some heads, to out, where the first of the rows begins.
AttentionRows attention_of(const EncoderLayerParams& p, const EncoderLayer& layer, const Projected& qkv,
                           const Sequence& s, Range rows, Range heads, void* out) {
  const int64_t h = p.x.columns, head_dim = h / p.heads, column = heads.first * head_dim;
  AttentionRows a{};
  a.dtype = p.attention;
  a.q = qkv.at(rows.first, 0, column), a.k = qkv.at(s.first, 1, column), a.v = qkv.at(s.first, 2, column);
  a.out = {static_cast<char*>(out) + column * size_of(p.attention), 0, h, head_dim};
  a.q.head = a.k.head = a.v.head = head_dim;
  a.batch = 1, a.heads = a.kv_heads = heads.last - heads.first, a.columns = head_dim;
  a.rows = rows.last - rows.first, a.keys = s.keys;
  a.scale = p.scale, a.first_position = rows.first - s.first, a.left = a.right = layer.window;
  if (const ScoreBias& b = p.score_bias; b.data)
    a.mask = b.data + heads.first * b.head + a.first_position * b.row, a.mask_head = b.head, a.mask_row = b.row;
  return a;
}

// Rows from `first` to `last`, which sequences may share: calls known(sequence, first, last, out) for each part, with
// NaN in the rows of none.
template <class F>
void for_each_sequence(const EncoderLayerParams& p, const std::vector<Sequence>& all, int64_t first, int64_t last,
                       void* out, F known) {
  const int64_t h = p.x.columns;
  auto s = std::upper_bound(all.begin(), all.end(), first, [](int64_t row, const Sequence& s) { return row < s.last; });
  for (; s != all.end() && s->first < last; ++s) {
    const int64_t begin = std::max(first, s->first), end = std::min(last, s->last);
    if (begin >= end) continue;
    void* to = static_cast<char*>(out) + (begin - first) * h * size_of(p.attention);
    if (s->known) {
      known(*s, begin, end, to);
    } else {
      fill_nan(to, p.attention, (end - begin) * h);
    }
  }
}

// All rows at once. Without a kernel each product and each attention is a call of its own, by all threads.
class SharedSteps {
 public:
  SharedSteps(const EncoderLayerParams& p, const Tensor& x, const Int8Kernel* kernel)
      : p_(p),
        one_(p),
        sequences_(sequences_of(p)),
        is_team_(kernel),
        team_(shares()),
        products_(kernel, p.x.rows, std::max(p.x.columns, most_mid_columns(p)), x),
        qkv_(contiguous_rows({p.x.rows, 3 * p.x.columns}, scalar_type(), x)),
        attended_(contiguous_rows({p.x.rows, p.x.columns}, scalar_type(), x)),
        sum_(allocate(p.x.rows * p.x.columns * 4)),
        normed_(allocate(p.x.rows * p.x.columns * 4)),
        mid_(allocate(p.x.rows * most_mid_columns(p) * 4)) {}

  void run() {
    team_.run([&](int64_t begin, int64_t end) { Member(*this, begin, end).run(); });
  }

 private:
  class Member : TeamMember {
   public:
    Member(SharedSteps& all, int64_t begin, int64_t end) : TeamMember(all.team_, begin, end), all_(all), p_(all.p_) {}

    using TeamMember::meet;
    using TeamMember::range;

    void run() {
      const int64_t rows = p_.x.rows, h = p_.x.columns;
      const Buffers buffers{all_.attended_.mutable_data_ptr(), at<float>(all_.sum_), at<float>(all_.normed_),
                            at<float>(all_.mid_)};
      Matrix x = p_.x;
      for (const EncoderLayer& layer : p_.layers) {
        all_.one_.qkv(layer, *this, x, 0, buffers.normed, all_.qkv_.mutable_data_ptr());
        meet();
        attend(layer);
        meet();
        all_.one_.rest(layer, *this, x, buffers, p_.out);
        x = {p_.out, p_.x.dtype, rows, h, h};
      }
    }

    void linear(const LayerLinear& linear, const Matrix& x, const Outputs& o, bool is_quantized = false) {
      if (!is_quantized) {
        all_.products_.quantize(linear, x, range(x.rows));
        meet();
      }
      all_.products_.multiply(linear, x, o, columns(linear.weight.rows));
    }

   private:
    // The heads of all sequences, one sequence after another.
    void attend(const EncoderLayer& layer) {
      const Range items = range(std::ssize(all_.sequences_) * p_.heads);
      int64_t first = 0;
      for (const Sequence& s : all_.sequences_) {
        const Range heads{std::max<int64_t>(items.first - first, 0), std::min(items.last - first, p_.heads)};
        first += p_.heads;
        if (heads.first < heads.last) all_.attend(layer, s, heads);
      }
    }

    SharedSteps& all_;
    const EncoderLayerParams& p_;
  };

  // A thread has so many products in a layer that meeting the others does not take a tenth of its time.
  int64_t shares() const {
    if (!is_team_) return 1;
    const int64_t h = p_.x.columns, products = p_.x.rows * (4 * h * h + 2 * h * most_mid_columns(p_));
    return std::clamp<int64_t>(products / kLeastProducts, 1, torch::stable::get_num_threads());
  }

  ScalarType scalar_type() const {
    return p_.attention == Dtype::f32   ? ScalarType::Float
           : p_.attention == Dtype::f16 ? ScalarType::Half
                                        : ScalarType::BFloat16;
  }

  // The kernel by hand where there is one, whatever the rows: the bits are those of blocks.
  void attend(const EncoderLayer& layer, const Sequence& s, Range heads) {
    const int64_t h = p_.x.columns, head_dim = h / p_.heads, rows = s.last - s.first;
    if (rows == 0) return;
    void* out = static_cast<char*>(attended_.mutable_data_ptr()) + s.first * h * size_of(p_.attention);
    if (!s.known) return heads.first == 0 ? fill_nan(out, p_.attention, rows * h) : void();
    const AttentionRows a =
        attention_of(p_, layer, {qkv_.const_data_ptr(), p_.attention, h}, s, {s.first, s.last}, heads, out);
    if (is_team_) return attention_rows_here(a);
    if (has_attention_rows(p_.attention, head_dim)) return attention_rows(a);
    AttentionParams params{};
    params.q = a.q, params.k = a.k, params.v = a.v, params.out = out, params.dtype = p_.attention;
    params.batch = 1, params.heads = params.kv_heads = static_cast<int32_t>(p_.heads);
    params.rows = static_cast<int32_t>(rows), params.keys = static_cast<int32_t>(s.keys);
    params.head_dim = params.value_dim = static_cast<int32_t>(head_dim);
    params.scale = p_.scale, params.left = params.right = kUnlimited;
    if (a.mask) params.mask = {a.mask, AttentionMaskKind::f32, 0, a.mask_head, a.mask_row, 1};
    std::vector<float> window;
    if (a.left < rows) params.mask = window_mask(a, window);
    const auto projected = [&](int64_t which) { return reshaped(qkv_, {1, h}, {3 * h, 1}, (s.first * 3 + which) * h); };
    Tensor to = reshaped(attended_, {rows, h}, {h, 1}, s.first * h);
    attention_cpu(params, projected(0), projected(1), projected(2), to);
  }

  // The window of all rows of a sequence as a mask in `memory`, with the mask that there is: attention_cpu aligns the
  // last row with the last key, and here rows of padding come after it.
  static AttentionMask window_mask(const AttentionRows& a, std::vector<float>& memory) {
    const int64_t heads = a.mask ? a.heads : 1;
    memory.assign(heads * a.rows * a.keys, -INFINITY);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < a.rows; ++i)
        for (int64_t j = std::max<int64_t>(0, i - a.left); j < std::min(a.keys, i + a.right + 1); ++j)
          memory[(h * a.rows + i) * a.keys + j] = a.mask ? a.mask[h * a.mask_head + i * a.mask_row + j] : 0;
    return {memory.data(), AttentionMaskKind::f32, 0, a.mask ? a.rows * a.keys : 0, a.keys, 1};
  }

  const EncoderLayerParams& p_;
  const Formula one_;
  const std::vector<Sequence> sequences_;
  const bool is_team_;
  Team team_;
  const FewRowsProducts products_;
  const Tensor qkv_;
  Tensor attended_;
  const CacheLines sum_, normed_, mid_;
};

// What one thread has for its rows, a block of at most 32 at a time.
class Block {
 public:
  Block(const EncoderLayerParams& p, const Int8Kernel& kernel) : Block(p, kernel, p.x.columns, most_mid_columns(p)) {}

  void take(const BlockLayer& layer) { layer_ = &layer; }
  void meet() {}
  Range range(int64_t rows) const { return {0, rows}; }

  void linear(const LayerLinear& linear, const Matrix& x, const Outputs& o, bool is_quantized = false) {
    products_.linear(*layer_, linear, x, o, is_quantized);
  }

  const Buffers& buffers() const { return buffers_; }

 private:
  Block(const EncoderLayerParams& p, const Int8Kernel& kernel, int64_t h, int64_t mid)
      : products_(kernel, std::max(h, mid)),
        attended_(allocate(kMostRows * h * size_of(p.attention))),
        floats_(allocate(kBlockRows * (2 * h + mid) * 4)) {
    const auto floats = at<float>(floats_);
    buffers_ = {at<char>(attended_), floats, floats + kBlockRows * h, floats + 2 * kBlockRows * h};
  }

  BlockProducts products_;
  const BlockLayer* layer_ = nullptr;
  CacheLines attended_, floats_;
  Buffers buffers_{};
};

// Some rows at a time, each by one thread.
class Blocks {
 public:
  Blocks(const EncoderLayerParams& p, const Int8Kernel& kernel)
      : p_(p), one_(p), kernel_(kernel), sequences_(sequences_of(p)) {
    for (const EncoderLayer& l : p.layers) {
      std::vector<const LayerLinear*> linears = {&l.out, &l.up, &l.down};
      for (const LayerLinear& projected : l.qkv) linears.push_back(&projected);
      layers_.push_back(BlockLayer(linears));
    }
  }

  void run() {
    const int64_t rows = p_.x.rows, h = one_.columns(), threads = torch::stable::get_num_threads();
    // Four items a thread, so that threads have equal shares.
    const int64_t part = std::clamp(round_up(rows / (4 * threads) + 1, kBlockRows), kBlockRows, kMostRows),
                  parts = (rows + part - 1) / part;
    const CacheLines qkv[2] = {allocate(rows * 3 * h * size_of(p_.attention)),
                               allocate(layers_.size() > 1 ? rows * 3 * h * size_of(p_.attention) : 0)};
    for (int64_t l = -1; l < std::ssize(layers_); ++l) {
      if (l + 1 < std::ssize(layers_)) layers_[l + 1].pack(kernel_, l > 0 ? &layers_[l - 1] : nullptr);
      torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        Block block(p_, kernel_);
        for (int64_t i = begin; i < end; ++i)
          layer(block, l, i * part, std::min(rows, (i + 1) * part), at<char>(qkv[l & 1]), at<char>(qkv[~l & 1]));
      });
    }
  }

 private:
  // Layer l but its q, k and v, which are in qkv; and those of the next layer, to next. -1: of the first layer alone.
  void layer(Block& block, int64_t l, int64_t first, int64_t last, char* qkv, char* next) const {
    const int64_t h = one_.columns();
    if (l >= 0)
      for_each_sequence(p_, sequences_, first, last, block.buffers().attended,
                        [&](const Sequence& s, int64_t begin, int64_t end, void* out) {
                          attention_rows_here(attention_of(p_, p_.layers[l], {qkv, p_.attention, h}, s, {begin, end},
                                                           {0, p_.heads}, out));
                        });
    for (int64_t r = first; r < last; r += kBlockRows) {
      const int64_t count = std::min(kBlockRows, last - r);
      if (l >= 0) {
        Buffers b = block.buffers();
        b.attended = static_cast<char*>(b.attended) + (r - first) * h * size_of(p_.attention);
        block.take(layers_[l]);
        one_.rest(p_.layers[l], block, input(l, r, count), b, out(r));
      }
      if (l + 1 == std::ssize(layers_)) continue;
      block.take(layers_[l + 1]);
      one_.qkv(p_.layers[l + 1], block, input(l + 1, r, count), r, block.buffers().normed,
               next + r * 3 * h * size_of(p_.attention));
    }
  }

  char* out(int64_t row) const { return static_cast<char*>(p_.out) + row * one_.columns() * size_of(p_.x.dtype); }

  Matrix input(int64_t l, int64_t row, int64_t count) const {
    if (l > 0) return {out(row), p_.x.dtype, count, one_.columns(), one_.columns()};
    Matrix x = p_.x;
    x.data = static_cast<const char*>(x.data) + row * x.stride * size_of(x.dtype), x.rows = count;
    return x;
  }

  const EncoderLayerParams& p_;
  const Formula one_;
  const Int8Kernel& kernel_;
  const std::vector<Sequence> sequences_;
  std::vector<BlockLayer> layers_;
};

// The most rows whose products threads share: more are faster by blocks, but for packing where no one keeps it.
int64_t most_shared_rows(const EncoderLayerParams& p, const Int8Kernel& kernel) {
  const auto& packed = p.layers[0].out.packed;
  return kernel.keeps_packed || (packed && packed->numel()) ? kernel.few_rows : kernel.few_rows_unpacked;
}

// Whether there are enough rows for every thread to take blocks of them.
bool goes_by_blocks(const EncoderLayerParams& p) {
  const int64_t threads = torch::stable::get_num_threads(), blocks = (p.x.rows + kBlockRows - 1) / kBlockRows;
  return threads == 1 || blocks >= 2 * threads;
}

}  // namespace

void encoder_layer_cpu(const EncoderLayerParams& p, const Tensor& x) {
  if (p.x.rows == 0) return;
  const Int8Kernel* kernel = int8_kernel(tier());
  if (!kernel || !has_attention_rows(p.attention, p.x.columns / p.heads)) return SharedSteps(p, x, nullptr).run();
  if (p.x.rows <= most_shared_rows(p, *kernel)) return SharedSteps(p, x, kernel).run();
  if (goes_by_blocks(p)) return Blocks(p, *kernel).run();
  SharedSteps(p, x, nullptr).run();
}

}  // namespace forwardpass
