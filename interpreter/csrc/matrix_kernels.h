// The kernels of matrix.cpp, which includes this once for each vector width, inside a namespace that defines
//   kLanesOfVector, Floats, Integers (vectors of as many 32-bit elements) and load, store, fma, from_half, splat<c>,
//   broadcast, dot, spread_columns, kIntegerPlanes, integer_plane.
// No include guard and no includes, on purpose.

constexpr int W = kLanesOfVector, kVectors = 32 / W;  // of a register of the warp
constexpr uint32_t kSignBit = 0x80000000;

constexpr int planes_of(Element e) {
  return e == Element::tf32                         ? 1
         : e == Element::f16 || e == Element::bf16  ? 2
         : e == Element::e4m3 || e == Element::e5m2 ? 4
                                                    : kIntegerPlanes;
}

// Element p of every dword.
template <Element E, int p>
inline Integers plane(Integers x) {
  if constexpr (E == Element::tf32) {
    return x & static_cast<int32_t>(0xffffe000);  // what tensor cores see of it
  } else if constexpr (E == Element::f16) {
    return (Integers)from_half(p ? shift_right<16>(x) : x & 0xffff);
  } else if constexpr (E == Element::bf16) {
    return p ? x & static_cast<int32_t>(0xffff0000) : x << 16;
  } else if constexpr (E == Element::e5m2) {  // the upper half of an f16
    return (Integers)from_half((p < 1 ? x << 8 : shift_right<8 * p - 8>(x)) & 0xff00);
  } else {  // e4m3: shifted it is an f16 but for the bias of its exponent, and NaN is a number there
    const Integers byte = shift_right<8 * p>(x) & 0xff, magnitude = byte & 0x7f;
    const Floats value = from_half(((byte & 0x80) << 8) | (magnitude << 7)) * 256.0f;
    return (magnitude == 0x7f) ? Integers{} + 0x7fffffff : (Integers)value;
  }
}

template <Element E, int p = 0, class F>
inline void each_plane(F f) {
  if constexpr (p < planes_of(E)) {
    f(std::integral_constant<int, p>{});
    each_plane<E, p + 1>(f);
  }
}

inline void store_splats(Integers x, uint32_t* to, int stride) {
  store(to, splat<0>(x));
  store(to + stride, splat<1>(x));
  store(to + 2 * stride, splat<2>(x));
  store(to + 3 * stride, splat<3>(x));
}

template <Element E>
void expand_a(Fragment const* fragments, int halves, bool negate, PanelA& panel) {
  constexpr int P = planes_of(E);
  const int32_t flip = negate ? static_cast<int32_t>(kSignBit) : 0;
  for (int h = 0; h < halves; ++h) {
    for (int r = 0; r < 2; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const Integers x = load(fragments[h * 2 + r] + v * W);
        each_plane<E>(
            [&](auto p) { store_splats(plane<E, p>(x) ^ flip, &panel.words[h * 4 * P + p][r * 32 + v * W], P * 64); });
      }
    }
  }
}

template <Element E>
void expand_b(Fragment const* fragments, int halves, int tiles, PanelB& panel) {
  constexpr int P = planes_of(E);
  const int steps = halves * 4 * P;
  for (int t = 0; t < tiles; ++t) {
    for (int h = 0; h < halves; ++h) {
      Integers x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = load(fragments[t * halves + h] + v * W);
      each_plane<E>([&](auto p) {
        Integers y[kVectors];
        for (int v = 0; v < kVectors; ++v) y[v] = plane<E, p>(x[v]);
        spread_columns(y, &panel.words[(t * steps + h * 4 * P + p) * 8], P * 8);
      });
    }
  }
}

// 8-bit integers: A becomes the unsigned operand of dot and B the signed one. For that, 128 is added to a signed A and
// subtracted from an unsigned B. The effect on the sum is known in advance:
//   sum a b = sum (u - 128 [a signed]) (s + 128 [b unsigned])
// so the panels carry it as a bias by row and by column. No offset, no bias, where dot takes 16-bit products.
void expand_integer_a(Fragment const* fragments, int halves, bool a_signed, bool b_signed, PanelA& panel) {
  constexpr int P = kIntegerPlanes;
  for (int r = 0; r < 2; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      Integers sum{};
      for (int h = 0; h < halves; ++h) {
        const Integers x = load(fragments[h * 2 + r] + v * W);
        for (int p = 0; p < P; ++p) {
          const Integers y = integer_plane<true>(x, p, a_signed);
          uint32_t* to = &panel.words[h * 4 * P + p][r * 32 + v * W];
          store_splats(y, to, P * 64);
          if (kOffset && !b_signed) {  // by row: 128 sum u, and once more what both offsets have in common
            for (int c = 0; c < 4; ++c) sum = dot(sum, load(to + c * P * 64), Integers{} + 0x01010101);
          }
        }
      }
      const int32_t common = kOffset && a_signed && !b_signed ? 128 * 128 * 16 * halves : 0;
      store(reinterpret_cast<uint32_t*>(&panel.bias[r * 32 + v * W]), sum * 128 - common);
    }
  }
}

void expand_integer_b(Fragment const* fragments, int halves, int tiles, bool a_signed, bool b_signed, PanelB& panel) {
  constexpr int P = kIntegerPlanes;
  const int steps = halves * 4 * P;
  for (int t = 0; t < tiles; ++t) {
    for (int h = 0; h < halves; ++h) {
      for (int p = 0; p < P; ++p) {
        Integers y[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          y[v] = integer_plane<false>(load(fragments[t * halves + h] + v * W), p, b_signed);
        }
        spread_columns(y, &panel.words[(t * steps + h * 4 * P + p) * 8], P * 8);
      }
    }
    Eight sum{};
    if (kOffset && a_signed) {  // by column: -128 sum s; 0x80 is the unsigned 128
      for (int s = 0; s < steps; ++s) sum = dot_eight(sum, &panel.words[(t * steps + s) * 8]);
    }
    store_eight(panel.bias[t], -sum);
  }
}

struct FloatStep {
  static Floats start(Floats c, Integers, Integers) { return c; }
  static Floats step(Floats sum, Integers a, Integers b) { return fma((Floats)a, (Floats)b, sum); }
  using Sum = Floats;
};
struct IntegerStep {
  static Integers start(Integers c, Integers row, Integers column) { return c + row + column; }
  static Integers step(Integers sum, Integers a, Integers b) { return dot(sum, a, b); }
  using Sum = Integers;
};

// T tiles by R x 8 rows at a time, as many sums as the register file holds.
template <class S, int T, int R>
inline void block(const PanelA& a, int row_block, const uint32_t* b, const int32_t (*b_bias)[8], int steps,
                  uint32_t* acc) {
  constexpr int V = R * kVectors;  // vectors of A in a step
  typename S::Sum sum[T][2][V];
  const uint32_t* pa = &a.words[0][row_block * 32];
  const auto accumulators = [&](int t, int odd, int v) {
    return acc + ((t * 4 + (row_block + v / kVectors) * 2 + odd) * 32 + v % kVectors * W);
  };
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sum[t][odd][v] = S::start((typename S::Sum)load(accumulators(t, odd, v)),
                                  load(reinterpret_cast<const uint32_t*>(a.bias) + row_block * 32 + v * W),
                                  broadcast(reinterpret_cast<const uint32_t*>(b_bias[t]) + odd * 4));
      }
    }
  }
  for (int s = 0; s < steps; ++s) {
    Integers va[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) va[v] = load(pa + s * 64 + v * W);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int odd = 0; odd < 2; ++odd) {
        const Integers vb = broadcast(b + (t * steps + s) * 8 + odd * 4);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[t][odd][v] = S::step(sum[t][odd][v], va[v], vb);
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store(accumulators(t, odd, v), (Integers)sum[t][odd][v]);
    }
  }
}

template <class S>
void multiply(const PanelA& a, const PanelB& b, int steps, int tiles, uint32_t* acc) {
  constexpr int R = W == 16 ? 2 : 1;
  int t = 0;
  if constexpr (W == 16) {  // 32 vector registers hold two tiles
    for (; t + 2 <= tiles; t += 2) block<S, 2, R>(a, 0, b.words + t * steps * 8, b.bias + t, steps, acc + t * 128);
  }
  for (; t < tiles; ++t) {
    for (int r = 0; r < 2; r += R) block<S, 1, R>(a, r, b.words + t * steps * 8, b.bias + t, steps, acc + t * 128);
  }
}

template <int c = 0, class F>
inline void each_dword(F f) {
  if constexpr (c < 4) {
    f(std::integral_constant<int, c>{});
    each_dword<c + 1>(f);
  }
}

// One tile, A straight from its fragments: a panel is worth its making only where several tiles share it. The registers
// `to` may be any of the others, so that nothing is stored before everything has been read.
template <Element E>
void multiply_tile(Fragment const* fragments, const PanelB& b, int halves, Fragment const* from, uint32_t* const* to) {
  constexpr int P = planes_of(E), R = W == 16 ? 2 : 1, V = R * kVectors;
  Floats sums[2 / R][2][V];
#pragma GCC unroll 2
  for (int block = 0; block < 2 / R; ++block) {
    const int row_block = block * R;
    Floats(&sum)[2][V] = sums[block];
#pragma GCC unroll 8
    for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sum[odd][v] = (Floats)load(from[(row_block + v / kVectors) * 2 + odd] + v % kVectors * W);
      }
    }
    const uint32_t* step = b.words;
    for (int h = 0; h < halves; ++h) {
      Integers planes[P][V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Integers x = load(fragments[h * 2 + row_block + v / kVectors] + v % kVectors * W);
        each_plane<E>([&](auto p) { planes[p.value][v] = plane<E, p.value>(x); });
      }
      each_dword([&](auto c) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p, step += 8) {
          const Floats even = (Floats)broadcast(step), odd = (Floats)broadcast(step + 4);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            const auto x = (Floats)splat<c.value>(planes[p][v]);
            sum[0][v] = fma(x, even, sum[0][v]);
            sum[1][v] = fma(x, odd, sum[1][v]);
          }
        }
      });
    }
  }
#pragma GCC unroll 2
  for (int block = 0; block < 2 / R; ++block) {
#pragma GCC unroll 8
    for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        store(to[(block * R + v / kVectors) * 2 + odd] + v % kVectors * W, (Integers)sums[block][odd][v]);
      }
    }
  }
}

// f16x2 registers [tile][rows 0-7, 8-15] to and from fp32 ones [tile][rows][even, odd columns].
void unpack_halves(const uint32_t* packed, int registers, uint32_t* wide) {
  for (int r = 0; r < registers; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const Integers x = load(packed + r * 32 + v * W);
      store(wide + r * 64 + v * W, plane<Element::f16, 0>(x));
      store(wide + r * 64 + 32 + v * W, plane<Element::f16, 1>(x));
    }
  }
}
void pack_halves(const uint32_t* wide, int registers, uint32_t* packed) {
  for (int r = 0; r < registers; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const Integers even = to_half((Floats)load(wide + r * 64 + v * W));
      const Integers odd = to_half((Floats)load(wide + r * 64 + 32 + v * W));
      store(packed + r * 32 + v * W, even | odd << 16);
    }
  }
}

constexpr Kernels kernels = {
    {expand_a<Element::f16>, expand_a<Element::bf16>, expand_a<Element::tf32>, expand_a<Element::e4m3>,
     expand_a<Element::e5m2>},
    {expand_b<Element::f16>, expand_b<Element::bf16>, expand_b<Element::tf32>, expand_b<Element::e4m3>,
     expand_b<Element::e5m2>},
    expand_integer_a,
    expand_integer_b,
    {multiply_tile<Element::f16>, multiply_tile<Element::bf16>, multiply_tile<Element::tf32>,
     multiply_tile<Element::e4m3>, multiply_tile<Element::e5m2>},
    multiply<FloatStep>,
    multiply<IntegerStep>,
    unpack_halves,
    pack_halves,
    kIntegerPlanes,
};
