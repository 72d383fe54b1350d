#pragma once
// What an order of a launch's synchronisation consists of: its events, and which of them come before which whatever the
// order. Two orders that agree in that are one: nobody in the launch can tell them apart.
#include <cstdint>
#include <map>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

namespace gpuless {

// Who acts: a warp, by its number within the grid, or an asynchronous operation, by its issuer's and its own number.
using Thread = std::vector<uint32_t>;

// An arrival at a barrier of any kind; one that expects bytes but does not arrive; a wait for a phase that is over,
// which a parity names; the same by a token; a test that failed; going on behind a wait that cannot miss its phase.
enum class Touch : uint8_t { arrive, expect, wait, wait_token, poll, pass };

// One synchronisation by a thread: the barriers, words and queues that it touches at once.
struct Event {
  uint32_t thread;               // Trace::threads
  int chain = -1;                // of events that follow each other whatever the order
  uint32_t place = 0;            // in the chain, from 1
  std::vector<uint32_t> clock;   // by chain: up to which place it comes after that
  std::vector<uint32_t> before;  // events that it comes after, those through others left out
  uint64_t hash = 0;
};

// Two events in an order that need not be theirs: all that does not come after `early`, and then `thread`, is the
// beginning of another.
struct Reversal {
  uint32_t early, thread;
  bool operator<(const Reversal& o) const { return std::pair(early, thread) < std::pair(o.early, o.thread); }
};

class Trace {
 public:
  // Those that are warps come first among the threads.
  explicit Trace(uint32_t warps) : warps_(warps), chains_(warps, kNone) {}

  std::vector<Thread> threads;
  std::vector<Event> events;
  std::set<Reversal> reversals;

  uint32_t number_of(const Thread&);

  // The event of a thread under way: made by the first touch, closed by close(). A thread that was issued begins after
  // the event that issued it; ~0: none.
  void phase(uint32_t thread, uint32_t issued_by, uint64_t object, uint64_t phase, Touch);
  void completed(uint64_t object, uint64_t phase);  // by the event under way
  // `commutes`: not 0 where two uses with the same value have no order.
  void word(uint32_t thread, uint32_t issued_by, uint64_t object, uint64_t commutes);
  void close();
  bool open() const { return open_; }
  uint32_t last_of(uint32_t thread) const { return thread < last_.size() ? last_[thread] : kNone; }
  // Forgets the last events, which must be one thread's, and have changed nothing.
  void drop(size_t from);
  // Which objects the events from here on have touched.
  std::vector<uint64_t> touched_since(size_t event) const;

  uint64_t hash() const;                                   // of the order
  uint64_t hash(const Reversal&) const;                    // of the beginning of another
  std::vector<uint32_t> beginning(const Reversal&) const;  // its threads, one for each event

  static constexpr uint32_t kNone = ~uint32_t{0};
  static constexpr uint64_t kReads = 1;  // of word(): reads commute

 private:
  struct Phase {
    uint64_t number;
    std::vector<uint32_t> arrivals, expects, waits;
  };
  struct Group {
    uint64_t commutes;
    std::vector<uint32_t> events;
  };
  struct Object {
    std::vector<Phase> phases;
    std::vector<Group> groups;
  };
  using Clock = std::vector<uint32_t>;  // by chain
  void begin(uint32_t thread, uint32_t issued_by);
  uint32_t self() const { return static_cast<uint32_t>(events.size() - 1); }
  bool after(uint32_t early, const Clock& late) const;
  // The open event comes after another.
  void follow(uint32_t early);
  // It need not, unless that is in what it came after before this touch.
  void reverse(uint32_t early, const Clock& before);
  void follow_phases(const Object&, uint64_t phase, Touch);

  const uint32_t warps_;
  std::unordered_map<uint64_t, Object> objects_;
  std::map<Thread, uint32_t> numbers_;
  std::vector<uint32_t> last_;                  // event, by thread
  std::vector<uint32_t> chains_;                // the last event of each; those of warps come first
  std::vector<std::vector<uint64_t>> touched_;  // objects, by event
  uint64_t keys_ = 0;                           // of the objects of the open event
  bool open_ = false;
};

}  // namespace gpuless
