#pragma once
// What the machine makes of each PTX instruction, as far as the clock is concerned: the pipe that executes it, how many
// instructions of the machine it becomes, which registers it waits for. PTX is not SASS; the rules that stand for ptxas
// are in docs/interpreter.md, and each is a few lines here.
#include <cstdint>
#include <vector>

#include "counters.h"
#include "program.h"
#include "timeline_trace.h"

namespace gpuless {

enum class Pipe : uint8_t { integer, floating, float64, half, special, conversion, shuffle };
constexpr int kPipes = 7;
extern const char* const kPipeNames[kPipes];  // as python/gpuless/rates.py has them

struct Op {
  enum class Kind : uint8_t {
    free,  // not issued: its result is there as soon as its sources are
    alu,
    memory,  // loads, stores and atomics
    mma,
    wgmma,
    wgmma_commit,
    wgmma_wait,
    copy,  // cp.async
    copy_commit,
    copy_wait,
    bulk,
    bulk_commit,
    bulk_wait,
    signal,       // mbarrier arrivals and the like
    signal_wait,  // try_wait, test_wait
    barrier,
    cluster_arrive,
    cluster_wait,
    dependency_wait,  // griddepcontrol.wait
    trigger,          // griddepcontrol.launch_dependents
    fence,
    branch,
  } kind = Kind::alu;
  Pipe pipe = Pipe::integer;
  bool loads = false;         // memory: somebody waits for the result
  bool cached = false;        // memory: by L1
  bool remote = false;        // memory: shared, of any CTA of the cluster
  bool everywhere = false;    // fence: beyond the CTA
  bool waits = true;          // barrier: not .arrive
  bool reads_only = false;    // bulk_wait: .read
  uint16_t slots = 1;         // instructions that are issued for it
  uint32_t groups = 0;        // *_wait: groups that may stay under way
  uint32_t macs = 0;          // mma, wgmma: of this warp
  uint32_t matrix_bytes = 0;  // wgmma: of shared memory, of this warp
  uint32_t matrix_type = 0;   // index into Ops::matrix_types
  uint32_t first = 0;         // into Ops::registers: destinations, sources, guard
  uint16_t destinations = 0, sources = 0;
  bool guarded = false;
  uint32_t segment = 0, rank = 0;  // instructions of a segment are issued in the order of their ranks
};

struct Ops {
  std::vector<Op> ops;
  std::vector<Line> lines;          // by op
  std::vector<uint32_t> registers;  // numbers from 0
  uint32_t register_count = 0;
  std::vector<std::string> matrix_types;  // "mma f16", "wgmma s8"

  void add(const Module&, const Code&);  // one after the other
  // From the order of PTX to that of ptxas.
  void arrange(std::vector<TraceEvent>&) const;
};

// f(register id) for those of an operand.
template <class F>
void each_register(const Operand& o, F f) {
  if (o.kind == Operand::Kind::reg) f(o.id);
  for (const Operand& p : o.parts) each_register(p, f);
}
// Results are the first operand, or there are none.
inline bool writes_first_operand(const Statement& s, const Instruction& i) {
  return i.destinations && !s.operands.empty() && s.operands[0].kind != Operand::Kind::address;
}

// Sets segments, from a number on, and ranks of a function's instructions.
void schedule(const Code&, const Line*, Op*, uint32_t first_segment);

}  // namespace gpuless
