#pragma once
// What launches cost, counted by instruction where Options::counters asks for it: csrc/README.md has the
// rules. A thread that runs CTAs writes into a Sheet of its own; a launch adds its sheets to the process's record, from
// which gpuless_profile_json reads. Without counters a warp's `count` is null and the loop of another instantiation
// runs.
#include <array>
#include <compare>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "instruction_class.h"
#include "program.h"
#include "shadow.h"

namespace gpuless {

struct Launch;
struct Options;

// issued: times that a warp executed it; active: with a lane at least; lanes: in all. waits: times that a warp found
// itself blocked there, or a test that failed. Bytes by level; those of `bulk` are of global memory, bulk_shared of the
// shared memory at the other end. An atomic is a read and a write. macs, matrix_shared: of what has its shape in a
// register; else MatrixWork has them, for each time that the instruction is active. passed: times that lanes went by,
// as their guard was off.
// clang-format off
#define GPULESS_COUNTS(X) \
  X(issued) X(active) X(lanes) X(waits) X(requests) X(sectors) X(global_read) X(global_written) X(wavefronts) \
  X(ideal_wavefronts) X(shared_read) X(shared_written) X(local_read) X(local_written) X(bulk_read) X(bulk_written) \
  X(bulk_shared) X(macs) X(matrix_shared) X(passed)
// clang-format on

struct Count {
#define GPULESS_FIELD(name) uint64_t name = 0;
  GPULESS_COUNTS(GPULESS_FIELD)
#undef GPULESS_FIELD

  void step(Step how, Mask here, Mask mask) {
    waits += how == Step::blocked || how == Step::yielded;
    if (how == Step::blocked) return;  // it comes again
    ++issued;
    active += mask != 0;
    passed += mask != here;
    lanes += static_cast<uint64_t>(__builtin_popcount(mask));
  }
  void add(const Count&, double times = 1);
};

// What a warp has executed, without the tests that failed: those are made again, and how often is up to the schedule.
// All from the failed one on is dropped where the next one is a short loop away.
class Length {
 public:
  // `passes`: a test that some lanes have passed.
  void step(const Instruction& i, Step how, bool passes = false) {
    if (how == Step::blocked) return;  // it comes again
    if (&i == failed_) {
      constexpr uint64_t kLongestLoop = 8;
      if (count_ - before_failed_ <= kLongestLoop) count_ = before_failed_;
      failed_ = nullptr;
    }
    if (how == Step::yielded && !passes) {
      failed_ = &i;
      before_failed_ = count_;
    }
    ++count_;
  }
  uint64_t count() const { return count_; }

 private:
  uint64_t count_ = 0, before_failed_ = 0;
  const Instruction* failed_ = nullptr;
};

// The sectors of global memory that were touched, each once.
class Footprint {
 public:
  void touch(uint64_t sector, bool read, bool write);
  void add(const Footprint&);
  uint64_t sectors(bool written) const;
  uint64_t touched() const { return touched_; }  // sectors, of reads and writes together

 private:
  static constexpr uint64_t kSectorsOfPage = 64;
  struct Page {
    uint64_t read = 0, written = 0;  // a bit a sector
  };
  std::unordered_map<uint64_t, Page> pages_;
  uint64_t touched_ = 0;
  uint64_t last_ = ~uint64_t{0};
  Page* last_page_ = nullptr;
};

class Sheet {
 public:
  Count* at(const Code& code, uint32_t index) {
    if (&code != code_) choose(code);
    return counts_ + index;
  }
  void add(const Sheet&);

  std::map<const Code*, std::vector<Count>> counts;
  Footprint footprint;

 private:
  void choose(const Code&);
  const Code* code_ = nullptr;
  Count* counts_ = nullptr;
};

constexpr uint64_t kSectorBytes = 32;  // what caches and DRAM move

// What the running instruction does, of a warp that is counted. Addresses of the lanes of a mask; `bytes` in all.
void count_global(Warp&, const uint64_t address[kLanes], uint64_t bytes, Use, Mask);
void count_shared(Warp&, const uint64_t address[kLanes], int bytes_of_lane, Use, Mask);
void count_access(Warp&, ptx::Space, const uint64_t address[kLanes], int bytes_of_lane, Use, Mask);
void count_bulk(Warp&, uint64_t address, uint64_t bytes, bool load);  // one row in global memory

// Of one shared-memory access: measures the wavefronts that it takes.
struct Wavefronts {
  uint64_t actual = 0, ideal = 0;
};
Wavefronts wavefronts_of(const uint64_t address[kLanes], int bytes_of_lane, Mask);

// An instruction and where it stands. Outlives its module.
struct Line {
  std::string opcode, file, inner_file;
  int line, inner_line, ptx_line;
  bool guarded;
  const char* name;  // of its class
  MatrixWork work;
  std::string json() const;  // all but the work, without braces
};
std::vector<Line> describe(const Module&, const Code&);

// Launches that are recorded together: of one kernel in one shape.
struct LaunchKey {
  uint64_t name, module;  // Options::counters; Module::serial
  std::string kernel;
  std::array<unsigned, 9> shape;  // grid, block, cluster
  int64_t shared_bytes;

  explicit LaunchKey(const Launch&);
  std::string json() const;  // the shape and the shared bytes, without braces
  auto operator<=>(const LaunchKey&) const = default;
};

// Whether a launch is: Options::counters, or GPULESS_COUNTERS=FILE and GPULESS_COVERAGE=FILE, which get the record at
// exit.
bool counted(const Options&);
// Adds a launch that is over, or that a finding ended. What was counted stands for `times` as much (Options::sample).
void record(const Launch&, const Sheet&, double times = 1);

}  // namespace gpuless
