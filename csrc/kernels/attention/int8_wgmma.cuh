#pragma once
// attention_8bit on wgmma: attention's kernel of wgmma.cuh, of q and k in int8, and v in int8 or e4m3.
//
// Probabilities are whole 255ths of the largest of 64 keys, a unit, so that each unit's p v has a sum of its own, which
// is added to the output in fp32. A score, of one row and one key, at head dim 128, of which a thread has 64 in a block
// of 128 keys:
//
//   instructions                                                                        a score
//   q k^T to float (I2FP)                                                                 1
//   the maximum of three sums (VIMNMX3); less the maximum, times the keys' scale (FFMA), 2^x, the sum   3.5
//   to bytes: F2FP of two, PRMT of four                                                   0.75
//   the sum of the bytes, IDP of four                                                     0.25
//   p v: one FFMA for each of 64 columns, of 32 keys                                      2
//   all else: descriptors and pipelines 1, factors and weights of rows and groups 1.8, IGMMA 0.2   3
//   in the main loop                                                                     10.5
//
//   clocks of a multiprocessor's subpartition for 32 scores: tensor cores 8, special functions 8, ALU 5.5, issue 10.5
//   bytes of shared memory: q k^T 96 a clock of the 128, p v 64; 16 KB of k, of v and of q; 4 stages and 2 of q: 165 KB
//   registers of 240: scores 64, output 64, a step's sums 32, p 16, all else 64
//
// So issue binds, and 8 a score is out of reach: what units of 64 keys cost is 2 for p v, where 128 would take 1. In
// e4m3 it is 9.9: four probabilities are packed by two F2FP, and their bytes are not added up. q k^T in e4m3 would need
// no I2FP, at three times the error.
// What was tried to come nearer is in csrc/README.md.
//
// - **No sum is converted by the pipe of the exponentials.** q k^T goes through I2FP, which has a fixed latency as the
//   ALU's instructions have. To begin with the bits of 1.5 * 2^23, as on mma.sync, takes a MOV a score and an offset
//   for each key. p v has a float's bits as it is: both operands are unsigned, v as v + 128, and a sum below 2^22 is a
//   denormal float, 2^-149 times it, that an FFMA scales by the unit's weight and adds to the output. What 128 adds is
//   the sum of p, 128 times, which is taken off at the end.
// - **p is rounded where it is packed.** 2^x is in units of 2^-24, so that of fp16 it is a denormal, whose bits are the
//   whole number: F2FP rounds two at once.
// - **p v is four steps** of a unit and 64 columns: all 128 columns at a time spill 100 bytes. A step ends before a
//   part of the softmax, and the next one begins.
// - **Consumers take turns at the exponentials**, which take twice as long as the wgmmas of a block.
// - **Tried**, modelled, 8 heads of 2048 rows and 4096 keys, which take 41.8 us: no turns 44.3; blocks of 64 keys 45.6,
//   there without turns 53.7 and in turns at the wgmmas 55.5; q in registers 42.4, and 36 bytes spilled; exponentials
//   between which the next unit's scores are made and the last one's packed 45.5; q k^T a unit ahead 53.3; three
//   consumers 43.6 for as many rows.
#include "kernels/attention/int8_wgmma_products.cuh"
#include "kernels/attention/wgmma.cuh"

namespace forwardpass {

// Two units a block share what a block costs. With score modifiers, and at 256 columns, the registers hold one.
constexpr WgmmaAttentionTile int8_wgmma_tile_of(AttentionInstance i) {
  return {.consumers = 2, .n = i.modified || i.head_dim > 128 ? kInt8Keys : 2 * kInt8Keys};
}

template <AttentionInstance kInstance, WgmmaAttentionTile kTile>
struct Int8WgmmaAttentionConfig {
  static constexpr int kHeadDim = kInstance.head_dim, kValueDim = kInstance.value_dim;
  static constexpr bool kModified = kInstance.modified;
  using Values = ValueArithmetic<kInstance.dtype>;
  static constexpr int kConsumers = kTile.consumers, kM = ptx::kWgmmaRows * kConsumers, kN = kTile.n, kStages = 4;
  static constexpr int kBlocksPerSm = 1, kThreads = ptx::kWarpgroup * (1 + kConsumers);
  static constexpr int kRowBytes = kHeadDim < 128 ? kHeadDim : 128, kPanelsD = kHeadDim / kRowBytes;
  static constexpr int kPart = kModified && kHeadDim == 256 ? 32 : 64;  // columns of p v at a time
  static constexpr int kQStages = 2;
  static constexpr bool kAhead = false, kSplits = false;
  static constexpr PingPong kPingPong = PingPong::exponentials;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

  using Arguments = Int8WgmmaArguments;
  using Schedule = WgmmaAttentionSchedule<Int8WgmmaAttentionConfig>;
  using Pipeline = forwardpass::Pipeline<kStages>;
  using QPipeline = forwardpass::Pipeline<kQStages>;
  using Source = Int8Boxes<Int8WgmmaAttentionConfig>;
  using Scores = Fragments<float, 1, kN / 8>;
  using Output = Fragments<float, 1, kValueDim / 8>;
  using Products = Int8Products<Int8WgmmaAttentionConfig>;
  using Consumer = WgmmaAttentionConsumer<Int8WgmmaAttentionConfig>;
  using Epilogue = Int8WgmmaEpilogue<Int8WgmmaAttentionConfig>;

  struct Key {
    uint8_t panel[kPanelsD][kN][kRowBytes];
  };
  struct Value {
    uint8_t row[kN / kInt8Keys * kValueDim][kInt8Keys];
  };
  struct Query {
    uint8_t panel[kPanelsD][kM][kRowBytes];
    alignas(1024) float scale[kM];
    alignas(128) float shift[kM];
  };
  struct Scales {  // of 64 keys, and of their v
    alignas(128) float value[kModified ? kInt8GroupScales : kInt8Scales];
  };
  struct SharedStorage {
    Query q[kQStages];
    Key k[kStages];
    Value v[kStages];
    Scales scales[kStages][kN / kInt8Keys];
    WgmmaAttentionWork work[kQStages];
    int known;
    typename Source::Shared source;
    PipelineBarriers<kQStages> q_barriers;
    PipelineBarriers<kStages> k_barriers, v_barriers;
  };
  // That arrive with q, and with a block's k.
  static constexpr int kQueryBytes = sizeof(Query::panel) + 2 * sizeof(Query::scale);
  static constexpr int kKeyBytes = sizeof(Key) + kN / kInt8Keys * sizeof(Scales::value);
};

template <class Config>
int launch_int8_wgmma(const AttentionParams& base, void* cuda_stream) {
  const auto& p = static_cast<const Attention8bitParams&>(base);
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  Int8WgmmaArguments a{.p = p, .x = int8_operands<Config>(p)};
  if (auto e = quantize_attention(p, a.x, stream)) return e;
  return launch_tiles<Config>(a, stream);
}

// No split-KV: a row's bits depend on nothing but its sequence.
template <AttentionInstance kInstance>
AttentionChoice choose_int8_wgmma(const AttentionParams& p) {
  using Config = Int8WgmmaAttentionConfig<kInstance, int8_wgmma_tile_of(kInstance)>;
  return {.launch = launch_int8_wgmma<Config>, .splits = 1, .workspace_bytes = int8_operands<Config>(p).bytes};
}
template <AttentionInstance kInstance>
constexpr AttentionKernel int8_wgmma_attention{.arch = sm_90a,
                                               .instance = kInstance,
                                               .reads = [](const AttentionParams&) { return true; },
                                               .choose = choose_int8_wgmma<kInstance>};

}  // namespace forwardpass
