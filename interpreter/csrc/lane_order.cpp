#include "lane_order.h"

namespace gpuless {

void LaneOrder::divide() {
  if (divided_) return;
  if (!known_) known_ = std::make_unique<Known>();
  for (auto& row : *known_) row.fill(floor_);
  divided_ = true;
}

void LaneOrder::meet(Mask lanes, Mask live, Clock now) {
  if (!(live & ~lanes)) return begin(now);
  divide();
  std::array<Clock, kLanes> all{};
  for (Mask rest = lanes; rest; rest &= rest - 1) {
    const auto& row = (*known_)[__builtin_ctz(rest)];
    for (int k = 0; k < kLanes; ++k) all[k] = std::max(all[k], row[k]);
  }
  for (Mask rest = lanes; rest; rest &= rest - 1) all[__builtin_ctz(rest)] = now;
  for (Mask rest = lanes; rest; rest &= rest - 1) (*known_)[__builtin_ctz(rest)] = all;
}

void LaneOrder::learn(Mask lanes, Mask live, Clock clock) {
  if (clock <= floor_) return;
  if (!(live & ~lanes)) {
    floor_ = clock;
    return;
  }
  divide();
  for (Mask rest = lanes; rest; rest &= rest - 1)
    for (Clock& c : (*known_)[__builtin_ctz(rest)]) c = std::max(c, clock);
}

Mask LaneOrder::unknown(int lane, Mask others, Clock clock) const {
  if (clock <= floor_) return 0;
  if (!divided_) return others;
  for (Mask rest = others; rest; rest &= rest - 1) {
    const int other = __builtin_ctz(rest);
    if (clock <= (*known_)[lane][other]) others &= ~(Mask{1} << other);
  }
  return others;
}

LaneOrder::Clash LaneOrder::clash(LaneSet before, Clock clock, LaneSet now, int shift, bool write) const {
  Clash clash;
  const int before_shift = before.part_shift(shift), now_shift = now.part_shift(shift);
  const int step = std::min(before_shift, now_shift);
  for (uint32_t byte = 0; byte < 1u << shift; byte += 1u << step) {
    const Mask before_lanes = before.part(before_shift, byte, step).lanes,
               now_lanes = now.part(now_shift, byte, step).lanes;
    for (Mask rest = now_lanes; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      const Mask self = Mask{1} << lane;
      const Mask unordered = write && (before_lanes & self) ? 0 : unknown(lane, before_lanes & ~self, clock);
      if (!unordered) continue;
      if (clash.lane < 0) clash = {lane, __builtin_ctz(unordered), 0};
      clash.bytes |= ((1u << (1u << step)) - 1) << byte;
      break;
    }
  }
  return clash;
}

}  // namespace gpuless
