#pragma once
// What the warps of a few CTAs executed, in order, recorded where Options::timeline asks for it: timeline_replay.h
// spends time on it. Which lanes took part and what was touched is kept; values are not. docs/interpreter.md has the
// rules.
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "counters.h"
#include "program.h"

namespace gpuless {

struct Cluster;
struct Cta;
struct Launch;
struct MBarrier;
struct Options;
struct Warp;

// What an instruction does to an mbarrier.
struct Signal {
  enum class Kind : uint8_t {
    arrive,  // count arrivals, after `bytes` more are expected
    copy,    // bytes that a bulk copy will bring
    copies,  // count arrivals once the warp's cp.async so far are there; bytes: that many more arrivals are expected
    wait,    // until the phase is at least `phase`
  } kind;
  uint16_t rank;     // of the CTA within the cluster
  uint32_t address;  // in its shared memory
  uint32_t count, bytes;
  uint32_t phase, expected;  // of the mbarrier by then
};

struct TraceEvent {
  uint32_t op;      // LaunchTrace::number
  uint32_t signal;  // first of WarpTrace::signals
  uint16_t signals;
  bool jumps;           // what follows stands elsewhere
  bool idle;            // no lane took part
  uint16_t wavefronts;  // of shared memory
  uint32_t sectors;     // of global memory
  uint32_t fresh;       // of those, that the CTA touched for the first time
  uint32_t operand;     // a barrier: its number and threads (0: all); a bulk copy: bytes of shared memory
};
constexpr int kBarrierShift = 16;

class LaunchTrace;

class WarpTrace {
 public:
  std::vector<TraceEvent> events;
  std::vector<Signal> signals;
  bool cut = false;  // there were more events than are kept

  // Around each instruction: begin's Count takes what the instruction does, end adds it to the CTA's sheet.
  Count* begin(Warp&, const Code&, const Instruction&, Mask);
  void end(Warp&, const Instruction&, Step, Mask);
  void signal(Signal::Kind, const Cta& target, const MBarrier&, uint32_t count, uint32_t bytes);

 private:
  friend class LaunchTrace;
  LaunchTrace* launch_ = nullptr;
  const Code* code_ = nullptr;
  uint32_t base_ = 0;  // number of the code's first instruction
  size_t most_ = 0;    // events that it may have, until it gets more
  Count delta_;
  uint64_t touched_ = 0;
  uint32_t operand_ = 0;
  size_t signals_ = 0;
};

struct CtaTrace {
  uint64_t number = 0;  // of the CTA: cluster by cluster, each by rank
  Sheet sheet;          // of its own, so that which sectors are fresh does not depend on the interpreter's threads
  std::vector<WarpTrace> warps;
};

// Of one launch: some CTAs of a few multiprocessors, each with those that share clusters with it, and the length of
// every one, so that the recorded ones can stand for the others. Kernels do not give all of them the same work, so that
// the first and the last are among them.
class LaunchTrace {
 public:
  explicit LaunchTrace(const Launch&);
  void begin(Cta&);  // if it is one of them
  void end(const Cluster&);
  uint32_t number(const Code&);         // of its first instruction
  std::vector<CtaTrace*> ctas() const;  // by number
  const std::map<const Code*, uint32_t>& codes() const { return codes_; }
  void add_to(Sheet&) const;  // what was counted
  size_t share();             // of the events that are kept, for one warp; 0: there are no more

  int registers = 0;    // of a thread, assumed
  int blocks = 1;       // CTAs that a multiprocessor holds
  uint64_t groups = 1;  // of multiprocessors, each with one CTA of every cluster that it has
  std::vector<uint64_t> recorded_groups, recorded_clusters;  // in order
  std::vector<uint64_t> lengths;                             // of all clusters: instructions of their warps

 private:
  static constexpr uint64_t kRecordedGroups = 4;
  static constexpr uint64_t kMostEvents = 1 << 25, kShare = 1 << 12;
  std::mutex mutex_;
  std::map<const Code*, uint32_t> codes_;
  uint32_t next_ = 0;
  uint64_t size_;                    // of a cluster
  std::atomic<uint64_t> shares_{0};  // events, of those that are kept
  std::map<uint64_t, std::unique_ptr<CtaTrace>> ctas_;
};

// Whether launches are: Options::timeline, or the environment's GPULESS_TIMELINE (profile.h).
bool recorded(const Options&);
// Null unless the launch is to be, the first of its kernel and shape.
std::shared_ptr<LaunchTrace> begin_trace(const Launch&);
// Adds a launch that is over. `all`: what its CTAs counted, the recorded ones included.
void keep_trace(const Launch&, const Sheet& all);

}  // namespace gpuless
