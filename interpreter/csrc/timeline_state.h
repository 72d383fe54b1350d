#pragma once
// The state of a replay, and the replay itself: timeline_replay.cpp has the schedulers, timeline_units.cpp what they
// issue to.
#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <queue>

#include "timeline_replay.h"

namespace gpuless::timeline {

using Time = uint64_t;
constexpr Time kNever = ~Time{0};
constexpr int kSchedulers = 4;

inline Time ceiling(double t) { return static_cast<Time>(std::ceil(t - 1e-9)); }

// A Machine, as the replay reads it.
struct Constants {
  Constants(const Machine&, const Ops&, const ReplayInput&);
  double interval[kPipes], latency[kPipes];
  std::vector<double> matrix_rate;  // of a scheduler's tensor core, by Ops::matrix_types
  double mma_latency, mma_intervals, wgmma_latency, shared_rate, shared_latency, l1_latency, l2_latency, dram_latency,
      l2_rate, inward_rate, dram_rate, memory_queue, bulk_latency, bulk_interval, signal_latency, barrier_latency,
      cluster_latency, cluster_rate, fence_latency, branch_latency, block_latency;
};

// Something that takes what comes in its order, each as long as its amount asks for.
struct Queue {
  double free = 0, busy = 0;
  double take(double now, double service) {  // when it is done
    free = std::max(free, now) + service;
    busy += service;
    return free;
  }
};

struct Block;
struct Cluster;

// In the replay, as in machine.h of the same names.
struct Warp {
  const WarpTrace* trace = nullptr;
  Block* block = nullptr;
  int id = 0, scheduler = 0;
  uint32_t track = 0;
  size_t next = 0;    // event
  Time free = 0;      // since when the instruction before lets it go on
  Time earliest = 0;  // of the next event, if not blocked
  Wait reason = Wait::dependency;
  bool blocked = false, over = false;
  std::vector<Time> ready;   // by register
  std::vector<Wait> makers;  // what the register waits for
  // groups of asynchronous copies: when each is complete; the last one is not committed yet
  Time copies = 0, bulk = 0, bulk_read = 0;
  std::deque<Time> copy_groups, bulk_groups, bulk_read_groups;
  size_t matrix_issued = 0;
  std::deque<size_t> matrix_groups;  // operations before the end of each
  Time multiplied = 0;               // when its last mma was issued
  uint64_t cluster_phases = 0;       // of the cluster's barrier that it has arrived at
  uint32_t span_name = 0;
  Time span_begin = kNever, span_end = 0;
};

struct Multiprocessor {
  struct Scheduler {
    Time turn = kNever;
    std::vector<Warp*> warps;  // oldest first
    Warp* last = nullptr;
    double pipes[kPipes] = {};
    std::deque<double> memory;  // its last loads, stores and copies: when each has left the scheduler's queue
    double tensor = 0;
    double issued = 0;
  } schedulers[kSchedulers];
  // lsu: loads, stores and copies of warps. port: all that moves in shared memory, what wgmma reads and TMA writes too;
  // wgmma waits for it, a load only gets the cycles that wgmma leaves.
  Queue lsu, port, bulk;
  Queue inward;  // from L2, at the most that one multiprocessor can take
  Queue from_cluster;
  double tensor_busy = 0;
  struct Matrix {  // a wgmma that all of its warpgroup have issued
    Block* block;
    size_t group, number;
    double since, interval, reads;
  };
  std::deque<Matrix> matrix;
  bool multiplies = false;
  double matrix_end = 0, matrix_share = 0;  // of the port, until then
};

struct Block {
  Cluster* cluster = nullptr;
  Multiprocessor* multiprocessor = nullptr;
  int rank = 0, live = 0;
  bool triggered = false;  // it has let dependent launches begin
  std::vector<Warp> warps;
  struct Barrier {
    int expected = 0, arrived = 0;  // warps; 0: all that live
    std::vector<std::pair<Warp*, Time>> waiting;
  } barriers[16];
  struct Object {  // an mbarrier
    int64_t pending = 0, transactions = 0, expected = 0;
    uint32_t phase = 0;
    Time since = 0;
    std::vector<Warp*> waiting;
  };
  std::unordered_map<uint32_t, Object> objects;
  struct Matrix {
    int issued = 0;
    Time end = 0;
  };
  std::vector<std::deque<Matrix>> matrix;  // by warpgroup
};

struct Cluster {
  size_t slot = 0;
  int live = 0;  // blocks
  std::vector<std::unique_ptr<Block>> blocks;
  int arrived = 0, warps = 0;
  uint64_t phases = 0;
  Time since = 0;
  std::vector<Warp*> waiting;
};

class Replay {
 public:
  Replay(const ReplayInput& in, const Machine& m) : in_(in), ops_(*in.ops), c_(m, *in.ops, in) {
    result_.ops.resize(ops_.ops.size());
    multiprocessors_.resize(in.cluster_size);
  }
  ReplayResult run();

 private:
  struct Event {
    Time time;
    uint64_t order;
    enum class Kind : uint8_t { turn, arrive, write, begin, multiply } kind;
    uint32_t multiprocessor = 0, scheduler = 0;  // turn, multiply
    Block* block = nullptr;                      // arrive, write
    uint32_t address = 0;
    int64_t count = 0, bytes = 0;
    size_t slot = 0;  // begin
    bool operator>(const Event& o) const { return time != o.time ? time > o.time : order > o.order; }
  };

  const Op& op_of(const TraceEvent& e) const { return ops_.ops[e.op]; }
  void push(Event e) {
    e.order = order_++;
    events_.push(e);
  }
  void wake(Warp& w, Time now) {
    w.blocked = false;
    prepare(w);
    if (!w.blocked && !w.over) turn(w, std::max(now, w.earliest));
  }
  uint32_t number_of(const Multiprocessor& m) const { return static_cast<uint32_t>(&m - multiprocessors_.data()); }
  void turn(Warp& w, Time t) {
    auto& s = w.block->multiprocessor->schedulers[w.scheduler];
    if (t >= s.turn) return;
    s.turn = t;
    Event e{};
    e.time = t;
    e.kind = Event::Kind::turn;
    e.multiprocessor = number_of(*w.block->multiprocessor);
    e.scheduler = static_cast<uint32_t>(w.scheduler);
    push(e);
  }

  void begin_cluster(size_t slot, Time now);
  void prepare(Warp&);
  void later(Warp& w, Time t, Wait why) const {
    if (t <= w.earliest) return;
    w.earliest = t;
    w.reason = why;
  }
  void set_results(Warp&, const Op&, Time ready, Wait why);
  Time pipe_free(const Warp&) const;
  Warp* next_at_tensor_core(Multiprocessor::Scheduler&, Warp* preferred, Time now) const;
  void take_turn(Multiprocessor&, int scheduler, Time now);
  void issue(Warp&, Time now);
  void memory(Warp&, const Op&, const TraceEvent&, Time now);
  double move(double start, const TraceEvent&, bool reads);
  double take_in(Multiprocessor& m, double start, double bytes) const {
    return m.inward.take(start, bytes / c_.inward_rate);
  }
  void bulk(Warp&, const TraceEvent&, Time now);
  void write(Block& target, Time end, uint32_t bytes, double duration);
  void matrix(Warp&, const Op&, Time now);
  void multiply(Multiprocessor&);
  double access(Warp&, Time now, double cycles);
  void signals(Warp&, const TraceEvent&, Time now);
  void barrier(Warp&, const Op&, const TraceEvent&, Time now);
  void settle(Block&, Block::Barrier&, Time now);
  void settle(Cluster&, Time now);
  void arrive(const Event&);
  Block::Object& object(Block&, const Signal&);
  void finish(Warp&, Time now);
  void account(Warp&, uint32_t op, Wait why, Time from, Time to);
  void span(uint32_t track, uint32_t name, Time begin, Time end);
  uint32_t track(const std::string& name);
  uint32_t name(const std::string& name);
  bool shown(const Warp& w) const { return w.block->multiprocessor == multiprocessors_.data(); }

  const ReplayInput& in_;
  const Ops& ops_;
  const Constants c_;
  ReplayResult result_;
  std::vector<Multiprocessor> multiprocessors_;
  Queue l2_, l2_writes_, dram_;  // shares of the multiprocessors together; reads and writes have ways of their own
  std::vector<std::unique_ptr<Cluster>> clusters_;
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  std::unordered_map<std::string, uint32_t> names_, tracks_;
  uint64_t order_ = 0, started_ = 0, issued_ = 0, triggers_ = 0;
  Time last_trigger_ = 0;
  std::vector<Time> ends_;  // of clusters, in order
};

}  // namespace gpuless::timeline
