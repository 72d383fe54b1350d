#include "memory.h"

#include <algorithm>
#include <array>
#include <mutex>

#include "explore/execution.h"
#include "global_shadow.h"
#include "machine.h"
#include "undefined.h"

namespace gpuless {

// ---- Memory ----

void Memory::add(const void* pointer, int64_t bytes, std::string name, bool read_only) {
  if (bytes <= 0) return;
  const std::unique_lock lock(mutex_);
  const auto begin = reinterpret_cast<uint64_t>(pointer), end = begin + static_cast<uint64_t>(bytes);
  intervals_.insert({begin, {end, read_only, std::move(name)}});
  merge(begin, end);
}

int64_t Memory::remove(const void* pointer) {
  const std::unique_lock lock(mutex_);
  const auto begin = reinterpret_cast<uint64_t>(pointer);
  auto last = intervals_.upper_bound(begin);
  if (last == intervals_.begin() || (--last)->first != begin) return 0;
  const uint64_t end = last->second.end;
  intervals_.erase(last);
  merge(begin, end);
  return static_cast<int64_t>(end - begin);
}

// Rebuilds the regions that [begin, end) overlaps from their intervals.
void Memory::merge(uint64_t begin, uint64_t end) {
  const auto low = std::partition_point(regions_.begin(), regions_.end(), [&](auto& r) { return r.end <= begin; });
  const auto high = std::partition_point(low, regions_.end(), [&](auto& r) { return r.begin < end; });
  if (low != high) {
    begin = std::min(begin, low->begin);
    end = std::max(end, (high - 1)->end);
  }
  std::vector<Region> spans;
  for (auto i = intervals_.lower_bound(begin); i != intervals_.end() && i->first < end; ++i) {
    if (!spans.empty() && i->first < spans.back().end) {
      spans.back().end = std::max(spans.back().end, i->second.end);
      spans.back().read_only &= i->second.read_only;
    } else {
      spans.push_back({i->first, i->second.end, i->second.read_only});
    }
  }
  regions_.insert(regions_.erase(low, high), spans.begin(), spans.end());
  version_.fetch_add(1, std::memory_order_release);
}

bool Memory::find(uint64_t address, uint64_t bytes, Region* region) const {
  const std::shared_lock lock(mutex_);
  const auto r = std::partition_point(regions_.begin(), regions_.end(), [&](auto& r) { return r.end <= address; });
  if (r == regions_.end() || !r->covers(address, bytes)) return false;
  *region = *r;
  return true;
}

uint64_t Memory::largest() const {
  const std::shared_lock lock(mutex_);
  uint64_t most = 0;
  for (const auto& [begin, i] : intervals_) most = std::max(most, i.end - begin);
  return most;
}

std::string Memory::describe(uint64_t address) const {
  const std::shared_lock lock(mutex_);
  if (intervals_.empty()) return hexadecimal(address) + " (no storage is registered)";
  uint64_t nearest = ~uint64_t{0};
  std::string words;
  for (const auto& [begin, i] : intervals_) {
    const bool past = address >= i.end;
    const uint64_t distance = past ? address - i.end + 1 : address < begin ? begin - address : 0;
    if (distance > nearest) continue;  // of several the last: an argument, where cudaMalloc gave its memory
    nearest = distance;
    const std::string interval = i.name + " (" + std::to_string(i.end - begin) + " bytes)";
    words = !distance ? "byte " + std::to_string(address - begin) + " of " + interval
            : past    ? std::to_string(address - i.end) + " bytes past the end of " + interval
                      : std::to_string(distance) + " bytes before " + interval;
  }
  if (nearest > uint64_t{1} << 32)
    return hexadecimal(address) +
           ", far from everything registered (Device.register takes what kernels know by addresses kept in memory)";
  return words;
}

void SyncPoints::meet(Warp& w, Mask lanes, uint64_t line, Scope scope) {
  if (slots_.empty()) slots_.resize(kSlots);
  // In a cluster each CTA has a slot of its own beside the one of all.
  const bool alone = w.cta->launch->cluster_size() == 1;
  Knowledge* const slots[] = {
      alone ? nullptr : &slot(line + (static_cast<uint64_t>(w.cta->rank) + 1) * 0x632be59bd9b4e019u),
      scope == Scope::cta && !alone ? nullptr : &slot(line)};
  for (const Knowledge* s : slots)
    if (s) w.acquire(lanes, *s);
  for (Knowledge* s : slots)
    if (s) *s = w.knowledge;
}

namespace {

const char* name_of(Use use) { return use == Use::atomic ? "atomic" : is_write(use) ? "write" : "read"; }

// ---- Global memory ----

// What is global memory besides the registered storage: the module's variables, and the launch's parameters.
bool find_own(const Launch& l, uint64_t address, uint64_t bytes, Memory::Region* region) {
  const auto within = [&](const uint8_t* begin, uint64_t size, bool read_only) {
    const auto first = reinterpret_cast<uint64_t>(begin);
    *region = {first, first + size, read_only};
    return region->covers(address, bytes);
  };
  if (within(l.parameters.data(), l.parameters.size(), true)) return true;
  for (const auto& [name, g] : l.module->globals)
    if (within(g.address, g.bytes, g.constant)) return true;
  return false;
}

}  // namespace

std::string describe(const Launch& l, uint64_t address) {
  for (const auto& [name, g] : l.module->globals) {
    const uint64_t offset = address - reinterpret_cast<uint64_t>(g.address);
    if (offset < static_cast<uint64_t>(g.bytes)) return "byte " + std::to_string(offset) + " of variable " + name;
  }
  const uint64_t offset = address - reinterpret_cast<uint64_t>(l.parameters.data());
  if (offset < l.parameters.size()) return "byte " + std::to_string(offset) + " of the kernel's parameters";
  return l.memory->describe(address);
}

namespace {

// Null: not all of it is there.
const Memory::Region* global_region(Warp& w, uint64_t address, uint64_t bytes) {
  RegionCache& cache = w.regions;
  const Launch& l = *w.cta->launch;
  if (const uint64_t version = l.memory->version(); cache.version != version) {
    cache = RegionCache();
    cache.version = version;
  }
  for (const auto& r : cache.regions)
    if (r.covers(address, bytes)) return &r;
  Memory::Region& r = cache.regions[cache.next++ % RegionCache::kEntries];
  if (l.memory->find(address, bytes, &r) || find_own(l, address, bytes, &r)) return &r;
  r = Memory::Region();
  return nullptr;
}

std::string bytes_at(Use use, uint64_t bytes, const std::string& where) {
  return std::string(name_of(use)) + " of " + std::to_string(bytes) + " bytes at " + where;
}

// The ranges that one instruction touches.
class GlobalCheck {
 public:
  GlobalCheck(Warp& w, Use use, bool under_way = false)
      : w_(w), use_(use), shadow_(global_shadow(), w, use, under_way) {}
  // False: not all of it is there.
  bool operator()(uint64_t address, uint64_t bytes, int lane) {
    if (!region_.covers(address, bytes)) {
      const Memory::Region* region = global_region(w_, address, bytes);
      if (!region) return false;
      region_ = *region;
    }
    if (is_write(use_) && __builtin_expect(region_.read_only, 0)) {
      w_.fail_at(
          Kind::illegal,
          bytes_at(use_, bytes, hexadecimal(address)) + ", which is read-only: " + describe(*w_.cta->launch, address),
          lane, address);
    }
    const Launch& launch = *w_.cta->launch;
    if (is_write(use_) && __builtin_expect(launch.execution != nullptr, 0)) launch.execution->save(address, bytes);
    if (launch.options.checks) shadow_(address, bytes);
    return true;
  }

 private:
  Warp& w_;
  const Use use_;
  const GlobalShadow::Access shadow_;
  Memory::Region region_;
};

// ---- All spaces ----

// f(begin, bytes, a lane) for the ranges that neighbouring lanes make together.
template <class F>
inline void each_range(const uint64_t a[kLanes], int bytes, F&& f) {
  uint64_t apart = 0;
  for (int l = 0; l < kLanes; ++l) apart |= a[l] ^ (a[0] + static_cast<uint32_t>(l * bytes));
  if (!apart) return f(a[0], static_cast<uint64_t>(bytes) * kLanes, 0);
  uint64_t begin = a[0], end = begin + bytes;
  int first = 0;
  for (int l = 1; l < kLanes; ++l) {
    if (a[l] == end) {
      end += bytes;
    } else if (a[l] < begin || a[l] + bytes > end) {
      f(begin, end - begin, first);
      begin = a[l];
      end = begin + bytes;
      first = l;
    }
  }
  f(begin, end - begin, first);
}

bool within(uint64_t size, uint64_t begin, uint64_t bytes) { return begin <= size && bytes <= size - begin; }

// An entry's own parameters are the launch's, the rest of the space is the frame's.
uint64_t launched_bytes(const Warp& w) { return w.frame->caller ? 0 : w.frame->code->own_param_bytes; }
uint64_t param_bytes(const Warp& w) { return std::max<uint64_t>(launched_bytes(w), w.frame->code->param_bytes); }

}  // namespace

Cta* shared_cta(Cta& issuer, uint64_t address) {
  const uint64_t rank = address >> kRankShift;
  if (!rank) return &issuer;
  const auto& ctas = issuer.cluster->ctas;
  return rank >= 2 && rank - 2 < ctas.size() ? ctas[rank - 2].get() : nullptr;
}

namespace {

// Whose shared memory has the range, for .shared::cluster or without; null: nobody's.
Cta* find_shared(Warp& w, uint64_t address, uint64_t bytes, bool cluster) {
  Cta* const cta = shared_cta(*w.cta, address);
  return cta && (cta == w.cta || cluster) && within(cta->shared.size(), shared_offset_of(address), bytes) ? cta
                                                                                                          : nullptr;
}

// What there is to say of an access that is out of bounds.
Finding outside(const Warp& w, ptx::Space space, uint64_t address, uint64_t bytes, Use use, int lane) {
  using ptx::Space;
  const Launch& l = *w.cta->launch;
  Finding f;
  if (space == Space::shared || space == Space::shared_cluster || space == Space::local || space == Space::param) {
    const bool shared = space == Space::shared || space == Space::shared_cluster;
    const Cta* const cta = shared ? shared_cta(*w.cta, address) : nullptr;
    const uint64_t size = shared                  ? (cta ? cta : w.cta)->shared.size()
                          : space == Space::local ? w.local[lane].size()
                                                  : param_bytes(w);
    const uint64_t offset = cta ? shared_offset_of(address) : address;
    const char* name = shared ? "shared " : space == Space::local ? "local " : "param ";
    f = finding_at(
        Kind::out_of_bounds,
        bytes_at(use, bytes, name + hexadecimal(offset)) + ", of which there are " + std::to_string(size) + " bytes",
        offset);
    if (cta && cta != w.cta && space == Space::shared) {
      f.kind = Kind::illegal;
      f.message = "the address is of the shared memory of another CTA, rank " + std::to_string(cta->rank) +
                  ": .shared and .shared::cta are the CTA's own, use .shared::cluster";
    }
  } else {
    Memory::Region r;
    const bool begins_inside = l.memory->find(address, 1, &r) || find_own(l, address, 1, &r);
    f = finding_at(
        Kind::out_of_bounds,
        bytes_at(use, bytes, hexadecimal(address)) + ": " + describe(l, begins_inside ? address + bytes - 1 : address),
        address);
  }
  f.lane = lane;
  return f;
}

}  // namespace

Cta& shared_range(Warp& w, uint64_t address, uint64_t bytes, bool cluster, Use use, int lane) {
  if (Cta* cta = find_shared(w, address, bytes, cluster)) return *cta;
  throw outside(w, cluster ? ptx::Space::shared_cluster : ptx::Space::shared, address, bytes, use, lane);
}

namespace {

// f(begin, bytes, a lane, those that touch it) for ranges of the lanes of a mask: lanes that are neighbours, each with
// its part, or that all touch all of it.
template <class F>
inline void each_lane_range(const uint64_t a[kLanes], int bytes, Mask mask, const LaneSet* on_behalf, F&& f) {
  if (on_behalf) {
    if (on_behalf->spread) {
      for (; mask; mask &= mask - 1) {
        const int l = __builtin_ctz(mask);
        f(a[l], static_cast<uint64_t>(bytes), l, on_behalf[l % 8]);
      }
    } else {  // all touch everything
      each_range(a, bytes, [&](uint64_t begin, uint64_t size, int lane) { f(begin, size, lane, *on_behalf); });
    }
    return;
  }
  if (mask == kAllLanes) {
    uint64_t apart = 0;
    for (int l = 0; l < kLanes; ++l) apart |= a[l] ^ (a[0] + static_cast<uint32_t>(l * bytes));
    if (!apart) return f(a[0], static_cast<uint64_t>(bytes) * kLanes, 0, LaneSet{kAllLanes, true});
  }
  while (mask) {
    const int first = __builtin_ctz(mask);
    const uint64_t begin = a[first];
    LaneSet set{Mask{1} << first, true};
    uint64_t end = begin + bytes;
    for (mask &= mask - 1; mask; mask &= mask - 1) {
      const int l = __builtin_ctz(mask);
      if (a[l] == end && set.spread) {
        end += bytes;
      } else if (a[l] == begin && end == begin + bytes) {
        set.spread = false;
      } else {
        break;
      }
      set.lanes |= Mask{1} << l;
    }
    f(begin, end - begin, first, set);
  }
}

// These return the lanes whose access is out of bounds.

Mask access_shared(Warp& w, ptx::Space space, const uint64_t a[kLanes], int bytes, Use use, Mask mask,
                   uint8_t* host[kLanes], const LaneSet* on_behalf) {
  Cta& issuer = *w.cta;
  const bool checks = issuer.launch->options.checks, cluster = space == ptx::Space::shared_cluster;
  uint64_t ones = 0;
  for (int l = 0; l < kLanes; ++l) ones |= a[l];
  const bool others = !within(issuer.shared.size(), ones, bytes);  // maybe
  Mask outside = 0;
  for (Mask rest = others ? mask : 0; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (!find_shared(w, a[l], bytes, cluster)) outside |= Mask{1} << l;
  }
  if (outside == mask) return outside;
  uint64_t inside[kLanes];
  if (outside) {  // these lanes repeat the first that is inside
    mask &= ~outside;
    for (int l = 0; l < kLanes; ++l) inside[l] = outside >> l & 1 ? a[__builtin_ctz(mask)] : a[l];
    a = inside;
  }
  Actor actor = w.actor();
  actor.lanes = w.lanes(__builtin_ctz(bytes));
  uint64_t last = ones;
  if (others) last = *std::max_element(a, a + kLanes);
  if (bytes == 16 && within(issuer.shared.size(), last, 16)) {  // granules of the CTA's own
    if (checks) {
      issuer.shadow.access_granules(actor, a, mask, on_behalf, use == Use::write ? Use::store : use);
      if (use == Use::load && issuer.shadow.loaded_unwritten()) note_unwritten(w, a, bytes, mask);
    }
    for (int l = 0; l < kLanes; ++l) host[l] = issuer.shared.data() + a[l];
    return outside;
  }
  if (on_behalf) actor.lanes.part_shift = on_behalf->part_shift(actor.lanes.part_shift);  // the same for each row
  bool unwritten = false;
  each_lane_range(a, bytes, mask, on_behalf, [&](uint64_t begin, uint64_t size, int, const LaneSet& set) {
    Cta& cta = others ? *shared_cta(issuer, begin) : issuer;
    if (&cta != &issuer) cta.visited(actor);
    if (checks) {
      const Use here = &cta == &issuer && use == Use::write ? Use::store : use;  // st and stmatrix settle this CTA's
      const auto offset = static_cast<uint32_t>(shared_offset_of(begin));
      actor.lanes.place(offset, set);
      cta.shadow.access(actor, offset, static_cast<uint32_t>(size), here);
      if (use == Use::load) unwritten |= cta.shadow.loaded_unwritten();
    }
  });
  if (unwritten) note_unwritten(w, a, bytes, mask);
  for (int l = 0; l < kLanes; ++l) {
    Cta* const cta = others ? shared_cta(issuer, a[l]) : &issuer;
    host[l] = cta ? cta->shared.data() + shared_offset_of(a[l]) : nullptr;
  }
  return outside;
}

Mask access_local(Warp& w, const uint64_t a[kLanes], int bytes, Mask mask, uint8_t* host[kLanes]) {
  Mask outside = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (!within(w.local[l].size(), a[l], bytes)) outside |= Mask{1} << l;
    host[l] = w.local[l].data() + a[l];
  }
  return outside;
}

Mask access_param(Warp& w, const uint64_t a[kLanes], int bytes, Use use, Mask mask, uint8_t* host[kLanes]) {
  const uint64_t launched = launched_bytes(w), size = param_bytes(w);
  Mask outside = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (!within(size, a[l], bytes)) outside |= Mask{1} << l;
    host[l] = a[l] < launched ? const_cast<uint8_t*>(w.cta->launch->parameters.data()) + a[l]
                              : w.frame->parameters.get() + l * w.frame->code->param_bytes + a[l];
    if (a[l] < launched && is_write(use)) w.fail_at(Kind::illegal, "a kernel's parameters are read-only", l, a[l]);
  }
  return outside;
}

Mask access_global(Warp& w, const uint64_t a[kLanes], int bytes, Use use, Mask mask, uint8_t* host[kLanes]) {
  GlobalCheck check(w, use);
  bool inside = true;
  each_range(a, bytes, [&](uint64_t begin, uint64_t size, int lane) { inside = inside && check(begin, size, lane); });
  Mask outside = 0;
  for (Mask rest = inside ? 0 : mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (!check(a[l], bytes, l)) outside |= Mask{1} << l;
  }
  for (int l = 0; l < kLanes; ++l) host[l] = reinterpret_cast<uint8_t*>(a[l]);
  return outside;
}

constexpr int kMostBytes = 16;  // that a lane accesses

// Where a lane's access goes that cannot be made.
uint8_t* nowhere(Use use, int lane) {
  static const std::array<uint8_t, kMostBytes> poison = [] {
    std::array<uint8_t, kMostBytes> bytes;
    bytes.fill(0xff);
    return bytes;
  }();
  thread_local std::array<uint8_t, kMostBytes> dropped[kLanes];
  if (!is_write(use)) return const_cast<uint8_t*>(poison.data());
  dropped[lane] = poison;
  return dropped[lane].data();
}

// What strong accesses to shared and global memory teach: before the access, as a release must not cover it.
void synchronise(Warp& w, bool shared, const uint64_t a[kLanes], int bytes, Use use, Mask mask, Ordering ordering) {
  uint64_t last = ~uint64_t{0};
  for (int l = 0; l < kLanes; ++l) {
    uint64_t line = a[l] >> 7;
    if (shared) line = (a[l] >> kRankShift ? a[l] : cluster_address(w.cta->rank, a[l])) >> 7 | uint64_t{1} << 60;
    if (line != last) w.cta->cluster->sync_points.meet(w, mask, line, ordering.scope);
    last = line;
  }
  Launch& l = *w.cta->launch;
  if (is_read(use)) look(w);
  if (l.execution) l.execution->access(*w.cta, shared, a, bytes, use, mask);
  if (shared || ordering.scope != Scope::gpu || !l.options.checks) return;
  if (is_write(use)) l.releases.release(w, ordering.releases);
  w.acquires = is_read(use);
}

}  // namespace

LaneAddresses::LaneAddresses(Warp& w, const uint64_t address[kLanes], int bytes, Mask mask, bool shared)
    : warp_(w), address_(address), bytes_(bytes), mask_(mask), shared_(shared) {
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdangling-pointer"  // g++ 16 does not see that the destructor takes it away
  w.accessing = this;
#pragma GCC diagnostic pop
}

LaneAddresses::~LaneAddresses() { warp_.accessing = nullptr; }

int LaneAddresses::lane_of(uint64_t byte) const {
  for (Mask rest = mask_; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (byte - (shared_ ? shared_offset_of(address_[l]) : address_[l]) < static_cast<uint64_t>(bytes_)) return l;
  }
  return -1;
}

void access(Warp& w, ptx::Space space, const uint64_t address[kLanes], int bytes, Use use, Mask mask,
            uint8_t* host[kLanes], Ordering ordering, const LaneSet* on_behalf) {
  using ptx::Space;
  // Lanes that do not take part repeat the first that does.
  uint64_t a[kLanes];
  const uint64_t* lanes = address;
  if (mask != kAllLanes) {
    const uint64_t first = address[__builtin_ctz(mask)];
    for (int l = 0; l < kLanes; ++l) a[l] = mask >> l & 1 ? address[l] : first;
    lanes = a;
  }
  uint64_t ones = 0;
  for (int l = 0; l < kLanes; ++l) ones |= lanes[l];
  // Some lanes apart: they are in another space, or nowhere.
  const auto without = [&](Mask some, auto access_some) {
    if (mask & ~some) access(w, space, address, bytes, use, mask & ~some, host, ordering, on_behalf);
    uint8_t* others[kLanes];
    access_some(others);
    for (Mask rest = some; rest; rest &= rest - 1) host[__builtin_ctz(rest)] = others[__builtin_ctz(rest)];
  };
  if (__builtin_expect(ones & (bytes - 1), 0)) {
    Mask misaligned = 0;
    for (int l = 0; l < kLanes; ++l) misaligned |= Mask{(lanes[l] & (bytes - 1)) != 0} << l;
    misaligned &= mask;
    const int first = __builtin_ctz(misaligned);
    Finding f =
        finding_at(Kind::misaligned,
                   bytes_at(use, bytes, hexadecimal(address[first])) + " must be aligned to " + std::to_string(bytes),
                   address[first]);
    f.lane = first;
    w.cta->cluster->report(std::move(f));
    return without(misaligned, [&](uint8_t** others) {
      for (int l = 0; l < kLanes; ++l) others[l] = nowhere(use, l);
    });
  }
  if (space == Space::none) {
    space = Space::global;
    if (ones & kWindowMask) {
      const uint64_t window = lanes[__builtin_ctz(mask)] & kWindowMask;
      Mask here = 0;
      for (int l = 0; l < kLanes; ++l) here |= Mask{(lanes[l] & kWindowMask) == window} << l;
      if (here != kAllLanes) {  // lanes in different spaces
        space = Space::none;
        return without(mask & here,
                       [&](uint8_t** others) { access(w, space, address, bytes, use, mask & here, others, ordering); });
      }
      if (window != kWindowMask) {
        space = window == kSharedWindow ? Space::shared_cluster : Space::local;
        for (int l = 0; l < kLanes; ++l) a[l] = lanes[l] - window;
        lanes = a;
      }
    }
  }
  if (w.count) count_access(w, space, lanes, bytes, use, mask);
  const bool shared = space == Space::shared || space == Space::shared_cluster;
  const bool ordered = is_strong(use) && space != Space::local && space != Space::param;
  if (ordered) synchronise(w, shared, lanes, bytes, use, mask, ordering);
  if (use == Use::fresh) look(w);
  if (use == Use::fresh && w.cta->launch->execution)
    w.cta->launch->execution->access(*w.cta, shared, lanes, bytes, use, mask);
  if (is_write(use) && use != Use::atomic && (shared || space == Space::global)) ++w.effects;
  const LaneAddresses accessing(w, lanes, bytes, mask, shared);
  const Mask lost = shared                  ? access_shared(w, space, lanes, bytes, use, mask, host, on_behalf)
                    : space == Space::local ? access_local(w, lanes, bytes, mask, host)
                    : space == Space::param ? access_param(w, lanes, bytes, use, mask, host)
                                            : access_global(w, lanes, bytes, use, mask, host);
  if (__builtin_expect(lost, 0)) {
    const int first = __builtin_ctz(lost);
    Finding f = outside(w, space, lanes[first], bytes, use, first);
    if (f.kind == Kind::illegal) throw f;
    w.cta->cluster->report(std::move(f));
    for (Mask rest = lost; rest; rest &= rest - 1) {
      host[__builtin_ctz(rest)] = nowhere(use, __builtin_ctz(rest));
    }
  }
  if (ordered) w.release();
}

uint8_t* access_global(Warp& w, uint64_t address, uint64_t bytes, Use use, int lane, bool under_way) {
  w.effects += is_write(use);
  if (!GlobalCheck(w, use, under_way)(address, bytes, lane))
    throw outside(w, ptx::Space::global, address, bytes, use, lane);
  return reinterpret_cast<uint8_t*>(address);
}

}  // namespace gpuless
