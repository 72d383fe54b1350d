#pragma once
// The machine: a launch is a grid of CTAs, a CTA is warps and shared memory, a warp is 32 lanes in one or more strands.
//
// A strand is a set of lanes with one program counter. A divergent branch splits a strand, strands that meet in the same
// frame at the same instruction merge; the deepest frame and then the lowest program counter goes first, so that lanes
// reconverge where the compiler laid out their join, and a turn is taken after a while, so that none starves
// (independent thread scheduling, ISA 3.1). A collective instruction waits until its lanes have merged.
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <unordered_map>
#include <vector>

#include "clock.h"
#include "finding.h"
#include "memory.h"
#include "program.h"
#include "shadow.h"

namespace forwardpass::interpreter {

struct Cta;
struct Launch;

struct Options {
  uint64_t seed = 0;
  bool checks = true;         // races, flight, initialisation; bounds and alignment are always checked
  bool truncating = false;    // the FP8 accumulator of Hopper and Ada, 13 fractional bits
  bool approximate = true;    // displace .approx results within the ISA's bound
  bool guard = false;         // arguments re-homed into padded, poisoned copies (Python's side)
  int threads = 0;            // 0: one per core
  uint64_t step_limit = 4'000'000'000;  // warp instructions of one CTA
};

struct Frame {
  const Code* code;
  Frame* caller = nullptr;
  uint32_t return_to = 0;
  Mask inside = 0;             // lanes that have not returned
  uint8_t* registers = nullptr;
  uint8_t* parameters = nullptr;  // Code::param_bytes per lane for a function; the launch's own for the entry
  std::unique_ptr<uint8_t[]> memory;
};

struct Strand {
  Frame* frame;
  uint32_t pc;
  Mask mask;
};

// Something that the hardware does later. The scheduler completes what is pending at seeded moments in a seeded order;
// a wait completes what it waits for. complete() runs once, with the place of the issuing instruction for findings.
struct Pending {
  virtual ~Pending() = default;
  virtual bool ready(Cta&) const { return true; }  // wgmma: all four warps have issued it
  virtual void complete(Cta&) = 0;
  const Instruction* instruction = nullptr;  // that issued it
  const Code* code = nullptr;
  int warp = -1;
  bool done = false;
};

struct Wgmma;    // rows/wgmma.cpp
struct CpAsync;  // rows/cp_async.cpp
struct Bulk;     // rows/bulk.cpp
struct MBarrier; // mbarrier.h

struct alignas(64) Warp {
  Cta* cta;
  int id;                       // within the CTA, and its agent
  Frame* frame = nullptr;       // of the running strand
  std::vector<Strand> strands;  // [running] is the one that runs
  int running = 0;
  Mask live = 0;                // lanes that have not exited
  Mask exists = 0;              // lanes of the block: the last warp may have fewer than 32
  uint64_t steps = 0;           // warp instructions so far
  uint64_t blocked_at = ~uint64_t{0};  // Cta::events when it last found itself blocked
  Knowledge knowledge;
  uint64_t random_state = 0;

  // Registers in flight (wgmma accumulators and A fragments): by frame offset / 64 of the frame that runs; empty when
  // nothing is under way. Reading or writing one is a finding; a plain mov is deferred (Wgmma::defer).
  bool watched = false;  // some are: the loop calls run_watched in place of the handler

  // Per-warp state of the asynchronous instructions; each row file owns its own struct.
  std::shared_ptr<CpAsync> cp_async;
  std::shared_ptr<Bulk> bulk;
  std::shared_ptr<Wgmma> wgmma;

  template <class T>
  T* at(Offset o) const { return reinterpret_cast<T*>(frame->registers + o); }
  template <class T>
  T* operand(const Instruction& i, int n) const { return at<T>(i.operand[n]); }
  Mask predicate(Offset o) const { return *at<Mask>(o); }

  // Lane addresses: base + displacement, zero-extended where the base is 32 bits wide.
  void addresses(const Instruction&, int operand, int64_t displacement, bool wide, uint64_t out[kLanes]) const;

  Actor actor(Proxy p = Proxy::generic) const { return {id, knowledge.seen.at[id], &knowledge, p}; }
  void release() { ++knowledge.seen.at[id]; }  // after giving away what it knows
  uint32_t random();                            // seeded, one stream per warp

  // A finding at the instruction that runs: file, line, kernel, block, warp are filled in by whoever catches it.
  [[noreturn]] void fail(Kind, std::string message, int lane = -1) const;
  [[noreturn]] void fail_at(Kind, std::string message, int lane, uint64_t address) const;
};

struct Cta {
  Launch* launch;
  unsigned index[3];
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;  // static, then dynamic
  Shadow shadow;
  uint64_t events = 1;          // grows whenever something happened that a blocked warp may wait for
  std::vector<std::shared_ptr<Pending>> pending;
  std::unordered_map<uint32_t, std::shared_ptr<MBarrier>> mbarriers;
  Knowledge async[kAsyncAgents];  // what the operations under way know; agent kMaxWarps + i
  int live_warps = 0;

  struct NamedBarrier {
    unsigned expected = 0, arrived = 0;  // threads
    uint64_t generation = 0;
    Mask participants = 0;               // warps, this generation
    bool reduce_and = true, reduce_or = false;
    unsigned reduce_count = 0;
    struct { bool all, any; unsigned count; } result;
    Knowledge knowledge;
  } barriers[16];
  unsigned threads() const;

  // Hands out an agent for an operation that the warp issues now: it knows what the warp knows.
  int async_agent(const Warp& issuer);
  Clock async_now(int agent) const;
  Actor async_actor(int agent, Proxy p = Proxy::async) const;
  void add(std::shared_ptr<Pending>);      // under way from now on
  void complete(Pending&);                 // at once; no-op when done
  void happened() { ++events; }

  // Runs until every warp has exited (true) or `budget` warp instructions are used up (false). Throws Finding.
  bool run(uint64_t budget);
};

struct Launch {
  const Module* module;
  const Code* code;
  unsigned grid[3], block[3], cluster[3] = {1, 1, 1};
  int64_t dynamic_shared = 0;
  std::vector<uint8_t> parameters;     // as the kernel's .param area
  bool programmatic = false;           // the PDL attribute: may begin before the previous launch has ended
  uint64_t number = 0;                 // of launches so far: seeds, and PDL
  uint64_t first_concurrent = 0;       // the lowest launch that may still be running: what it wrote needs the wait
  Options options;
  const Memory* memory;                // storage intervals
  struct Counters { std::atomic<uint64_t> warp_instructions{0}, matrix_ns{0}, matrix_macs{0}; } *counters = nullptr;

  // Runs the grid on Options::threads threads, CTAs in order, as many resident as the device holds where they wait for
  // each other. Throws the finding of the lowest CTA.
  void run();
};

// One instruction while registers are in flight (rows/wgmma.cpp): a finding when it touches one, deferred when it is a
// plain mov of one, else its handler's step.
Step run_watched(Warp&, const Instruction&, Mask);

}  // namespace forwardpass::interpreter
