#pragma once
// What is known of every byte of a CTA's shared memory: written or not, under way or not, who wrote and who read it
// last.
//
// State is kept per granule of 16 bytes, whole accesses of which are the rule; one that is touched in parts splits into
// smaller cells, down to bytes if need be, so that neighbours never raise a false alarm. A cell holds the epoch of its
// last write and, in a row of its own, the clock of every agent's last read. A write is ordered after the reads before
// it, so it starts the row anew.
//
// Clocks only ever grow, from one CTA of a thread to the next: what a former CTA left behind lies below base() and so
// in everybody's past, and nothing but the masks needs clearing.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "clock.h"
#include "finding.h"

namespace forwardpass::interpreter {

struct Module;

// strong: .volatile, .relaxed and above, which may meet each other unordered; `atomic` reads and writes at once.
// constant: .nc, whose bytes must not change while the kernel runs. load: a read into registers, which may be of bytes
// that nothing has written (undefined.h).
enum class Use : uint8_t { read, write, atomic, strong_read, strong_write, constant, load };
constexpr bool is_read(Use u) { return u != Use::write && u != Use::strong_write; }
constexpr bool is_write(Use u) { return u == Use::write || u == Use::strong_write || u == Use::atomic; }
constexpr bool is_strong(Use u) { return u == Use::atomic || u == Use::strong_read || u == Use::strong_write; }

enum class Proxy : uint8_t { generic, async };

struct Actor {
  int agent;
  Clock now;
  const Knowledge* knowledge;
  Proxy proxy;
  uint32_t line = 0;  // of the PTX, for messages
};

// "file.cu:12" for a line of the PTX that .loc maps to a source, "PTX line 34" otherwise.
std::string source_place(const Module&, uint32_t ptx_line);
std::string hexadecimal(uint64_t);

class Shadow {
 public:
  // Everything not written, nobody knows of anything. The clocks of the agents must begin at base() or above.
  void reset(int64_t bytes, int warps, const Module*);
  Clock base() const { return base_; }
  void advance_base(Clock highest);

  // Each throws a Finding (race, in_flight, uninitialised) that has kind, message and address; the caller's place is
  // filled in further up. The range lies within shared memory.
  void access(const Actor&, uint32_t begin, uint32_t bytes, Use);
  void read(const Actor& a, uint32_t begin, uint32_t bytes) { access(a, begin, bytes, Use::read); }
  void write(const Actor& a, uint32_t begin, uint32_t bytes) { access(a, begin, bytes, Use::write); }
  void atomic(const Actor& a, uint32_t begin, uint32_t bytes) { access(a, begin, bytes, Use::atomic); }

  // Whether a load touched bytes that nothing has written, since this was asked last.
  bool loaded_unwritten() { return std::exchange(loaded_unwritten_, false); }
  bool written(uint32_t begin, uint32_t bytes);
  Finding unwritten(const Actor&, uint32_t begin, uint32_t bytes);  // what there is to say about them
  void store_undefined(uint32_t begin, uint32_t bytes);             // what was stored there is as if nothing had been

  // An asynchronous operation will write the range: anybody's access until land() is a finding. To land counts as the
  // write.
  void take_off(const Actor&, uint32_t begin, uint32_t bytes);
  void land(const Actor&, uint32_t begin, uint32_t bytes);

  // An mbarrier object lives there (its 8 bytes are touched by mbarrier instructions only) or no more.
  void set_mbarrier(const Actor&, uint32_t begin, bool alive);
  void use_mbarrier(const Actor&, uint32_t begin);  // init must be ordered before it

 private:
  struct Cell {
    Clock clock = 0;  // of the last write, by `writer`
    uint32_t write_line = 0, read_line = 0;
    uint32_t writer : 8, reader : 8, strong : 1, async : 1;  // the last two: of the write
    Cell() : writer(0), reader(0), strong(0), async(0) {}
  };
  struct Granule {
    uint16_t written = 0, flying = 0;  // bytes
    uint8_t mbarriers = 0;             // halves
    uint8_t shift = 4;                 // log2 of the bytes of a cell
    uint8_t room = 4;                  // the smallest shift that cells_ has room for at `split`
    uint32_t split = 0;
  };
  template <class F>
  void each_granule(uint32_t begin, uint32_t bytes, F f);
  template <Use>
  void touch(const Actor&, uint32_t begin, uint32_t bytes);
  template <Use>
  void touch_parts(const Actor&, uint32_t begin, uint32_t bytes);
  template <Use>
  void check(const Actor&, uint32_t cell, uint32_t number, uint16_t mask) const;
  bool reads_known(uint32_t cell, const VectorClock& seen) const;
  void record_read(const Actor&, uint32_t cell);
  void record_write(const Actor&, uint32_t cell, bool strong);
  void split(uint32_t number, int shift);
  void make_room();
  void meet(const Actor&);  // before it reads: an asynchronous agent might be the first
  Clock last_read(uint32_t cell, int agent) const;

  // Of the bytes in `mask` of a granule; check_state throws only where one of them is at fault.
  void check_state(const Actor&, const Granule&, uint32_t number, uint16_t mask, Use) const;
  Finding unwritten_bytes(const Actor&, uint32_t number, uint16_t bad, Use) const;
  [[noreturn]] void fail_write(const Actor&, uint32_t cell, uint32_t number, uint16_t mask, Use, bool seen) const;
  [[noreturn]] void fail_read(const Actor&, uint32_t cell, uint32_t number, uint16_t mask, Use) const;
  std::string agent_at(int agent, uint32_t line) const;

  std::vector<Granule> granules_;
  std::vector<Cell> cells_;   // one for every granule, then those of split ones
  bool loaded_unwritten_ = false;
  uint32_t used_ = 0;         // of cells_, which never shrinks
  int warps_ = 8;             // rounded up to a multiple of 8
  std::vector<Clock> reads_;  // [cell][warps_]
  // Those of the asynchronous agents lie apart, as most kernels have none: [cell][kAsyncColumns].
  static constexpr int kAsyncColumns = 16;
  std::vector<Clock> async_reads_;
  bool any_async_ = false;  // in this CTA; otherwise async_reads_ is not looked at
  const Module* module_ = nullptr;
  Clock base_ = 1;
};

}  // namespace forwardpass::interpreter
