#include "shadow.h"

#include <immintrin.h>

#include <algorithm>

#include "machine.h"
#include "mbarrier.h"
#include "tensor_memory.h"

namespace forwardpass::interpreter {
namespace {

constexpr uint32_t kGranule = 16;

uint16_t bytes_between(uint32_t low, uint32_t high) {
  return static_cast<uint16_t>((0xffffu << low) & (0xffffu >> (kGranule - high)));
}

constexpr char kUnordered[] = ": nothing orders the two, such as a barrier, or a release and an acquire";

const char* verb(Use use) { return use == Use::atomic ? "atomic" : is_write(use) ? "write" : "read"; }

}  // namespace

SourceLine source_line(const Module& module, uint32_t ptx_line) {
  for (const auto& f : module.source.functions) {
    for (const Statement& s : f.body) {
      const ptx::Location& l = module.source.outermost(s.location);
      if (s.line == static_cast<int>(ptx_line) && l.file) return {module.source.files[l.file], l.line};
    }
  }
  return {};
}

std::string source_place(const Module& module, uint32_t ptx_line) {
  const SourceLine source = source_line(module, ptx_line);
  return source.line ? source.file + ":" + std::to_string(source.line) : "PTX line " + std::to_string(ptx_line);
}

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
    for (int n = 0; n < others_used_; ++n) std::copy_n(others_[n].row(source), 8, others_[n].row(target));
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
EVERY_GRANULE bool Shadow::reads_known(uint32_t cell, const VectorClock& seen) const {
  const auto late = [](const Clock* read, const Clock* known) {
    const __m256i r = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(read));
    const __m256i k = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(known));
    return _mm256_xor_si256(_mm256_max_epu32(r, k), k);
  };
  const Clock *row = cells_.reads(cell), *warps = seen.clocks + first_;
  __m256i any = late(row, warps);
  for (int block = 8; block < columns_; block += 8) any = _mm256_or_si256(any, late(row + block, warps + block));
  for (int k = 0; k < others_used_; ++k)
    any = _mm256_or_si256(any, late(others_[k].row(cell), seen.clocks + others_[k].first));
  return _mm256_testz_si256(any, any);
}

inline uint32_t Shadow::address_of(uint32_t index, uint32_t number) const {
  const Granule& g = granules_[number];
  return number * kGranule + (g.shift == 4 ? 0 : (index - g.split) << g.shift);
}

template <Use use>
EVERY_GRANULE void Shadow::check(const Actor& actor, uint32_t index, uint32_t number, uint16_t mask, LaneSet lanes) {
  const Cell& cell = cells_[index];
  const Knowledge& k = *actor.knowledge;
  const bool write_seen = cell.clock <= k.seen.clocks[cell.writer] || (is_strong(use) && cell.strong);
  const bool fenced =
      actor.proxy == Proxy::generic || cell.proxy == Proxy::async || cell.clock <= k.proxied.clocks[cell.writer];
  if (__builtin_expect(!(write_seen && fenced), 0)) check_write(actor, index, number, mask, use, write_seen);
  if constexpr (is_write(use)) {
    if (__builtin_expect(!reads_known(index, k.seen), 0)) check_reads(actor, index, number, mask, use);
  }
  if (__builtin_expect((cell.clock > actor.lanes.floor) & (cell.writer == actor.lanes.agent), 0) &&
      !(is_strong(use) && cell.strong)) {
    check_lanes(actor, index, number, use, lanes, true);
  }
  if (is_write(use) && __builtin_expect(cell.read_since > actor.lanes.floor, 0) && cell.reader == actor.lanes.agent) {
    check_lanes(actor, index, number, use, lanes, false);
  }
}

EVERY_GRANULE bool Shadow::reads_again(const Actor& actor, const Cell& cell) {
  return (cell.read_since > actor.lanes.floor) & (cell.reader == actor.agent);
}

EVERY_GRANULE bool Shadow::fits(const Cell& cell, LaneSet lanes) {
  return !(lanes.spread || cell.readers_spread) || cell.readers() == lanes;
}

EVERY_GRANULE void Shadow::record_read(const Actor& actor, uint32_t index, LaneSet lanes) {
  if (is_local(actor.agent)) {
    cells_.reads(index)[actor.agent - first_] = actor.now;
  } else {
    others_[reader_].row(index)[actor.agent % 8] = actor.now;
  }
  Cell& cell = cells_[index];
  cell.read_line = actor.line;
  if (__builtin_expect(reads_again(actor, cell), 0)) {
    cell.read_lanes |= lanes.lanes;  // spread or not, both are: fits()
    return;
  }
  cell.reader = actor.agent;
  cell.read_since = actor.now;
  cell.set_readers(lanes);
}

EVERY_GRANULE void Shadow::record_write(const Actor& actor, uint32_t index, bool strong, LaneSet lanes) {
  if (const Cell& before = cells_[index]; __builtin_expect(before.clock == actor.now, 0)) {
    const bool one = before.writer == actor.agent && before.write_line == actor.line;  // instruction
    if (one && !lanes.spread && !before.writers_spread) lanes.lanes |= before.write_lanes;
  }
  Cell cell;
  cell.set_writers(lanes);
  cell.clock = actor.now;
  cell.writer = actor.agent;
  cell.write_line = actor.line;
  cell.strong = strong;
  cell.proxy = actor.proxy;
  cells_[index] = cell;
  const auto clear = [](Clock* clocks) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(clocks), _mm256_setzero_si256());
  };
  Clock* row = cells_.reads(index);
  clear(row);
  for (int block = 8; block < columns_; block += 8) clear(row + block);
  for (int k = 0; k < others_used_; ++k) clear(others_[k].row(index));
}

template <Use use>
void Shadow::touch_parts(const Actor& actor, uint32_t begin, uint32_t bytes) {
  each_granule(begin, bytes, [&](Granule& g, uint32_t number, uint16_t mask, uint32_t first, uint32_t count) {
    // An exchange and the like read what was there, so an atomic counts as a read here.
    const bool unwritten = is_read(use) && (mask & ~g.written);
    if (__builtin_expect(unwritten || (mask & g.flying) || g.mbarriers, 0)) check_state(actor, g, number, mask, use);
    if constexpr (use == Use::load) loaded_unwritten_ |= unwritten;
    const auto lanes = [&](uint32_t c) { return actor.lanes.of(address_of(c, number), g.shift); };
    for (uint32_t c = first; c < first + count; ++c) check<use>(actor, c, number, mask, lanes(c));
    if constexpr (is_write(use)) {
      g.written |= mask;
      if (g.mbarriers) end_mbarriers(g, number, mask);
      if (mask == 0xffff && g.shift != 4) {  // one writer of the whole: no need for parts any more
        g.shift = 4;
        first = number;
        count = 1;
      }
      for (uint32_t c = first; c < first + count; ++c) record_write(actor, c, is_strong(use), lanes(c));
    } else if (use != Use::strong_read) {  // which no strong write need be ordered after
      int finest = g.shift;                // where each lane, or all that have read it, has a cell for itself
      for (uint32_t c = first; c < first + count; ++c) {
        if (!reads_again(actor, cells_[c]) || fits(cells_[c], lanes(c))) continue;
        finest = std::min({finest, lanes(c).part_shift(g.shift), cells_[c].readers().part_shift(g.shift)});
      }
      if (finest < g.shift) {
        split(number, finest);
        first = g.split + (__builtin_ctz(mask) >> finest);
        count = __builtin_popcount(mask) >> finest;
      }
      for (uint32_t c = first; c < first + count; ++c) record_read(actor, c, lanes(c));
    }
  });
}

// A whole granule in one piece, with nothing out of the ordinary: the rule, which goes first. False: it is none, and
// nothing has been done.
template <Use use>
EVERY_GRANULE bool Shadow::touch_whole(const Actor& actor, uint32_t number, LaneSet lanes) {
  Granule& g = granules_[number];
  const bool unwritten = is_read(use) && g.written != 0xffff;
  if (__builtin_expect(g.shift != 4 || unwritten || g.flying || g.mbarriers, 0)) return false;
  const Cell& cell = cells_[number];
  if (!is_write(use) && __builtin_expect(reads_again(actor, cell), 0) && !fits(cell, lanes)) return false;
  check<use>(actor, number, number, 0xffff, lanes);
  if constexpr (is_write(use)) {
    g.written = 0xffff;
    record_write(actor, number, is_strong(use), lanes);
  } else if (use != Use::strong_read) {
    record_read(actor, number, lanes);
  }
  return true;
}

template <Use use>
void Shadow::touch(const Actor& actor, uint32_t begin, uint32_t bytes) {
  if ((begin | bytes) % kGranule) return touch_parts<use>(actor, begin, bytes);
  const uint32_t end = (begin + bytes) / kGranule;
  for (uint32_t number = begin / kGranule; number < end; ++number) {
    if (!touch_whole<use>(actor, number, actor.lanes.of(number * kGranule, 4)))
      touch_parts<use>(actor, number * kGranule, kGranule);
  }
}

// The shadow of a CTA with much shared memory is larger than the first cache: what lanes will touch is fetched at once.
inline void Shadow::prefetch(const uint64_t begin[kLanes], Mask mask) const {
  for (; mask; mask &= mask - 1) {
    const size_t number = begin[__builtin_ctz(mask)] / kGranule;
    __builtin_prefetch(&granules_[number], 1);
    __builtin_prefetch(&cells_[number], 1);
    for (int k = 0; k < others_used_; ++k) __builtin_prefetch(others_[k].row(number), 1);
  }
}

// then(granule): after each.
template <Use use, class F>
void Shadow::touch_granules(Actor& actor, const uint64_t begin[kLanes], Mask mask, const LaneSet* on_behalf, F then) {
  prefetch(begin, mask);
  for (; mask; mask &= mask - 1) {
    const int l = __builtin_ctz(mask);
    const auto number = static_cast<uint32_t>(begin[l] / kGranule);
    const LaneSet lanes = on_behalf ? on_behalf[l % 8] : LaneSet{Mask{1} << l, false};
    if (__builtin_expect(!touch_whole<use>(actor, number, lanes), 0)) {
      actor.lanes.place(number * kGranule, lanes);
      touch_parts<use>(actor, number * kGranule, kGranule);
    }
    then(granules_[number]);
  }
}

int Shadow::find(int agent) const {
  int k = 0;
  while (k < others_used_ && others_[k].first != agent / 8 * 8) ++k;
  return k;
}

void Shadow::meet(const Actor& actor) {
  if (is_local(actor.agent) || (reader_ = find(actor.agent)) < others_used_) return;
  if (others_.size() == static_cast<size_t>(others_used_)) others_.emplace_back();
  others_[others_used_++].first = actor.agent / 8 * 8;
  make_room();
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
  if (is_read(use)) meet(actor);
  with_use(use, [&](auto u) { touch<u.value>(actor, begin, bytes); });
}

void Shadow::access_granules(Actor actor, const uint64_t begin[kLanes], Mask mask, const LaneSet* on_behalf, Use use) {
  if (is_read(use)) meet(actor);
  if (on_behalf) actor.lanes.part_shift = on_behalf->part_shift(actor.lanes.part_shift);  // the same for each row
  with_use(use, [&](auto u) { touch_granules<u.value>(actor, begin, mask, on_behalf, [](Granule&) {}); });
}

void Shadow::take_off(const Actor& actor, uint32_t begin, uint32_t bytes) {
  touch<Use::write>(actor, begin, bytes);
  each_granule(begin, bytes, [](Granule& g, uint32_t, uint16_t mask, uint32_t, uint32_t) { g.flying |= mask; });
}

void Shadow::land(const Actor& actor, uint32_t begin, uint32_t bytes) {
  each_granule(begin, bytes, [&](Granule& g, uint32_t number, uint16_t mask, uint32_t first, uint32_t count) {
    g.flying &= ~mask;
    g.written |= mask;
    for (uint32_t c = first; c < first + count; ++c) {
      record_write(actor, c, false, actor.lanes.of(address_of(c, number), g.shift));
    }
  });
}

void Shadow::take_off_granules(Actor actor, const uint64_t begin[kLanes], Mask mask) {
  touch_granules<Use::write>(actor, begin, mask, nullptr, [](Granule& g) { g.flying = 0xffff; });
}

void Shadow::land_granules(Actor actor, const uint64_t begin[kLanes], Mask mask) {
  prefetch(begin, mask);
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
    record_write(actor, number, false, lanes);
  }
}

void Shadow::set_mbarrier(const Actor& actor, uint32_t begin, bool alive) {
  each_granule(begin, 8, [&](Granule& g, uint32_t number, uint16_t mask, uint32_t first, uint32_t count) {
    const uint8_t half = mask & 0xff ? 1 : 2;
    g.mbarriers &= ~half;
    if (mask & g.flying) check_state(actor, g, number, mask, Use::write);
    for (uint32_t c = first; c < first + count; ++c) {
      check<Use::write>(actor, c, number, mask, {});
      record_write(actor, c, false, {});
    }
    g.written |= mask;
    if (alive) g.mbarriers |= half;
  });
}

void Shadow::use_mbarrier(const Actor& actor, uint32_t begin, bool published) {
  meet(actor);
  Actor generic = actor;
  generic.proxy = Proxy::generic;  // complete_tx needs no proxy fence after the init
  each_granule(begin, 8, [&](Granule&, uint32_t number, uint16_t mask, uint32_t first, uint32_t count) {
    for (uint32_t c = first; c < first + count; ++c) {
      if (!published) check<Use::read>(generic, c, number, mask, {});
      record_read(actor, c, {});
    }
  });
}

// ---- What to say ----

std::string Shadow::name_of(int agent) const {
  if (cta_->cluster->is_series(agent)) return "an asynchronous operation";
  const int warp = (agent - kFirstWarp) % warps_, rank = (agent - kFirstWarp) / warps_;
  const bool alone = cta_->launch->cluster_size() == 1;
  return "warp " + std::to_string(warp) + (alone ? "" : " of the CTA of rank " + std::to_string(rank));
}

std::string Shadow::access_by(const char* verb, int agent, uint32_t line) const {
  const std::string where = line ? source_place(*cta_->launch->module, line) : "";
  const char* before = !line ? "" : cta_->cluster->is_series(agent) ? " issued at " : " at ";
  return std::string(verb) + " by " + name_of(agent) + before + where;
}

void Shadow::report(Kind kind, uint32_t address, std::string message, uint32_t other_line, Breaks breaks) const {
  Finding f = finding_at(kind, std::move(message), address);
  f.breaks = breaks;
  cta_->place_other(f, other_line);
  cta_->cluster->report(std::move(f));
}

void Shadow::end_mbarriers(Granule& g, uint32_t number, uint16_t mask) {
  for (int half = 0; half < 2; ++half) {
    if (!(g.mbarriers >> half & 1) || !(mask >> 8 * half & 0xff)) continue;
    g.mbarriers &= ~(1 << half);
    cta_->cluster->ctas[cta_->rank]->mbarriers.erase(number * kGranule + 8 * half);
  }
}

bool Shadow::idle_mbarrier(uint32_t address) const {
  const auto object = cta_->mbarriers.find(address / 8 * 8);
  return object != cta_->mbarriers.end() && object->second->untouched();
}

std::string Shadow::range(uint32_t begin, uint32_t bytes) const {
  if (space_ == Space::shared) return "shared " + hexadecimal(begin) + ".." + hexadecimal(begin + bytes);
  const uint32_t column = begin / kGranule % TensorMemory::kColumns;
  const uint32_t lane = begin / kGranule / TensorMemory::kColumns * kGranule + begin % kGranule;
  return "tensor memory, column " + std::to_string(column) + ", lanes " + std::to_string(lane) + ".." +
         std::to_string(lane + bytes);
}

void Shadow::check_state(const Actor& actor, const Granule& g, uint32_t number, uint16_t mask, Use use) const {
  const uint32_t start = number * kGranule;
  const uint16_t barriers = (g.mbarriers & 1 ? 0x00ff : 0) | (g.mbarriers & 2 ? 0xff00 : 0);
  if (const uint16_t bad = mask & barriers; bad && !cta_->cluster->again(Kind::mbarrier, 0)) {
    const uint32_t half = start + (bad & 0xff ? 0 : 8);
    const bool idle = is_write(use) && idle_mbarrier(half);
    report(Kind::mbarrier, half,
           access_by(verb(use), actor.agent, actor.line) + " of the mbarrier object at " + hexadecimal(half) +
               ", which mbarrier.inval has not ended" + (idle ? kNobodyCame : ""),
           0, idle ? Breaks::isa : Breaks::hardware);
  }
  if (const uint16_t bad = mask & g.flying) {
    const uint32_t byte = __builtin_ctz(bad);
    const Cell& cell = cells_[g.shift == 4 ? number : g.split + (byte >> g.shift)];
    if (!cta_->cluster->again(Kind::in_flight, cell.write_line)) {
      report(Kind::in_flight, start + byte,
             access_by("write", cell.writer, cell.write_line) + ", then " +
                 access_by(verb(use), actor.agent, actor.line) + " of " + range(start + byte, __builtin_popcount(bad)) +
                 ", which the first is still writing",
             cell.write_line);
    }
  }
  const uint16_t bad = is_read(use) && use != Use::load ? mask & ~g.written : 0;
  if (bad && !cta_->cluster->again(Kind::uninitialised, 0)) {
    cta_->cluster->report(unwritten_bytes(actor, number, bad, use));
  }
}

Finding Shadow::unwritten_bytes(const Actor& actor, uint32_t number, uint16_t bad, Use use) const {
  const uint32_t address = number * kGranule + __builtin_ctz(bad);
  return finding_at(Kind::uninitialised,
                    access_by(verb(use), actor.agent, actor.line) + " of " + range(address, __builtin_popcount(bad)) +
                        ", which nothing has written",
                    address);
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

void Shadow::check_write(const Actor& actor, uint32_t index, uint32_t number, uint16_t mask, Use use, bool write_seen) {
  const Cell& cell = cells_[index];
  const Kind kind = !write_seen && cta_->cluster->is_series(cell.writer) ? Kind::in_flight : Kind::race;
  if (use != Use::store && cta_->cluster->again(kind, cell.write_line)) return;
  const uint32_t address = number * kGranule + __builtin_ctz(mask), bytes = __builtin_popcount(mask);
  const std::string both = access_by("write", cell.writer, cell.write_line) + ", then " +
                           access_by(verb(use), actor.agent, actor.line) + " of " + range(address, bytes);
  if (write_seen) {
    const bool copied = cell.proxy == Proxy::copy, idle = is_write(use) && idle_mbarrier(address);
    const char* const after = copied ? "wait for that copy; CUTLASS has none, and GPUs seem not to mind" : "write";
    return report(kind, address,
                  both + " through the async proxy: between them a fence.proxy.async is missing, after the " + after,
                  cell.write_line, copied || idle ? Breaks::isa : Breaks::hardware);
  }
  if (kind == Kind::in_flight)
    return report(kind, address, both + ": nothing has waited for the first", cell.write_line);
  if (use != Use::store) return report(kind, address, both + kUnordered, cell.write_line);
  Finding f = finding_at(kind, both + kUnordered, address);
  cta_->place_other(f, cell.write_line);
  doubt(number, mask, std::move(f));
}

void Shadow::doubt(uint32_t number, uint16_t mask, Finding finding) {
  cta_->cluster->place(finding);  // while the lanes are known
  Doubt doubt{number, mask, {}, std::move(finding)};
  const auto& shared = cta_->shared;
  const size_t begin = number * kGranule;
  std::copy_n(shared.data() + begin, std::min<size_t>(kGranule, shared.size() - begin), doubt.before.begin());
  doubts_.push_back(std::move(doubt));
}

void Shadow::check_lanes(const Actor& actor, uint32_t index, uint32_t number, Use use, LaneSet now, bool write) {
  const Cell& cell = cells_[index];
  const uint32_t line = write ? cell.write_line : cell.read_line;
  // Lanes that one instruction has write to one place are no race: one of the values stays, as with any one writer.
  if (write && is_write(use) && cell.clock == actor.now && line == actor.line) return;
  const LaneOrder::Clash clash =
      actor.lanes.order->clash(write ? cell.writers() : cell.readers(), write ? cell.clock : cell.read_since, now,
                               granules_[number].shift, write);
  if (clash.lane < 0) return;
  if (use != Use::store && cta_->cluster->again(Kind::race, line, true)) return;
  const uint32_t offset = address_of(index, number) - number * kGranule;
  const auto mask = static_cast<uint16_t>(clash.bytes << offset);
  const uint32_t address = number * kGranule + __builtin_ctz(mask);
  const Module& module = *cta_->launch->module;
  const auto by_lane = [&](const std::string& verb, int lane, uint32_t l) {
    return verb + " by lane " + std::to_string(lane) + " at " + source_place(module, l);
  };
  const std::string access = verb(use) + std::string(cta_->cluster->is_series(actor.agent) ? " issued" : "");
  Finding f = finding_at(
      Kind::race,
      by_lane(write ? "write" : "read", clash.other, line) + ", then " + by_lane(access, clash.lane, actor.line) +
          " of " + range(address, __builtin_popcount(mask)) +
          ": no __syncwarp (bar.warp.sync) or barrier orders these lanes of one warp, " + name_of(actor.lanes.agent),
      address);
  f.lane = clash.lane;
  f.within_warp = true;
  cta_->place_other(f, line);
  if (use != Use::store || !write) return cta_->cluster->report(std::move(f));
  doubt(number, mask, std::move(f));
}

void Shadow::settle_doubts() {
  for (const Doubt& doubt : std::exchange(doubts_, {})) {
    const uint8_t* now = cta_->shared.data() + doubt.number * kGranule;
    for (uint32_t byte = 0; byte < kGranule; ++byte)
      if ((doubt.mask >> byte & 1) && now[byte] != doubt.before[byte]) {
        cta_->cluster->report(doubt.finding);
        break;
      }
  }
}

Clock Shadow::last_read(uint32_t index, int agent) const {
  if (is_local(agent)) return cells_.reads(index)[agent - first_];
  const int k = find(agent);
  return k < others_used_ ? others_[k].row(index)[agent % 8] : 0;
}

void Shadow::check_reads(const Actor& actor, uint32_t index, uint32_t number, uint16_t mask, Use use) const {
  int agent = 0;
  while (last_read(index, agent) <= actor.knowledge->seen.clocks[agent]) ++agent;
  const Cell& cell = cells_[index];
  const uint32_t line = agent == cell.reader ? cell.read_line : 0;  // only the last reader's is known
  const Kind kind = cta_->cluster->is_series(agent) ? Kind::in_flight : Kind::race;
  if (cta_->cluster->again(kind, line)) return;
  const uint32_t address = number * kGranule + __builtin_ctz(mask), bytes = __builtin_popcount(mask);
  report(kind, address,
         access_by("read", agent, line) + ", then " + access_by(verb(use), actor.agent, actor.line) + " of " +
             range(address, bytes) + (kind == Kind::in_flight ? ": nothing has waited for the first" : kUnordered),
         line);
}

}  // namespace forwardpass::interpreter
