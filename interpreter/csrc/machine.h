#pragma once
// The machine: a launch is a grid of clusters, a cluster is CTAs that run together (most often one), a CTA is warps and
// shared memory, a warp is 32 lanes in one or more strands.
//
// A strand is a set of lanes with one program counter. A divergent branch splits a strand, strands that meet in the
// same frame at the same instruction merge; the deepest frame goes first, then what comes first in converging_order, so
// that lanes reconverge at their branch's immediate postdominator, wherever the compiler laid that out, and a turn is
// taken after a while, so that none starves (independent thread scheduling, ISA 3.1). A collective instruction waits
// until its lanes have merged.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

#include "clock.h"
#include "counters.h"
#include "finding.h"
#include "memory.h"
#include "program.h"
#include "releases.h"
#include "shadow.h"
#include "tensor_memory.h"

namespace gpuless {

struct Cluster;
struct Cta;
struct Launch;
class LaunchTrace;
class Execution;  // explore/execution.h
class WarpTrace;

struct Options {
  uint64_t seed = 0;
  bool checks = true;                   // races, flight, initialisation; bounds and alignment are always checked
  bool truncating = false;              // the FP8 accumulator of Hopper and Ada, 13 fractional bits
  bool approximate = true;              // displace .approx results within the ISA's bound
  bool guard = false;                   // arguments re-homed into padded, poisoned copies (Python's side)
  int threads = 0;                      // 0: one per core
  uint64_t counters = 0;                // not 0: the name under which launches are counted
  bool timeline = false;                // records what timeline_replay.h spends time on; needs counters
  int sample = 0;                       // not 0: clusters of a launch that run, the first ones
  uint64_t step_limit = 4'000'000'000;  // warp instructions of one CTA
  int64_t largest = 0;   // not 0: bytes that a tensor may have; 32-bit offsets have to be right there too
  uint64_t explore = 0;  // not 0: tries so many orders of a launch's synchronisation
  std::string schedule;  // not empty: of an order that is repeated (explore/schedule.h)
  FindingPolicy policy;
};

struct Frame {
  const Code* code;
  Frame* caller = nullptr;
  const Instruction* call = nullptr;     // in the caller
  std::vector<Code::Parameter> results;  // where the caller wants what it returns, in its own .param space
  int depth = 0;
  Mask inside = 0;  // lanes that have not returned
  uint8_t* registers = nullptr;
  // .param space, [lane][Code::param_bytes]. An entry's own parameters are the launch's (Launch::parameters), which
  // hold the first bytes of the space for every lane.
  std::unique_ptr<uint8_t[]> parameters;
  int64_t bytes = 0;       // of its registers and parameters, and its callers'
  int64_t local_base = 0;  // where its .local variables begin in each lane's local memory
  std::unique_ptr<uint8_t[]> memory;
};

struct Strand {
  Frame* frame;
  uint32_t pc;
  Mask mask;
  bool waiting = false;  // at a collective instruction, for the other strands of the warp
  uint64_t ticket = 0;   // of a blocked instruction that has done its first half (a barrier's arrival)
};

// Something that the hardware does later. The scheduler completes what is pending at seeded moments in a seeded order;
// a wait completes what it waits for. complete() runs once, with the place of the issuing instruction for findings.
struct Pending {
  virtual ~Pending() = default;
  virtual bool ready(Cta&) const { return true; }  // wgmma: all four warps have issued it
  virtual void complete(Cta&) = 0;
  const Instruction* instruction = nullptr;  // that issued it
  const Code* code = nullptr;
  Cta* cta = nullptr;
  int warp = -1;
  bool done = false;
};

struct Wgmma;              // rows/wgmma.cpp
class UndefinedRegisters;  // undefined.h
class WrappedOffsets;      // offsets.h
struct CpAsync;            // rows/cp_async.cpp
struct Bulk;               // rows/bulk.cpp
struct Tcgen05;            // rows/tcgen05.h
struct MBarrier;           // mbarrier.h
struct ClusterBarrier;     // rows/cluster_barrier.cpp

// The looks of a warp since it last had an effect that others may notice. A warp that comes to the same look in the
// same state again goes round in a circle until what it looks at changes (spin.cpp).
struct Looks {
  uint32_t effects = 0;  // Warp::effects, at the first of them
  uint32_t count = 0;
  uint32_t switches = 0;  // to another strand of the warp, as this one goes round
  uint64_t state = 0;     // at one of them
  uint64_t circle = 0;    // at one of the switches, the last that is a power of two
};

struct alignas(64) Warp {
  Cta* cta;
  int id;                       // within the CTA
  int agent;                    // within the cluster
  Frame* frame = nullptr;       // of the running strand
  std::vector<Strand> strands;  // [running] is the one that runs
  int running = 0;
  Mask live = 0;                       // lanes that have not exited
  Mask exists = 0;                     // lanes of the block: the last warp may have fewer than 32
  uint64_t steps = 0;                  // warp instructions so far
  uint64_t blocked_at = ~uint64_t{0};  // Cluster::events when it last found itself blocked
  uint64_t polled_at = 0;              // and at the failed looks at an mbarrier that `polls` counts
  int polls = 0;
  uint32_t effects = 0;   // so far, on shared or global memory or a barrier
  uint64_t spins_at = 0;  // Cluster::progress when it was found to go round in a circle
  Looks looks;
  Knowledge knowledge;
  LaneOrder lane_order;
  std::unique_ptr<Knowledge> fenced;  // at its last fence: what a relaxed arrival at the cluster's barrier gives away
  RegionCache regions;
  const LaneAddresses* accessing = nullptr;  // while access() checks them
  uint64_t random_state = 0;
  std::vector<std::unique_ptr<Frame>> frames;  // alive
  std::vector<uint8_t> local[kLanes];          // .local memory, grown by the frames that need it
  int turn = 0;                                // steps of the running strand since another one ran
  Count* count = nullptr;                      // of the running instruction, if the launch is counted
  WarpTrace* trace = nullptr;                  // if its CTA is recorded
  Mask carry = 0;                              // CC.CF of each lane: add.cc, addc, ...

  // Registers in flight (wgmma accumulators and A fragments): by frame offset / 64 of the frame that runs; empty when
  // nothing is under way. Reading or writing one is a finding; a plain mov is deferred (run_watched).
  // The same of registers that are undefined (undefined.h), and of offsets that do not fit (offsets.h).
  bool watched = false;  // there are some: the loop calls run_watched in place of the handler

  // Per-warp state of the asynchronous instructions; each row file owns its own struct.
  std::shared_ptr<CpAsync> cp_async;
  std::shared_ptr<Bulk> bulk;
  std::shared_ptr<Wgmma> wgmma;
  std::shared_ptr<Tcgen05> tcgen05;
  std::shared_ptr<UndefinedRegisters> undefined;
  std::shared_ptr<WrappedOffsets> offsets;
  // From access() to the handler of a strong read: of global memory; the warp goes round in a circle.
  bool acquires = false, spins = false;
  Mask unwritten = 0;           // lanes whose bytes of the load under way nothing has written: access() to its handler
  uint64_t cluster_phases = 0;  // of the cluster's barrier that it has waited for
  std::vector<const Instruction*> register_changes;  // setmaxnreg so far
  Length length;                                     // of what it has executed, if the launch is counted

  template <class T>
  T* at(Offset o) const {
    return reinterpret_cast<T*>(frame->registers + o);
  }
  template <class T>
  T* operand(const Instruction& i, int n) const {
    return at<T>(i.operand[n]);
  }
  Mask predicate(Offset o) const { return *at<Mask>(o); }

  // Lane addresses: base + displacement, zero-extended where the base is 32 bits wide.
  void addresses(const Instruction&, int operand, int64_t displacement, bool wide, uint64_t out[kLanes]) const;

  Strand& strand() { return strands[running]; }
  Frame* enter(const Code&, Frame* caller, const Instruction* call, Mask lanes);
  void leave(Mask lanes, bool exit);         // return, or exit, of the running strand's lanes
  void return_values(Mask lanes);            // from the running frame's .param space to the caller's
  void branch(Mask lanes, uint32_t target);  // lanes of the running strand that jump; the others fall through

  Actor actor(Proxy p = Proxy::generic) const {
    return {agent, knowledge.seen.clocks[agent], &knowledge, p, line(), {}};
  }
  // The warp's lanes on a range of shared memory whose begin and lanes the caller fills in. Where the range is spread
  // over lanes, each has 1 << part_shift bytes.
  LaneRange lanes(int part_shift = 0) const { return {agent, lane_order.floor(), 0, part_shift, {}, &lane_order}; }
  uint32_t line() const { return frame->code->statements[strands[running].pc]->line; }
  void release() { ++knowledge.seen.clocks[agent]; }  // after giving away what it knows
  void acquire(Mask lanes, const Knowledge& k) {
    if (k.seen.width > agent) lane_order.learn(lanes, live, k.seen.clocks[agent]);
    knowledge.join(k);
  }
  uint32_t random();  // seeded, one stream per warp

  // A finding at the instruction that runs, which cannot go on: file, line, kernel, block, warp are filled in by
  // whoever catches it. One that it can go on behind is for Cluster::report.
  [[noreturn]] void fail(Kind, std::string message, int lane = -1) const;
  [[noreturn]] void fail_at(Kind, std::string message, int lane, uint64_t address) const;
};

struct Cta {
  Launch* launch;
  Cluster* cluster;
  int rank;         // within the cluster
  int first_agent;  // of its warps
  unsigned index[3];
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;  // static, then dynamic
  Shadow shadow;
  std::unique_ptr<TensorMemory> tensor_memory;  // kept from one CTA to the next: it is large
  bool has_tensor_memory = false;               // this one has allocated some
  uint32_t serial = 0;                          // of all CTAs of all launches
  std::unordered_map<uint32_t, std::shared_ptr<MBarrier>> mbarriers;
  std::unordered_map<uint32_t, int> arrivals;  // by the mbarrier's address: the series of what arrives there
  int arrivals_at(uint32_t mbarrier);
  int live_warps = 0;
  Sheet* sheet = nullptr;  // if the launch is counted
  VectorClock visitors;    // accesses of other CTAs' agents to its shared memory: it must not exit before them,
  Knowledge departed;      // as far as its warps that have exited knew
  uint64_t matrix_ticks = 0, matrix_macs = 0;        // MatrixTimer's, for Launch::counters
  uint32_t small_products = 0;                       // the same
  std::vector<std::unique_ptr<Frame>> spare_frames;  // of warps and calls that are over; making one costs page faults
  std::unique_ptr<Frame> spare_frame(const Code&);

  struct NamedBarrier {               // rows/barrier.cpp
    unsigned expected = 0;            // threads; 0: every thread that lives
    unsigned arrived = 0, trues = 0;  // threads, and those of them with a true predicate (barrier.red)
    uint64_t generation = 1;
    unsigned last_arrived = 0, last_trues = 0;
    Knowledge gathering, last;
  } barriers[16];
  unsigned threads() const;  // of the block
  unsigned live_threads() const;
  void settle_barriers();      // after lanes have exited
  void finish(NamedBarrier&);  // everybody has arrived

  void add(std::shared_ptr<Pending>);  // under way from now on
  // An agent of another CTA accesses the shared memory: a Finding where the CTA has exited. exits() makes one where the
  // last warp exits and none of them knows that the accesses are over.
  void visited(const Actor&, bool remember = true);
  void exits(const Warp& last);

  void begin(Cluster&, int rank, const unsigned index[3]);
  void forget();  // what its shadows have of former CTAs, as clocks or agents start again
  // Fills in where a finding was made: the instruction that a warp is at, or one of a pending operation.
  void place(Finding&, const Warp&) const;
  void place(Finding&, const Code&, uint32_t pc) const;
  void place_other(Finding&, uint32_t ptx_line) const;  // of the other end; line 0: not known
};

// CTAs that run together, as one unit of the scheduler, on one thread.
struct Cluster {
  Launch* launch;
  uint64_t number;                         // within the grid
  std::vector<std::unique_ptr<Cta>> ctas;  // by rank
  std::vector<Warp*> warps;                // of all of them
  int live_warps = 0;
  Clock base = 1;       // of this cluster's clocks: those before it on this thread stayed below
  uint64_t events = 1;  // grows whenever something happened that a blocked warp may wait for
  // The value of `events` at which every warp was blocked and no operation pending: time limits then expire.
  uint64_t idle_at = 0;
  // Grows with each slice in which a warp did anything but wait: one that goes round in a circle looks again then.
  uint64_t progress = 1;
  std::vector<std::shared_ptr<Pending>> pending;
  int first_series = 0;              // its agent
  std::vector<Clock> series_clocks;  // of each
  SyncPoints sync_points;
  VectorClock fenced;              // what its warps knew at their fences
  ReleaseLog* releases = nullptr;  // the launch's of it; null: none so far
  std::shared_ptr<ClusterBarrier> barrier;
  uint64_t successor = 0;  // the next cluster of the grid that it may cancel, to do its work (rows/cluster_launch.cpp)

  // A series are asynchronous operations whose ends become known in order: who learns of one's end may count as knowing
  // of all before it. So one agent does for all of them, and none is ever forgotten: the wgmma of a warpgroup, the bulk
  // stores of a thread, what arrives at an mbarrier.
  int new_series();
  void begin_series(int& agent) {  // on first use; -1: not yet
    if (agent < 0) agent = new_series();
  }
  bool is_series(int agent) const { return agent >= first_series; }
  // Of agents that knowledge has not heard of it knows what lies before the cluster. So that it covers all that shadows
  // name: those of this cluster, and of former ones on this thread.
  void complement(Knowledge&) const;
  Clock advance(int series) { return ++series_clocks[series - first_series]; }
  // The next operation of a series as the warp issues it.
  Actor issued(const Warp& issuer, int series, Proxy p) {
    return {series, advance(series), &issuer.knowledge, p, issuer.line(), {}};
  }
  void complete(Pending&);  // at once; no-op when done
  void happened() { ++events; }

  // Of the instruction that runs, or that issued what completes now, unless the finding has a place already. Throws it
  // where the launch's policy has it end there.
  void report(Finding);
  // The findings at the end of a turn: those behind which it went on, and in `error` what ends it. An error that was
  // postponed is this, unless what came after it is its cause.
  Findings settle(std::optional<Finding>& error) const;
  // Whether the same has been reported before, with the same instruction at its other end. It is then counted, and need
  // not be put into words again.
  bool again(Kind, uint32_t other_line, bool within_warp = false);
  void place(Finding&) const;
  Findings findings;

  void begin(Launch&, uint64_t number, Sheet*);  // of the cluster within the grid
  // How a turn ends: every warp has exited; its instructions are used up; nothing goes on before another cluster has
  // done something. The last two with whether any warp did more than wait.
  struct Turn {
    enum class End : uint8_t { over, used_up, stuck } end;
    bool progressed = true;
  };
  // Throws Finding.
  Turn run(uint64_t budget);
  uint64_t steps() const;
  // Of all warps, which wait for ever.
  Finding deadlock() const;
  // For the orders that are explored (explore/execution.h): to the warp's next visible instruction; and the end,
  // however it came.
  void step(Warp&, uint64_t slice);
  void end();

 private:
  Warp* pick();
  bool complete_one();  // of what is pending; false: none is ready
  void sweep();         // out of `pending` what has completed
  bool stir();
  uint64_t run_slice(Warp&);
  int rounds_ = 0;  // in which warps that go round in circles have looked again, since looked_at_
  uint64_t looked_at_ = 0;
  enum class Completion : uint8_t { late, early, mixed } completion_ = Completion::mixed;
  enum class Order : uint8_t { fair, ahead, behind } order_ = Order::fair;
  int favourite_ = 0;
  int agents_ = 0;  // that shadows may name
  Warp* running_ = nullptr;
  Pending* completing_ = nullptr;
  uint64_t random_state_ = 0;
  uint32_t random();
};

// The orders of a launch that were explored.
struct Explored {
  uint64_t orders = 0;    // that differ
  uint64_t runs = 0;      // that it took
  bool complete = false;  // there are no others
  std::string limit;      // else why
};

// Of std::chrono::steady_clock, since its epoch.
using Deadline = std::chrono::nanoseconds;

struct Launch {
  const Module* module;
  const Code* code;
  const char* arch = "";  // of the device
  unsigned grid[3], block[3], cluster[3] = {1, 1, 1};
  int64_t dynamic_shared = 0;
  std::vector<uint8_t> parameters;  // as the kernel's .param area
  bool programmatic = false;        // the PDL attribute: may begin before the previous launch has ended
  uint64_t number = 0;              // of launches so far
  uint64_t stream = 0;              // of launches since the seed was set: which of its random streams
  uint64_t first_concurrent = 0;    // the lowest launch that may still be running: what it wrote needs the wait
  Options options;
  const Memory* memory = nullptr;  // storage intervals
  double growth = 0;               // Options::largest, as a multiple of the largest of them
  struct Counters {
    std::atomic<uint64_t> launches{0}, warp_instructions{0}, matrix_ns{0}, matrix_macs{0};
  }* counters = nullptr;
  uint32_t first_serial = 0, concurrent_serial = 0;  // of its own CTAs, and of those that may still be running
  Releases releases;
  std::shared_ptr<LaunchTrace> trace;  // if it is recorded
  Deadline deadline = Deadline::max();
  Findings findings;               // behind which it went on
  int resident = 1;                // clusters that the device holds at once: they may wait for each other
  bool cancels = false;            // its clusters may cancel others that have not begun
  Execution* execution = nullptr;  // of an order that is explored
  Explored explored;

  // Whether a cluster waits for the one before it to cancel it, or to end: the seed decides, so that it does not depend
  // on the threads which cluster gets whose work.
  bool may_be_cancelled(uint64_t number) const;

  // Runs the grid on Options::threads threads, clusters in order, or with odd seeds the reverse among those that may be
  // resident together; as many at once as the device holds where they wait for each other. Throws the finding of the
  // first cluster that one has stopped. False: the deadline has passed.
  bool run();
  uint64_t grid_size() const { return static_cast<uint64_t>(grid[0]) * grid[1] * grid[2]; }
  uint64_t cluster_size() const { return static_cast<uint64_t>(cluster[0]) * cluster[1] * cluster[2]; }
  // Where a CTA lies in the grid, by its number: they count cluster by cluster, each by rank.
  void index_of(uint64_t number, unsigned index[3]) const;
  void describe(Finding&) const;  // whose it is
};

// The end of a load or an atomic: it might have been a strong read, of global memory, or by a warp that goes round in a
// circle.
inline Step acquired(Warp& w) {
  if (__builtin_expect(!(w.acquires | w.spins), 1)) return Step::next;
  if (std::exchange(w.acquires, false)) w.cta->launch->releases.acquire(w);
  return w.spins ? Step::yielded : Step::next;
}

// A divergent strand gives way to the others after so many instructions, so that one that spins cannot starve them.
constexpr int kStrandTurn = 512;
// Before a warp looks. Sets Warp::spins if it goes round in a circle.
void look(Warp&);
// What decides what the warp does next, but for memory: where its strands are, and the registers that they may read.
uint64_t state_of(const Warp&);

// Runs a warp for about `slice` instructions, or until it blocks, yields or ends; or to its next visible instruction.
template <bool kCounted, bool kStops = false>
void run_warp(Warp&, uint64_t slice);
// Seeded random numbers: the next of a stream, and the finaliser that makes streams from numbers.
uint32_t next_random(uint64_t& state);
uint64_t mix(uint64_t);

// One instruction while registers are in flight or undefined: a finding when it may not touch one, else its step.
// `here` are the lanes of the strand, `mask` those that its guard lets through.
Step run_watched(Warp&, const Instruction&, Mask here, Mask mask);

// The last thread has exited: a bulk store that none has waited for is a finding (rows/bulk.cpp).
void check_bulk_at_end(const Cta&);
void update_watched(Warp&);

}  // namespace gpuless
