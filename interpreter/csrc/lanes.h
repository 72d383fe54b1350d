#pragma once
// The loop over lanes: whole warps vectorise, the rest goes lane by lane.
#include "machine.h"

namespace gpuless {

template <class F>
inline void each_lane(Mask mask, F f) {
  if (mask == kAllLanes) {
#pragma GCC ivdep
    for (int lane = 0; lane < kLanes; ++lane) f(lane);
  } else {
    for (Mask rest = mask; rest; rest &= rest - 1) f(__builtin_ctz(rest));
  }
}

// d[k] = f(k), for an f that is large: it is compiled once, as parts of a warp compute every lane and keep their own. A
// lane has `each` values in a row, kMost at most.
template <int kMost = 1, class D, class F>
inline void keep_lanes(Mask mask, D* d, F f, int each = kMost) {
  alignas(32) D every[kMost * kLanes];
  D* const to = mask == kAllLanes ? d : every;
  for (int done = 0; done < each * kLanes; done += kLanes) {
#pragma GCC ivdep
    for (int k = done; k < done + kLanes; ++k) to[k] = f(k);
  }
  if (to == d) return;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int first = each * __builtin_ctz(rest);
    for (int k = first; k < first + each; ++k) d[k] = every[k];
  }
}

// d = f(a, b, ...) by lane, on registers of the C++ types D and S; operand 0 is the destination.
template <class D, class S, class F>
inline Step map(Warp& w, const Instruction& i, Mask mask, F f) {
  D* d = w.operand<D>(i, 0);
  const S* a = w.operand<S>(i, 1);
  each_lane(mask, [&](int l) { d[l] = f(a[l]); });
  return Step::next;
}
template <class D, class S, class F>
inline Step map2(Warp& w, const Instruction& i, Mask mask, F f) {
  D* d = w.operand<D>(i, 0);
  const S *a = w.operand<S>(i, 1), *b = w.operand<S>(i, 2);
  each_lane(mask, [&](int l) { d[l] = f(a[l], b[l]); });
  return Step::next;
}
template <class D, class S, class F>
inline Step map3(Warp& w, const Instruction& i, Mask mask, F f) {
  D* d = w.operand<D>(i, 0);
  const S *a = w.operand<S>(i, 1), *b = w.operand<S>(i, 2), *c = w.operand<S>(i, 3);
  each_lane(mask, [&](int l) { d[l] = f(a[l], b[l], c[l]); });
  return Step::next;
}

}  // namespace gpuless
