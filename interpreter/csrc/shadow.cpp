#include "shadow.h"

#include <immintrin.h>

#include <algorithm>

#include "machine.h"
#include "mbarrier.h"
#include "tensor_memory.h"

namespace gpuless {
namespace {

uint16_t bytes_between(uint32_t low, uint32_t high) {
  return static_cast<uint16_t>((0xffffu << low) & (0xffffu >> (kGranule - high)));
}

}  // namespace

void Shadow::reset(const Cta& cta, size_t bytes, Space space) {
  cta_ = &cta;
  space_ = space;
  first_ = cta.first_agent;
  warps_ = static_cast<int>(cta.threads() + kLanes - 1) / kLanes;
  columns_ = round_up(warps_);
  cells_.shape(columns_);
  others_used_ = 0;
  doubts_.clear();
  granules_.assign((bytes + kGranule - 1) / kGranule, Granule());
  used_ = static_cast<uint32_t>(granules_.size());
  make_room();
}

// The former content of the vectors may end up in any cell: all its clocks are in the past and have no effect.
void Shadow::make_room() {
  if (cells_.size() < used_) cells_.resize(used_ + (used_ - granules_.size()) / 2);
  for (int k = 0; k < others_used_; ++k)
    if (others_[k].reads.size() < cells_.size() * 8) others_[k].reads.resize(cells_.size() * 8);
}

void Shadow::forget() {
  cells_.forget();
  others_.clear();
}

// Gives the granule cells of 1 << shift bytes in place of larger ones, each with what its larger one knew.
void Shadow::split(uint32_t number, int shift) {
  Granule& g = granules_[number];
  const int count = 1 << (4 - shift);
  const uint32_t from = g.shift == 4 ? number : g.split;
  if (g.room > shift) {
    g.split = used_;
    g.room = static_cast<uint8_t>(shift);
    used_ += count;
    make_room();
  }
  for (int k = count - 1; k >= 0; --k) {  // backwards: from and split may be one place
    const uint32_t source = from + (k >> (g.shift - shift)), target = g.split + k;
    if (source == target) continue;
    cells_[target] = cells_[source];
    std::copy_n(cells_.reads(source), columns_, cells_.reads(target));
    for (int n = 0; n < others_used_ && cells_[source].others == Cell::Readers::rows; ++n) {
      std::copy_n(others_[n].row(source), 8, others_[n].row(target));
    }
  }
  for (int k = 0; k < count; ++k) {  // of the lanes those that touched this part
    Cell& cell = cells_[g.split + k];
    const uint32_t offset = (k << shift) & ((1u << g.shift) - 1);
    cell.set_writers(cell.writers().part(cell.writers().part_shift(g.shift), offset, shift));
    cell.set_readers(cell.readers().part(cell.readers().part_shift(g.shift), offset, shift));
  }
  g.shift = static_cast<uint8_t>(shift);
}

// f(granule, its bytes, first cell, cells) for each granule of the range, split so that the cells are those bytes.
template <class F>
inline void Shadow::each_granule(uint32_t begin, uint32_t bytes, F f) {
  const uint32_t end = begin + bytes;
  for (uint32_t number = begin / kGranule, start = number * kGranule; start < end; ++number, start += kGranule) {
    const uint32_t low = begin > start ? begin - start : 0, high = std::min(end - start, kGranule);
    Granule& g = granules_[number];
    if (high - low == kGranule && g.shift == 4) {  // the rule
      f(g, number, 0xffff, number, 1);
      continue;
    }
    const int shift = __builtin_ctz(low | high | kGranule);
    if (g.shift > shift) split(number, shift);
    const uint32_t first = g.shift == 4 ? number : g.split + (low >> g.shift);
    f(g, number, bytes_between(low, high), first, (high - low) >> g.shift);
  }
}

// What runs for every granule is inlined into the loops over them, whatever the compiler thinks of their size.
#define EVERY_GRANULE [[gnu::always_inline]] inline

// Eight clocks at a time, by hand: gcc 12 vectorises loops over blocks the wrong way round, at four times the cost.
EVERY_GRANULE bool Shadow::reads_known(uint32_t index, const Clock* seen) const {
  const auto late = [](const Clock* read, const Clock* known) {
    const __m256i r = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(read));
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(known));
    return _mm256_xor_si256(_mm256_max_epu32(r, k), k);
  };
  const Clock *row = cells_.reads(index), *warps = seen + first_;
  __m256i any = late(row, warps);
  for (int block = 8; block < columns_; block += 8) any = _mm256_or_si256(any, late(row + block, warps + block));
  const Cell& cell = cells_[index];
  if (cell.others == Cell::Readers::one && cell.read_since > seen[cell.reader]) return false;
  if (__builtin_expect(cell.others == Cell::Readers::rows, 0)) {
    for (int k = 0; k < others_used_; ++k)
      any = _mm256_or_si256(any, late(others_[k].row(index), seen + others_[k].first));
  }
  return _mm256_testz_si256(any, any);
}

int Shadow::find(int agent) const {
  int k = 0;
  while (k < others_used_ && others_[k].first != agent / 8 * 8) ++k;
  return k;
}

int Shadow::find_or_add(int agent) {
  const int k = find(agent);
  if (k < others_used_) return k;
  if (others_.size() == static_cast<size_t>(k)) others_.emplace_back();
  others_[k].first = agent / 8 * 8;
  ++others_used_;
  make_room();
  return k;
}

void Shadow::make_rows(uint32_t index) {
  Cell& cell = cells_[index];
  const bool one = cell.others == Cell::Readers::one;
  const int k = one ? find_or_add(cell.reader) : 0;
  for (int n = 0; n < others_used_; ++n) std::fill_n(others_[n].row(index), 8, 0);
  if (one) others_[k].row(index)[cell.reader % 8] = cell.read_since;
  cell.others = Cell::Readers::rows;
}

Clock& Shadow::other_read(uint32_t index, int agent) {
  const int k = find_or_add(agent);
  if (cells_[index].others != Cell::Readers::rows) make_rows(index);
  return others_[k].row(index)[agent % 8];
}

inline Shadow::Access Shadow::access_of(const Actor& actor, bool strong) const {
  Cell cell;
  cell.clock = actor.now;
  cell.writer = actor.agent;
  cell.write_line = actor.line;
  constexpr uint8_t kByProxy[] = {0, Cell::kCopied, Cell::kAsync};
  cell.manner = (strong ? Cell::kStrong : 0) | kByProxy[static_cast<int>(actor.proxy)];
  static_assert(sizeof cell == sizeof(__m256i));
  const int column = is_local(actor.agent) ? actor.agent - first_ : -1;
  const Knowledge* const k = actor.knowledge;  // none of what completes: it does not ask
  return {k ? k->seen.clocks : nullptr,
          k ? k->proxied.clocks : nullptr,
          actor.now,
          actor.lanes.floor,
          actor.line,
          actor.agent,
          column,
          actor.lanes.agent,
          actor.proxy,
          _mm256_load_si256(reinterpret_cast<const __m256i*>(&cell))};
}

template <Use use>
EVERY_GRANULE bool Shadow::in_order(const Access& a, uint32_t index) const {
  const Cell& cell = cells_[index];
  const bool both_strong = is_strong(use) && cell.strong();
  if (__builtin_expect(cell.clock > a.seen[cell.writer], 0) && !both_strong) return false;
  if (a.proxy == Proxy::async && !cell.async() && cell.clock > a.proxied[cell.writer]) return false;
  if (__builtin_expect(cell.clock > a.floor, 0) && cell.writer == a.warp && !both_strong) return false;
  if constexpr (is_write(use)) {
    if (__builtin_expect(cell.read_since > a.floor, 0) && cell.reader == a.warp) return false;
    if (__builtin_expect(!reads_known(index, a.seen), 0)) return false;
  }
  return true;
}

template <Use use>
EVERY_GRANULE void Shadow::check(const Access& a, const Actor& actor, uint32_t index, uint32_t number, uint16_t mask,
                                 LaneSet lanes) {
  if (__builtin_expect(!in_order<use>(a, index), 0)) look_closely<use>(actor, index, number, mask, lanes);
}

// Reports what is wrong, if anything is.
template <Use use>
[[gnu::noinline]] void Shadow::look_closely(const Actor& actor, uint32_t index, uint32_t number, uint16_t mask,
                                            LaneSet lanes) {
  const Cell& cell = cells_[index];
  const Knowledge& k = *actor.knowledge;
  const bool both_strong = is_strong(use) && cell.strong();
  const bool write_seen = cell.clock <= k.seen.clocks[cell.writer] || both_strong;
  const bool fenced = actor.proxy != Proxy::async || cell.async() || cell.clock <= k.proxied.clocks[cell.writer];
  if (!(write_seen && fenced)) check_write(actor, index, number, mask, use, write_seen);
  if (is_write(use) && !reads_known(index, k.seen.clocks)) check_reads(actor, index, number, mask, use);
  if (cell.clock > actor.lanes.floor && cell.writer == actor.lanes.agent && !both_strong) {
    check_lanes(actor, index, number, use, lanes, true);
  }
  if (is_write(use) && cell.read_since > actor.lanes.floor && cell.reader == actor.lanes.agent) {
    check_lanes(actor, index, number, use, lanes, false);
  }
}

EVERY_GRANULE bool Shadow::reads_again(const Access& a, const Cell& cell) {
  return (cell.read_since > a.floor) & (cell.reader == a.agent);
}

EVERY_GRANULE bool Shadow::fits(const Cell& cell, LaneSet lanes) {
  return !(lanes.spread || cell.readers_spread) || cell.readers() == lanes;
}

EVERY_GRANULE void Shadow::record_read(const Access& a, uint32_t index, LaneSet lanes) {
  using Readers = Cell::Readers;
  Cell& cell = cells_[index];
  const bool again = reads_again(a, cell);
  if (a.column >= 0) {
    cells_.reads(index)[a.column] = a.now;
    if (__builtin_expect(cell.others == Readers::one, 0)) make_rows(index);
  } else if (cell.others == Readers::none) {
    cell.others = Readers::one;
  } else if (cell.others == Readers::rows || cell.reader != a.agent || (again && cell.read_since != a.now)) {
    other_read(index, a.agent) = a.now;
  }
  cell.read_line = a.line;
  if (__builtin_expect(again, 0)) {
    cell.read_lanes |= lanes.lanes;  // spread or not, both are: fits()
    return;
  }
  cell.reader = a.agent;
  cell.read_since = a.now;
  cell.set_readers(lanes);
}

EVERY_GRANULE void Shadow::record_write(const Access& a, uint32_t index, LaneSet lanes) {
  Cell& cell = cells_[index];
  if (__builtin_expect(cell.clock == a.now, 0)) {
    const bool one = cell.writer == a.agent && cell.write_line == a.line;  // instruction
    if (one && !lanes.spread && !cell.writers_spread) lanes.lanes |= cell.write_lanes;
  }
  _mm256_store_si256(reinterpret_cast<__m256i*>(&cell), a.written);
  cell.set_writers(lanes);
  const auto clear = [](Clock* clocks) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(clocks), _mm256_setzero_si256());
  };
  Clock* row = cells_.reads(index);
  clear(row);
  for (int block = 8; block < columns_; block += 8) clear(row + block);
}

template <Use use>
void Shadow::touch_parts(const Actor& actor, uint32_t begin, uint32_t bytes) {
  const Access a = access_of(actor, is_strong(use));
  each_granule(begin, bytes, [&](Granule& g, uint32_t number, uint16_t mask, uint32_t first, uint32_t count) {
    // An exchange and the like read what was there, so an atomic counts as a read here.
    const bool unwritten = is_read(use) && (mask & ~g.written);
    if (__builtin_expect(unwritten || (mask & g.flying) || g.mbarriers, 0)) check_state(actor, g, number, mask, use);
    if constexpr (use == Use::load) loaded_unwritten_ |= unwritten;
    const auto lanes = [&](uint32_t c) { return actor.lanes.of(address_of(c, number), g.shift); };
    for (uint32_t c = first; c < first + count; ++c) check<use>(a, actor, c, number, mask, lanes(c));
    if constexpr (is_write(use)) {
      g.written |= mask;
      if (g.mbarriers) end_mbarriers(g, number, mask);
      if (mask == 0xffff && g.shift != 4) {  // one writer of the whole: no need for parts any more
        g.shift = 4;
        first = number;
        count = 1;
      }
      for (uint32_t c = first; c < first + count; ++c) record_write(a, c, lanes(c));
    } else if (use != Use::strong_read) {  // which no strong write need be ordered after
      int finest = g.shift;                // where each lane, or all that have read it, has a cell for itself
      for (uint32_t c = first; c < first + count; ++c) {
        if (!reads_again(a, cells_[c]) || fits(cells_[c], lanes(c))) continue;
        finest = std::min({finest, lanes(c).part_shift(g.shift), cells_[c].readers().part_shift(g.shift)});
      }
      if (finest < g.shift) {
        split(number, finest);
        first = g.split + (__builtin_ctz(mask) >> finest);
        count = __builtin_popcount(mask) >> finest;
      }
      for (uint32_t c = first; c < first + count; ++c) record_read(a, c, lanes(c));
    }
  });
}

// A whole granule in one piece, with nothing out of the ordinary: the rule, which goes first. False: it is none, and
// nothing has been done.
template <Use use>
EVERY_GRANULE bool Shadow::touch_whole(const Access& a, const Actor& actor, uint32_t number, LaneSet lanes) {
  Granule& g = granules_[number];
  if (__builtin_expect(!g.plain(is_read(use)), 0)) return false;
  const Cell& cell = cells_[number];
  if (!is_write(use) && __builtin_expect(reads_again(a, cell), 0) && !fits(cell, lanes)) return false;
  check<use>(a, actor, number, number, 0xffff, lanes);
  if constexpr (is_write(use)) {
    g.written = 0xffff;
    record_write(a, number, lanes);
  } else if (use != Use::strong_read) {
    record_read(a, number, lanes);
  }
  return true;
}

template <Use use>
void Shadow::touch(const Actor& actor, uint32_t begin, uint32_t bytes) {
  if ((begin | bytes) % kGranule) return touch_parts<use>(actor, begin, bytes);
  const Access a = access_of(actor, is_strong(use));
  const uint32_t end = (begin + bytes) / kGranule;
  for (uint32_t number = begin / kGranule; number < end; ++number) {
    if (!touch_whole<use>(a, actor, number, actor.lanes.of(number * kGranule, 4)))
      touch_parts<use>(actor, number * kGranule, kGranule);
  }
}

// The shadow of a CTA with much shared memory is larger than the first cache: what lanes will touch is fetched at once.
inline void Shadow::prefetch(const uint64_t begin[kLanes], Mask mask) const {
  for (; mask; mask &= mask - 1) {
    const size_t number = begin[__builtin_ctz(mask)] / kGranule;
    __builtin_prefetch(&granules_[number], 1);
    __builtin_prefetch(&cells_[number], 1);
  }
}

// then(granule): after each.
template <Use use, class F>
void Shadow::touch_granules(Actor& actor, const uint64_t begin[kLanes], Mask mask, const LaneSet* on_behalf, F then) {
  prefetch(begin, mask);
  const Access a = access_of(actor, is_strong(use));
  for (; mask; mask &= mask - 1) {
    const int l = __builtin_ctz(mask);
    const auto number = static_cast<uint32_t>(begin[l] / kGranule);
    const LaneSet lanes = on_behalf ? on_behalf[l % 8] : LaneSet{Mask{1} << l, false};
    if (__builtin_expect(!touch_whole<use>(a, actor, number, lanes), 0)) {
      actor.lanes.place(number * kGranule, lanes);
      touch_parts<use>(actor, number * kGranule, kGranule);
    }
    then(granules_[number]);
  }
}

namespace {

// f(Use as a constant); to the shadow .nc is a read like any other.
template <class F>
inline void with_use(Use use, F f) {
  switch (use) {
    case Use::read:
    case Use::constant:
    case Use::fresh:
    case Use::compared:
      return f(std::integral_constant<Use, Use::read>());
    case Use::write:
      return f(std::integral_constant<Use, Use::write>());
    case Use::store:
      return f(std::integral_constant<Use, Use::store>());
    case Use::atomic:
      return f(std::integral_constant<Use, Use::atomic>());
    case Use::strong_read:
      return f(std::integral_constant<Use, Use::strong_read>());
    case Use::strong_write:
      return f(std::integral_constant<Use, Use::strong_write>());
    case Use::load:
      return f(std::integral_constant<Use, Use::load>());
  }
}

}  // namespace

void Shadow::access(const Actor& actor, uint32_t begin, uint32_t bytes, Use use) {
  with_use(use, [&](auto u) { touch<u.value>(actor, begin, bytes); });
}

void Shadow::access_granules(Actor actor, const uint64_t begin[kLanes], Mask mask, const LaneSet* on_behalf, Use use) {
  if (on_behalf) actor.lanes.part_shift = on_behalf->part_shift(actor.lanes.part_shift);  // the same for each row
  with_use(use, [&](auto u) { touch_granules<u.value>(actor, begin, mask, on_behalf, [](Granule&) {}); });
}

void Shadow::take_off(const Actor& actor, uint32_t begin, uint32_t bytes) {
  touch<Use::write>(actor, begin, bytes);
  each_granule(begin, bytes, [](Granule& g, uint32_t, uint16_t mask, uint32_t, uint32_t) { g.flying |= mask; });
}

void Shadow::land(const Actor& actor, uint32_t begin, uint32_t bytes) {
  const Access a = access_of(actor);
  each_granule(begin, bytes, [&](Granule& g, uint32_t number, uint16_t mask, uint32_t first, uint32_t count) {
    g.flying &= ~mask;
    g.written |= mask;
    for (uint32_t c = first; c < first + count; ++c) {
      record_write(a, c, actor.lanes.of(address_of(c, number), g.shift));
    }
  });
}

void Shadow::take_off_granules(Actor actor, const uint64_t begin[kLanes], Mask mask) {
  touch_granules<Use::write>(actor, begin, mask, nullptr, [](Granule& g) { g.flying = 0xffff; });
}

void Shadow::land_granules(Actor actor, const uint64_t begin[kLanes], Mask mask) {
  prefetch(begin, mask);
  const Access a = access_of(actor);
  for (; mask; mask &= mask - 1) {
    const int l = __builtin_ctz(mask);
    const auto number = static_cast<uint32_t>(begin[l] / kGranule);
    const LaneSet lanes{Mask{1} << l, false};
    Granule& g = granules_[number];
    if (__builtin_expect(g.shift != 4, 0)) {
      actor.lanes.place(number * kGranule, lanes);
      land(actor, number * kGranule, kGranule);
      continue;
    }
    g.flying = 0;
    g.written = 0xffff;
    record_write(a, number, lanes);
  }
}

void Shadow::set_mbarrier(const Actor& actor, uint32_t begin, bool alive) {
  const Access a = access_of(actor);
  each_granule(begin, 8, [&](Granule& g, uint32_t number, uint16_t mask, uint32_t first, uint32_t count) {
    const uint8_t half = mask & 0xff ? 1 : 2;
    g.mbarriers &= ~half;
    if (mask & g.flying) check_state(actor, g, number, mask, Use::write);
    for (uint32_t c = first; c < first + count; ++c) {
      check<Use::write>(a, actor, c, number, mask, {});
      record_write(a, c, {});
    }
    g.written |= mask;
    if (alive) g.mbarriers |= half;
  });
}

void Shadow::use_mbarrier(const Actor& actor, uint32_t begin, bool published) {
  Actor generic = actor;
  generic.proxy = Proxy::generic;  // complete_tx needs no proxy fence after the init
  const Access a = access_of(generic);
  each_granule(begin, 8, [&](Granule&, uint32_t number, uint16_t mask, uint32_t first, uint32_t count) {
    for (uint32_t c = first; c < first + count; ++c) {
      if (!published) check<Use::read>(a, generic, c, number, mask, {});
      record_read(a, c, {});
    }
  });
}

void Shadow::end_mbarriers(Granule& g, uint32_t number, uint16_t mask) {
  for (int half = 0; half < 2; ++half) {
    if (!(g.mbarriers >> half & 1) || !(mask >> 8 * half & 0xff)) continue;
    g.mbarriers &= ~(1 << half);
    cta_->cluster->ctas[cta_->rank]->mbarriers.erase(number * kGranule + 8 * half);
  }
}

Finding Shadow::unwritten(const Actor& actor, uint32_t begin, uint32_t bytes) {
  Finding f;
  bool first = true;
  each_granule(begin, bytes, [&](Granule& g, uint32_t number, uint16_t mask, uint32_t, uint32_t) {
    if (first && (mask & ~g.written)) f = unwritten_bytes(actor, number, mask & ~g.written, Use::load);
    first &= !(mask & ~g.written);
  });
  return f;
}

bool Shadow::written(uint32_t begin, uint32_t bytes) {
  bool all = true;
  each_granule(begin, bytes,
               [&](Granule& g, uint32_t, uint16_t mask, uint32_t, uint32_t) { all &= !(mask & ~g.written); });
  return all;
}

void Shadow::store_undefined(uint32_t begin, uint32_t bytes) {
  each_granule(begin, bytes, [](Granule& g, uint32_t, uint16_t mask, uint32_t, uint32_t) { g.written &= ~mask; });
}

}  // namespace gpuless
