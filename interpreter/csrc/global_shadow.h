#pragma once
// Who wrote global memory last, byte by byte, across CTAs and launches: one for the process.
//
// A cell per word of 4 bytes names the last writer and which of the bytes it wrote. Another writer of other bytes of
// the word takes the cell over: what it forgets is never a false alarm. Cells are one atomic of 64 bits each, as CTAs
// run on several threads, and lie in pages that the first write makes, beside the writes' lines of the PTX, for
// messages.
//
// Found: what a CTA reads or writes after another warp or another CTA of the launch wrote it, with nothing in between
// (RAW, WAW), and what a programmatic dependent launch touches before its griddepcontrol.wait, or reads by .nc at any
// time. Between clusters strong
// accesses order, as far as one has released and the other acquired (releases.h). What a bulk store writes is known to
// nobody until it has been waited for (under_way). Not found: writes after reads, as reads leave no trace, but where
// blocks of a launch begin in another order at other seeds and the write comes first; reads after writes between the
// warps of a CTA in PTX of LLVM's whose writes have predicates (Module::replicates).
#include <atomic>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>

#include "shadow.h"

namespace gpuless {

struct Launch;
struct Warp;

class GlobalShadow {
 public:
  // For as long as a launch runs. Numbers its CTAs through all launches: sets first_serial and concurrent_serial.
  class Recording {
   public:
    Recording(GlobalShadow&, Launch&);
    ~Recording();
    Recording(const Recording&) = delete;

   private:
    GlobalShadow& shadow_;
  };
  void forget(uint64_t begin, uint64_t bytes);

 private:
  struct Page;
  struct Leaf;
  // Of a cell: serial of the CTA 32 | strong 1 | warp 5 | clock since the CTA began 22 | bytes written 4.
  using Cell = uint64_t;
  static constexpr int kSerial = 32, kStrong = 31, kWarp = 26, kClock = 4;
  static constexpr Cell kUnderWay = (Cell{1} << (kWarp - kClock)) - 1, kAll = 15;  // kUnderWay: a clock, the last
  static constexpr Cell kOwner = ~Cell{0} << kSerial | Cell{kMaxWarps - 1} << kWarp;

 public:
  // One instruction of a warp: every range that it touches. Reports what is wrong.
  class Access {
   public:
    Access(GlobalShadow&, const Warp&, Use, bool under_way);
    void operator()(uint64_t begin, uint64_t bytes) const;

   private:
    template <bool kWrite>
    void scan(uint64_t begin, uint64_t bytes) const;
    void check(Cell cell, uint32_t line, uint64_t address, Cell mask) const;
    void report(Cell cell, uint32_t line, uint64_t byte, const std::string& why) const;
    Clock known(uint64_t cta, int warp) const;
    GlobalShadow& shadow_;
    const Warp& warp_;
    const Use use_;
    const bool write_;
    const uint32_t line_;
    Cell oldest_, exempt_, stamp_;  // cells below oldest_ and of exempt_'s owner are no conflict
    mutable Cell owner_ = 0;        // of the cell before, as neighbours often have one,
    mutable Clock known_ = 0;       // and how far it is known
  };

 private:
  Page* page(uint64_t address, bool make);
  void forget_everything();
  static constexpr int kPageBits = 16, kLeafBits = 16;  // of 48-bit addresses
  std::atomic<Leaf*> leaves_[size_t{1} << (48 - kPageBits - kLeafBits)] = {};
  std::atomic<int64_t> pages_{0};
  mutable std::mutex mutex_;  // of what follows
  int running_ = 0;           // launches
  uint32_t next_serial_ = 1;
  struct Past {
    uint64_t number;
    uint32_t first;
    std::string name;
  };
  std::deque<Past> past_;  // launches, the newest last
};

GlobalShadow& global_shadow();

}  // namespace gpuless
