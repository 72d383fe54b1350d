#pragma once
// One order of the synchronisation of some clusters of a launch, as they run through it: one thread of the host, which
// goes from one visible instruction to the next, and chooses before each which warp comes next or what completes.
//
// Handlers tell it what they touch. Global memory is put back when it ends.
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "explore/trace.h"
#include "machine.h"
#include "memory.h"

namespace gpuless {

// Where an order differs from the one that comes by itself: at which choice, who comes instead.
using Decisions = std::map<uint64_t, Thread>;

// What global memory held before each write, so that it can be put back.
class Journal {
 public:
  void save(uint64_t address, uint64_t bytes);
  void restore();
  size_t bytes() const { return before_.size(); }

 private:
  struct Write {
    uint64_t address;
    size_t begin;  // within before_
  };
  std::vector<Write> writes_;
  std::vector<uint8_t> before_;
};

// Which clusters synchronise with each other through global memory.
class Survey {
 public:
  // As Trace::word has it.
  void word(uint64_t cluster, uint64_t object, uint64_t commutes);
  void touched(uint64_t cluster, uint32_t thread);
  // The clusters in groups that do not, each in order, and the groups by their first. Only those in which two threads
  // have touched anything; `others`: how many are left out.
  std::vector<std::vector<uint64_t>> groups(uint64_t clusters, uint64_t* others);

 private:
  struct Word {
    uint64_t commutes;
    std::vector<uint64_t> clusters;
  };
  uint64_t root(uint64_t cluster);
  std::unordered_map<uint64_t, Word> words_;
  std::map<uint64_t, uint64_t> parents_;
  struct Touching {
    uint32_t first;
    bool more = false;
  };
  std::map<uint64_t, Touching> touching_;
};

// How an execution ends. `limit`: why it was given up, if it was.
struct Outcome {
  std::optional<Finding> finding;
  Findings findings;  // behind which it went on
  std::string limit;
  Decisions decisions;
  std::shared_ptr<const Trace> trace;
};

class Execution {
 public:
  // `clusters` run, of which as many at once as the GPU holds. `spare` are used and left to the next.
  // With a survey it keeps no events.
  Execution(Launch&, std::vector<uint64_t> clusters, std::vector<std::unique_ptr<Cluster>>& spare,
            Survey* survey = nullptr);
  // The events of these threads come first, in this order, then what comes by itself; or what comes by itself but for
  // some decisions.
  Outcome run(const std::vector<Thread>& beginning, const Decisions&);

  // Called by handlers.
  void phase(uint64_t object, uint64_t phase, Touch);
  void completed(uint64_t object, uint64_t phase) {
    if (!survey_) trace_->completed(object, phase);
  }
  void access(const Cta&, bool shared, const uint64_t address[kLanes], int bytes, Use, Mask);
  // The end of an atomic: the lanes whose value it has changed; not 0 where it has no order among its own.
  void atomic(Mask changed, uint64_t commutes);
  void issued(const std::shared_ptr<Pending>&);
  void save(uint64_t address, uint64_t bytes) { journal_.save(address, bytes); }

 private:
  struct Actor {  // a warp, or what one has issued
    Warp* warp = nullptr;
    std::shared_ptr<Pending> pending;
    uint32_t issued_by = Trace::kNone;  // an event
    uint32_t issues = 0;
    // Of a warp that looks, since its last effect: its states, with the number of events before each.
    uint32_t effects = 0, switches = 0;
    std::vector<std::pair<uint64_t, size_t>> looks;
    // It goes round in a circle until one of these has changed, after changes_ was so many.
    bool waits = false;
    std::vector<uint64_t> waits_for;
    uint64_t waits_since = 0;
  };
  struct GivenUp {
    std::string why;
  };
  void begin_clusters();
  bool ready(uint32_t thread) const;
  uint32_t by_itself();  // who comes next; kNone: nobody can
  uint32_t find(const Thread&) const;
  uint32_t next_of(const std::vector<Thread>& beginning, size_t& next);
  void act(uint32_t thread);
  void advance(Actor&);
  void goes_round(Actor&);
  void look_again();
  bool stir();
  void retire(bool all);
  void check_limits() const;
  void touch(uint64_t object, uint64_t commutes);
  Finding deadlock() const;
  Cluster& cluster_of(const Actor&) const;

  Launch& launch_;
  std::vector<uint64_t> clusters_;  // all; next_cluster_ has not begun
  size_t next_cluster_ = 0;
  std::vector<std::unique_ptr<Cluster>>& spare_;
  std::vector<std::unique_ptr<Cluster>> running_;
  Survey* const survey_;
  std::shared_ptr<Trace> trace_;
  std::deque<Actor> actors_;         // by number of the thread
  std::vector<uint32_t> under_way_;  // threads that are operations
  uint32_t now_ = Trace::kNone;      // who acts, or did last
  uint64_t steps_ = 0, changes_ = 1, stirred_at_ = 0;
  std::unordered_map<uint64_t, uint64_t> changed_;  // by object: changes_ then
  std::vector<std::pair<uint64_t, int>> words_;     // of the atomic under way, with the lane
  Journal journal_;
  Findings findings_;
  std::optional<Finding> error_;
};

// Names of what threads synchronise by, the same in each execution.
uint64_t object_of(const Cta&, int kind, uint64_t number);
inline uint64_t mbarrier_object(const Cta& cta, uint32_t address) { return object_of(cta, 1, address); }
inline uint64_t barrier_object(const Cta& cta, uint32_t number) { return object_of(cta, 2, number); }
inline uint64_t cluster_barrier_object(const Cta& cta) { return object_of(cta, 3, 0); }
inline uint64_t warpgroup_object(const Cta& cta, int number) { return object_of(cta, 4, number); }

}  // namespace gpuless
