#pragma once
// The clock: spends the time of one multiprocessor on what timeline_trace.h recorded, event by event. Every pipe and
// queue has a rate and a latency (Machine); the order of things is the replay's own, so that the interpreter's seed is
// not in it. docs/interpreter.md says what is modelled and what is not.
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "timeline_ops.h"
#include "timeline_trace.h"

namespace gpuless {

// Rates and latencies by name, as latencies.py and rates.py have them.
class Machine {
 public:
  explicit Machine(const std::string& text);         // "name<tab>value" a line
  double operator[](const std::string& name) const;  // throws a Finding that names what is missing

 private:
  std::unordered_map<std::string, double> values_;
};

// Why a warp's next instruction was not issued yet.
enum class Wait : uint8_t {
  dependency,  // on an instruction of fixed latency
  memory,      // global and local
  shared,
  special,  // functions, conversions, shuffles
  tensor,   // mma and wgmma
  copy,     // cp.async, and bulk stores that are waited for
  mbarrier,
  barrier,
  pipe,      // busy with other warps
  selected,  // another warp of the scheduler was issued
  other,     // branches, fences
};
constexpr int kWaits = 11;
extern const char* const kWaitNames[kWaits];

struct ReplayInput {
  const Ops* ops;
  std::vector<const CtaTrace*> ctas;  // that are recorded: cluster by cluster, each by rank
  uint64_t cluster_size = 1;
  uint64_t resident = 1;  // clusters at once
  struct Turn {
    size_t recorded;                   // that stands for the cluster
    uint64_t length, recorded_length;  // instructions
  };
  std::vector<Turn> turns;  // the clusters of the multiprocessor, one after the other
  double active = 1;        // multiprocessors that have work, on an average over the time of the busiest
  double fresh_share = 1;   // of the sectors that CTAs touch first: what DRAM moves
  bool from_l1 = false;     // what a CTA touches again is still in L1
  uint64_t head_start = 0;  // cycles until the launch before has ended, and griddepcontrol.wait returns
};

constexpr uint32_t kOfOp = 1u << 31;  // a span's name is the number of an op, else an index into names

struct Span {
  uint32_t track, name;
  uint64_t begin, end;
};

struct ReplayResult {
  uint64_t cycles = 0, replayed = 0;  // replayed: clusters; cycles are of all
  uint64_t dependency = 0;            // the first griddepcontrol.wait; 0: none
  uint64_t tail = 0;                  // from when every CTA has let dependent launches begin; 0: not every one does
  double tensor = 0, issue = 0, shared = 0, l2 = 0, l2_writes = 0,
         dram = 0;           // cycles that each was busy, of `span_cycles`
  uint64_t span_cycles = 0;  // that were replayed
  struct OfOp {
    uint64_t issued = 0, waited[kWaits] = {};
  };
  std::vector<OfOp> ops;
  std::vector<Span> spans;  // of the first multiprocessor
  std::vector<std::string> tracks, names;
  bool spans_cut = false;
};

ReplayResult replay(const ReplayInput&, const Machine&);

}  // namespace gpuless
