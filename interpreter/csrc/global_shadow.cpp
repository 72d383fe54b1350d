#include "global_shadow.h"

#include <sys/mman.h>

#include <new>

#include "machine.h"

namespace gpuless {
namespace {

constexpr uint64_t kWord = 4, kPageBytes = 1 << 16;
constexpr size_t kPast = 64;
constexpr int64_t kManyPages = 4096;  // half a gigabyte of cells

void* zeros(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return p;
}

}  // namespace

// Both come from zeros(): no constructor runs, and pages that are never touched take no memory.
struct GlobalShadow::Page {
  std::atomic<Cell> cells[kPageBytes / kWord];
  std::atomic<uint32_t> lines[kPageBytes / kWord];
};
struct GlobalShadow::Leaf {
  std::atomic<Page*> pages[size_t{1} << kLeafBits];
};

GlobalShadow& global_shadow() {
  static GlobalShadow shadow;
  return shadow;
}

GlobalShadow::Page* GlobalShadow::page(uint64_t address, bool make) {
  const auto get = [&](auto& slot, auto* type) {
    auto* page = slot.load(std::memory_order_acquire);
    if (page || !make) return page;
    auto* candidate = static_cast<decltype(type)>(zeros(sizeof *type));
    if (slot.compare_exchange_strong(page, candidate, std::memory_order_acq_rel)) {
      pages_ += std::is_same_v<decltype(candidate), Page*>;
      return candidate;
    }
    munmap(candidate, sizeof *type);  // another thread was first
    return page;
  };
  Leaf* leaf = get(leaves_[(address >> (kPageBits + kLeafBits)) % std::size(leaves_)], static_cast<Leaf*>(nullptr));
  return leaf ? get(leaf->pages[(address >> kPageBits) % std::size(leaf->pages)], static_cast<Page*>(nullptr))
              : nullptr;
}

GlobalShadow::Recording::Recording(GlobalShadow& shadow, Launch& l) : shadow_(shadow) {
  const std::lock_guard lock(shadow.mutex_);
  const uint64_t ctas = l.grid_size();
  // An ordinary launch comes after everything before it.
  const bool alone = !l.programmatic && !shadow.running_;
  if (alone && (shadow.pages_ > kManyPages || shadow.next_serial_ + ctas > UINT32_MAX)) shadow.forget_everything();
  auto& past = shadow.past_;
  l.first_serial = l.concurrent_serial = shadow.next_serial_;
  for (auto p = past.rbegin(); p != past.rend() && p->number >= l.first_concurrent; ++p)
    if (p->number != l.number) l.concurrent_serial = p->first;  // not this one in another order
  past.push_back({l.number, l.first_serial, l.code->name});
  if (past.size() > kPast) past.pop_front();
  shadow.next_serial_ += static_cast<uint32_t>(ctas);
  ++shadow.running_;
}

GlobalShadow::Recording::~Recording() {
  const std::lock_guard lock(shadow_.mutex_);
  --shadow_.running_;
}

GlobalShadow::Access::Access(GlobalShadow& shadow, const Warp& w, Use use, bool under_way)
    : shadow_(shadow), warp_(w), use_(use), write_(is_write(use)), line_(write_ ? w.line() : 0) {
  const Cta& cta = *w.cta;
  const bool waited = w.knowledge.seen.clocks[kGridAgent] != 0;
  // griddepcontrol.wait orders what earlier launches wrote before a load, but .nc asks that nobody writes for as long
  // as this launch runs, and it may have begun before they did.
  const bool ordered = waited && use != Use::constant;
  oldest_ = Cell{ordered ? cta.launch->first_serial : cta.launch->concurrent_serial} << kSerial;
  const Cell me = Cell{cta.serial} << kSerial | static_cast<Cell>(w.id) << kWarp;
  // A warp's own writes are in order before it, but for .nc nobody may have written.
  exempt_ = use == Use::constant ? 0 : me;
  const Cell clock = w.knowledge.seen.clocks[w.agent] - cta.cluster->base, written = under_way ? kUnderWay : clock;
  // Beyond its field a clock cannot be compared: such a writer leaves no trace.
  stamp_ = clock < kUnderWay ? me | Cell{is_strong(use)} << kStrong | written << kClock : 0;
}

template <bool kWrite>
void GlobalShadow::Access::scan(uint64_t begin, uint64_t bytes) const {
  const uint64_t end = begin + bytes;
  for (uint64_t address = begin; address < end;) {
    const uint64_t page_end = std::min(end, (address | (kPageBytes - 1)) + 1);
    Page* p = shadow_.page(address, kWrite);
    if (!p) {
      address = page_end;
      continue;
    }
    std::atomic<Cell>* cell = &p->cells[address % kPageBytes / kWord];
    std::atomic<uint32_t>* line = &p->lines[address % kPageBytes / kWord];
    const auto part = [&](Cell mask) {
      const Cell value = cell->load(std::memory_order_relaxed);
      if (value >= oldest_ && (value & mask) && (value & kOwner) != exempt_) check(value, *line, address, mask);
      const bool same = (value ^ stamp_) >> kClock == 0;
      if (kWrite) cell->store(stamp_ ? stamp_ | mask | (same ? value & kAll : 0) : 0, std::memory_order_relaxed);
      if (kWrite) line->store(line_, std::memory_order_relaxed);
      ++cell;
      ++line;
    };
    if (const uint64_t into = address % kWord) {
      const uint64_t next = std::min(page_end, address - into + kWord);
      part((kAll << into) & (kAll >> (kWord - into - (next - address))));
      address = next;
    }
    const Cell whole = stamp_ ? stamp_ | kAll : 0;
    for (; address + kWord <= page_end; address += kWord, ++cell, ++line) {
      const Cell value = cell->load(std::memory_order_relaxed);
      if (value >= oldest_ && (value & kOwner) != exempt_) check(value, *line, address, kAll);
      if (kWrite) cell->store(whole, std::memory_order_relaxed);
      if (kWrite) line->store(line_, std::memory_order_relaxed);
    }
    if (address < page_end) {
      part(kAll >> (kWord - (page_end - address)));
      address = page_end;
    }
  }
}

void GlobalShadow::Access::operator()(uint64_t begin, uint64_t bytes) const {
  write_ ? scan<true>(begin, bytes) : scan<false>(begin, bytes);
}

// For a warp of a CTA of this launch: what it did at clocks below the result, counted from when its cluster began,
// comes before the access.
Clock GlobalShadow::Access::known(uint64_t cta, int warp) const {
  Cluster& issuer = *warp_.cta->cluster;
  const auto& clocks = warp_.knowledge.seen.clocks;
  const uint64_t size = issuer.ctas.size(), cluster = cta / size;
  const int of_cluster = static_cast<int>(cta % size * warp_.cta->warps.size()) + warp;
  if (cluster == issuer.number) return clocks[kFirstWarp + of_cluster] - (issuer.base - 1);
  return issuer.launch->releases.known(cluster, of_cluster, clocks[kAcquireAgent]);
}

void GlobalShadow::Access::check(Cell cell, uint32_t line, uint64_t address, Cell mask) const {
  const Cta& cta = *warp_.cta;
  const Launch& l = *cta.launch;
  const auto serial = static_cast<uint32_t>(cell >> kSerial);
  const uint64_t number = serial - l.first_serial;  // of the block, if it is one of this launch
  const uint64_t byte = address / kWord * kWord + __builtin_ctzll(cell & mask);
  if (serial < l.first_serial) {
    return report(cell, 0, byte,
                  use_ == Use::constant ? ".nc is for data that does not change while the kernel runs, which may have "
                                          "begun before that one wrote: after griddepcontrol.wait, load without it"
                                        : "missing griddepcontrol.wait");
  }
  if (number >= l.grid_size()) return;  // another host thread launches at the same time
  if (use_ == Use::constant) {
    return report(cell, line, byte, ".nc is for data that does not change while the kernel runs");
  }
  if (is_strong(use_) && (cell >> kStrong & 1)) return;
  // In place, a warp may load what its twin has stored already; it stores nothing and nobody sees the difference.
  if (l.module->replicates && !is_write(use_) && serial == cta.serial) return;
  const int warp = static_cast<int>(cell >> kWarp & (kMaxWarps - 1));
  if ((cell & kOwner) != owner_) {
    owner_ = cell & kOwner;
    known_ = known(number, warp);
  }
  const Cell clock = cell >> kClock & kUnderWay;
  if (clock == kUnderWay) {
    return report(cell, line, byte,
                  "the first is a bulk store, and its thread has not waited until it is complete; "
                  "cp.async.bulk.wait_group.read waits for its reads alone");
  }
  if (static_cast<Clock>(clock) < known_) return;
  bool released = false;  // by another block, to this one
  for (size_t k = 0; k < cta.warps.size() && serial != cta.serial; ++k) {
    released |= known(number, static_cast<int>(k)) != 0;
  }
  report(cell, line, byte,
         released ? "what this block knows of that one's releases does not cover the first; before a relaxed one a "
                    "fence is due, before one by another warp a barrier"
                  : "nothing orders the two");
}

void GlobalShadow::Access::report(Cell cell, uint32_t line, uint64_t byte, const std::string& why) const {
  const Cta& cta = *warp_.cta;
  const Launch& l = *cta.launch;
  const auto serial = static_cast<uint32_t>(cell >> kSerial);
  const Kind kind = (cell >> kClock & kUnderWay) == kUnderWay ? Kind::in_flight : Kind::race;
  if (cta.cluster->again(kind, line)) return;
  const auto place = [&](uint32_t ptx_line) { return " at " + source_place(*l.module, ptx_line); };
  std::string who;
  if (serial < l.first_serial) {
    who = "an earlier kernel";
    const std::lock_guard lock(shadow_.mutex_);
    for (const Past& p : shadow_.past_)
      if (p.first <= serial) who = "kernel " + demangled(p.name);
    who += ", launched before this programmatic dependent launch";
  } else {
    unsigned index[3];
    l.index_of(serial - l.first_serial, index);
    const std::string block =
        "block (" + std::to_string(index[0]) + ", " + std::to_string(index[1]) + ", " + std::to_string(index[2]) + ")";
    who = "warp " + std::to_string(cell >> kWarp & (kMaxWarps - 1)) + " of " +
          (serial == cta.serial ? "this block" : block) + place(line);
  }
  const char* verb = use_ == Use::atomic ? "atomic" : write_ ? "write" : "read";
  Finding f = finding_at(kind,
                         "write by " + who + ", then " + verb + " by warp " + std::to_string(warp_.id) +
                             place(warp_.line()) + " of " + describe(l, byte) + ": " + why,
                         byte);
  if ((use_ == Use::fresh || use_ == Use::compared) && (cell >> kStrong & 1)) {
    f.breaks = Breaks::isa;
    f.message += ". The first is an atomic or a strong write, and ";
    f.message += use_ == Use::fresh ? "GPUs read up to 8 bytes with .cg as with .relaxed, which would be right"
                                    : "an atom.cas compares the value with what is there, so that an old one does no "
                                      "harm; .relaxed would be right";
  }
  cta.place_other(f, line);
  cta.cluster->report(std::move(f));
}

void GlobalShadow::forget(uint64_t begin, uint64_t bytes) {
  const uint64_t end = begin + bytes;
  for (uint64_t address = begin; address < end;) {
    const uint64_t page_end = std::min(end, (address | (kPageBytes - 1)) + 1);
    if (Page* p = page(address, false)) {
      if (page_end - address == kPageBytes) {
        madvise(p, sizeof *p, MADV_DONTNEED);  // zeros again, and their memory is free
      } else {
        for (uint64_t word = address / kWord; word * kWord < page_end; ++word) {
          p->cells[word % std::size(p->cells)].store(0, std::memory_order_relaxed);
        }
      }
    }
    address = page_end;
  }
}

void GlobalShadow::forget_everything() {
  for (auto& slot : leaves_) {
    Leaf* leaf = slot.load(std::memory_order_acquire);
    if (!leaf) continue;
    for (auto& p : leaf->pages)
      if (Page* page = p.exchange(nullptr)) munmap(page, sizeof *page);
  }
  pages_ = 0;
  past_.clear();
  next_serial_ = 1;
}

}  // namespace gpuless
