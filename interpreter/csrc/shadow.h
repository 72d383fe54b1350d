#pragma once
// What is known of every byte of a CTA's shared memory: written or not, under way or not, who wrote and who read it
// last.
//
// State is kept per granule of 16 bytes, whole accesses of which are the rule; one that is touched in parts splits into
// smaller cells, down to bytes if need be, so that neighbours never raise a false alarm. A cell holds the epoch of its
// last write and, in a row of its own, the clock of each warp's last read. A write is ordered after the reads before
// it, so it starts the row anew. Agents that are none of the CTA's warps have a row apart, which only cells have that
// several of them have read: most are read by one, which the cell holds itself.
//
// Of the last write and of the last reader's reads a cell also knows the lanes, to which the order of the warp matters
// (lane_order.h): two lanes of a warp are as unordered as two warps until something orders them. Reads of a warp that
// another one has read after are forgotten.
//
// Clocks only ever grow, from one cluster of a thread to the next: what a former CTA left behind lies below
// Cluster::base and so in everybody's past, and nothing but the masks needs clearing. Who acts knows of every agent
// that a cell may name (Cluster::complement).
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "clock.h"
#include "finding.h"
#include "lane_order.h"

namespace gpuless {

struct Cta;
struct Module;

constexpr uint32_t kGranule = 16;  // bytes

// strong: .volatile, .relaxed and above, which may meet each other unordered; `atomic` reads and writes at once.
// constant: .nc, whose bytes must not change while the kernel runs. load: a read into registers, which may be of bytes
// that nothing has written (undefined.h). fresh: a weak load of up to 8 bytes that no L1 serves (.cg, .cv), which GPUs
// make as a relaxed one, in global memory. compared: a load of global memory whose value an atom.cas compares with what
// is there. store: a write by a warp to its CTA's shared memory. That another warp wrote
// there, unordered with it, is no race where the bytes stay as they are: Triton has each warp that holds a copy of a
// value store it. Shadow::settle() has to follow, once the bytes are there.
enum class Use : uint8_t { read, write, store, atomic, strong_read, strong_write, constant, load, fresh, compared };
constexpr bool is_read(Use u) { return u != Use::write && u != Use::store && u != Use::strong_write; }
constexpr bool is_write(Use u) { return !is_read(u) || u == Use::atomic; }
constexpr bool is_strong(Use u) { return u == Use::atomic || u == Use::strong_read || u == Use::strong_write; }

// copy: what cp.async writes, which is of the generic proxy.
enum class Proxy : uint8_t { generic, copy, async };

struct Actor {
  int agent;
  Clock now;
  const Knowledge* knowledge;
  Proxy proxy;
  uint32_t line = 0;  // of the PTX, for messages
  LaneRange lanes;    // for which lanes of which warp: of `agent` itself, or of what issued it
};

// Where a line of the PTX comes from; line 0: no .loc says so.
struct SourceLine {
  std::string file;
  int line = 0;
};
SourceLine source_line(const Module&, uint32_t ptx_line);
// "file.cu:12" for a line of the PTX that .loc maps to a source, "PTX line 34" otherwise.
std::string source_place(const Module&, uint32_t ptx_line);

class Shadow {
 public:
  // For a CTA that begins: nothing is written. The clocks of its agents must have grown since the one before it.
  // `tensor`: a byte here is a cell of tensor memory (tensor_memory.h).
  enum class Space : uint8_t { shared, tensor };
  void reset(const Cta&, size_t bytes, Space = Space::shared);
  void forget();  // the clocks start again

  // Each reports what is wrong (race, in_flight, uninitialised) and does the access all the same. The range lies within
  // shared memory.
  void access(const Actor&, uint32_t begin, uint32_t bytes, Use);
  // Accesses of 16 bytes, a granule, by each lane of the mask. `on_behalf`: lane l's by the lanes on_behalf[l % 8].
  void access_granules(Actor, const uint64_t begin[kLanes], Mask, const LaneSet* on_behalf, Use);
  void settle() {
    if (__builtin_expect(!doubts_.empty(), 0)) settle_doubts();
  }
  void read(const Actor& a, uint32_t begin, uint32_t bytes) { access(a, begin, bytes, Use::read); }
  void write(const Actor& a, uint32_t begin, uint32_t bytes) { access(a, begin, bytes, Use::write); }
  void atomic(const Actor& a, uint32_t begin, uint32_t bytes) { access(a, begin, bytes, Use::atomic); }

  // Whether a load touched bytes that nothing has written, since this was asked last.
  bool loaded_unwritten() { return std::exchange(loaded_unwritten_, false); }
  bool written(uint32_t begin, uint32_t bytes);
  Finding unwritten(const Actor&, uint32_t begin, uint32_t bytes);  // what there is to say about them
  std::string writer_of(uint32_t begin) const;                      // "write by warp 3 at file.cu:12", "" for none
  void store_undefined(uint32_t begin, uint32_t bytes);             // what was stored there is as if nothing had been

  // An asynchronous operation will write the range: anybody's access until land() is a finding. To land counts as the
  // write.
  void take_off(const Actor&, uint32_t begin, uint32_t bytes);
  void land(const Actor&, uint32_t begin, uint32_t bytes);
  // The same of 16 bytes by each lane of the mask.
  void take_off_granules(Actor, const uint64_t begin[kLanes], Mask);
  void land_granules(Actor, const uint64_t begin[kLanes], Mask);

  // alive: an mbarrier object is there from now on, and only mbarrier instructions may touch its 8 bytes; else no
  // longer.
  void set_mbarrier(const Actor&, uint32_t begin, bool alive);
  // The object's init must be ordered before the use. `published`: fence.mbarrier_init has done that.
  void use_mbarrier(const Actor&, uint32_t begin, bool published = false);

  std::string name_of(int agent) const;  // "warp 3", "warp 3 of the CTA of rank 1", "an asynchronous operation"

 private:
  struct alignas(32) Cell {
    Clock clock = 0;  // of the last write, by `writer`
    uint32_t write_line = 0, read_line = 0;
    int16_t writer = 0, reader = 0;
    // Lanes of writer and reader. Among the reader's own lanes, all its reads since read_since count as made at that
    // clock: lanes that know of the first one are not asked to know of a later one by another lane.
    Mask write_lanes = 0, read_lanes = 0;
    Clock read_since = 0;
    bool writers_spread = false, readers_spread = false;
    uint8_t manner = 0;  // of the write: kStrong, kAsync, kCopied
    // Readers that are none of the CTA's warps: none; one, which is `reader` and has read at read_since last; or those
    // in its rows of others_.
    enum class Readers : uint8_t { none, one, rows } others = Readers::none;
    static constexpr uint8_t kStrong = 1, kAsync = 2, kCopied = 4;
    bool strong() const { return manner & kStrong; }
    bool async() const { return manner & kAsync; }
    bool copied() const { return manner & kCopied; }
    LaneSet writers() const { return {write_lanes, writers_spread}; }
    LaneSet readers() const { return {read_lanes, readers_spread}; }
    void set_writers(LaneSet s) { write_lanes = s.lanes, writers_spread = s.spread != 0; }
    void set_readers(LaneSet s) { read_lanes = s.lanes, readers_spread = s.spread != 0; }
  };
  struct Doubt {
    uint32_t number;  // of the granule
    uint16_t mask;    // its bytes that are in doubt
    std::array<uint8_t, 16> before;
    Finding finding;
  };
  struct Granule {
    uint16_t written = 0, flying = 0;  // bytes
    uint8_t mbarriers = 0;             // halves
    uint8_t shift = 4;                 // log2 of the bytes of a cell
    uint8_t room = 4;                  // the smallest shift that cells_ has room for at `split`
    uint32_t split = 0;
    // In one piece, with nothing under way and no mbarrier; to be read, also with every byte written. In one comparison
    // of all that comes before `room`, as every access asks for it.
    bool plain(bool to_read) const {
      uint64_t all;
      std::memcpy(&all, this, sizeof all);
      return to_read ? (all & 0xffff'ffff'ffff) == 0x0400'0000'ffff : (all & 0xffff'ffff'0000) == 0x0400'0000'0000;
    }
  };
  // Cells, each followed by its row: the clock of every warp's last read, by the CTA's warps. So an access touches one
  // line of the cache where the CTA has up to 8 warps.
  class Cells {
   public:
    void shape(int columns) {  // of the rows; a multiple of 8
      const size_t lines = (sizeof(Cell) + columns * sizeof(Clock) + sizeof(Line) - 1) / sizeof(Line);
      if (std::exchange(lines_per_cell_, lines) != lines) lines_.clear();
    }
    size_t size() const { return lines_.size() / lines_per_cell_; }
    void resize(size_t cells) { lines_.resize(cells * lines_per_cell_); }
    void forget() { std::fill(lines_.begin(), lines_.end(), Line()); }
    Cell& operator[](size_t k) { return *reinterpret_cast<Cell*>(&lines_[k * lines_per_cell_]); }
    const Cell& operator[](size_t k) const { return *reinterpret_cast<const Cell*>(&lines_[k * lines_per_cell_]); }
    Clock* reads(size_t k) { return reinterpret_cast<Clock*>(&(*this)[k] + 1); }
    const Clock* reads(size_t k) const { return reinterpret_cast<const Clock*>(&(*this)[k] + 1); }

   private:
    struct alignas(64) Line {
      std::byte bytes[64] = {};
    };
    size_t lines_per_cell_ = 1;
    std::vector<Line> lines_;
  };
  // What of an actor every granule needs, once for all of them and by value: an Actor is in memory, which to the
  // compiler each store to a cell may change.
  struct Access {
    const Clock *seen, *proxied;
    Clock now, floor;
    uint32_t line;
    int agent, column, warp;  // its column in a row of the CTA's warps, or -1; the warp whose lanes they are
    Proxy proxy;
    __m256i written;  // a Cell that it has written, but for the lanes
  };
  Access access_of(const Actor&, bool strong = false) const;
  template <class F>
  void each_granule(uint32_t begin, uint32_t bytes, F f);
  template <Use>
  bool touch_whole(const Access&, const Actor&, uint32_t number, LaneSet);
  template <Use>
  void touch(const Actor&, uint32_t begin, uint32_t bytes);
  void prefetch(const uint64_t begin[kLanes], Mask) const;
  template <Use, class F>
  void touch_granules(Actor&, const uint64_t begin[kLanes], Mask, const LaneSet* on_behalf, F then);
  template <Use>
  void touch_parts(const Actor&, uint32_t begin, uint32_t bytes);
  template <Use>
  void check(const Access&, const Actor&, uint32_t cell, uint32_t number, uint16_t mask, LaneSet);
  template <Use>
  bool in_order(const Access&, uint32_t cell) const;  // false: maybe not
  template <Use>
  void look_closely(const Actor&, uint32_t cell, uint32_t number, uint16_t mask, LaneSet);
  void settle_doubts();
  bool reads_known(uint32_t cell, const Clock* seen) const;
  void record_read(const Access&, uint32_t cell, LaneSet);
  void record_write(const Access&, uint32_t cell, LaneSet);
  // Whether lanes of the same warp have read the cell so recently that they must be kept beside the new ones; and
  // whether one LaneSet can hold both.
  static bool reads_again(const Access&, const Cell&);
  static bool fits(const Cell&, LaneSet);
  void split(uint32_t number, int shift);
  void make_room();
  // Its rows of others_, which begin with what the cell holds. The clock there of an agent that reads.
  void make_rows(uint32_t cell);
  Clock& other_read(uint32_t cell, int agent);
  bool is_local(int agent) const { return static_cast<unsigned>(agent - first_) < static_cast<unsigned>(warps_); }
  Clock last_read(uint32_t cell, int agent) const;

  void end_mbarriers(Granule&, uint32_t number, uint16_t mask);  // that are written over
  bool idle_mbarrier(uint32_t address) const;                    // one that nobody has used lies there
  // Of the bytes in `mask` of a granule; check_state reports only where one of them is at fault, the others report.
  void check_state(const Actor&, const Granule&, uint32_t number, uint16_t mask, Use) const;
  Finding unwritten_bytes(const Actor&, uint32_t number, uint16_t bad, Use) const;
  void check_write(const Actor&, uint32_t cell, uint32_t number, uint16_t mask, Use, bool write_seen);  // or doubts
  void check_reads(const Actor&, uint32_t cell, uint32_t number, uint16_t mask, Use) const;
  void check_lanes(const Actor&, uint32_t cell, uint32_t number, Use, LaneSet, bool write);  // after a write, or reads
  void doubt(uint32_t number, uint16_t mask, Finding);
  void report(Kind, uint32_t address, std::string message, uint32_t other_line, Breaks = Breaks::hardware) const;
  std::string access_by(const char* verb, int agent, uint32_t line) const;  // "read by warp 3 at file.cu:12"
  std::string range(uint32_t begin, uint32_t bytes) const;
  uint32_t address_of(uint32_t index, uint32_t number) const {
    const Granule& g = granules_[number];
    return number * kGranule + (g.shift == 4 ? 0 : (index - g.split) << g.shift);
  }

  const Cta* cta_ = nullptr;
  Space space_ = Space::shared;

  std::vector<Granule> granules_;
  Cells cells_;  // one for every granule, then those of split ones
  bool loaded_unwritten_ = false;
  std::vector<Doubt> doubts_;
  uint32_t used_ = 0;       // of cells_, which never shrinks
  int first_ = kFirstWarp;  // agent of the CTA's first warp
  int warps_ = 0;           // of the CTA
  int columns_ = 8;         // the same rounded up to a multiple of 8
  // Reads of other agents, which are asynchronous or of other CTAs: eight agents that follow each other together, where
  // one of them has read in this CTA. They hold anything but where Cell::others says `rows`.
  struct Others {
    int first;                 // agent
    std::vector<Clock> reads;  // [cell][agent]
    Clock* row(size_t cell) { return &reads[cell * 8]; }
    const Clock* row(size_t cell) const { return &reads[cell * 8]; }
  };
  std::vector<Others> others_;
  int others_used_ = 0;       // those of this CTA; what lies beyond is kept for its memory
  int find(int agent) const;  // of others_; others_used_: none of the eight has read here
  int find_or_add(int agent);
};

}  // namespace gpuless
