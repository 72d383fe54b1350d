// A grid on several threads: clusters begin in order, one that does not end in its turn shares its thread with the
// next.
#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <optional>
#include <string_view>
#include <system_error>
#include <thread>

#include "explore/search.h"
#include "finding_log.h"
#include "formats.h"
#include "global_shadow.h"
#include "machine.h"
#include "matrix.h"
#include "timeline_trace.h"

namespace gpuless {
namespace {

// A cluster that needs more than this may be waiting for another one: the next is begun beside it.
constexpr uint64_t kTurn = 1 << 22;
// Where the timeline is recorded all that are resident begin, and turns are shorter than most tiles take, so that a
// counter that hands out tiles gives each CTA about as many as on a GPU, and not all of them to the first.
constexpr uint64_t kRecordedTurn = 1 << 13;

// What is enough of a launch that is sampled, in warp instructions.
constexpr uint64_t kSampleSteps = 1 << 18;

struct Resident {
  std::unique_ptr<Cluster> cluster;
  uint64_t begun;         // as the n-th
  uint64_t waits_at = 0;  // Grid::progress when it could not go on
};

struct Grid {
  explicit Grid(Launch& l) : launch(l), all(l.grid_size() / l.cluster_size()), total(all) {
    if (l.options.sample > 0) total = std::min<uint64_t>(all, l.options.sample);
  }
  // Which cluster is begun as the n-th. Odd seeds turn those around that may be resident together, as GPUs promise no
  // order among them: reads of global memory leave no trace, so that one which another cluster overwrites is only found
  // where the write comes first.
  uint64_t cluster_at(uint64_t n) const {
    if (!(launch.options.seed & 1) || launch.cancels || launch.options.sample > 0 || recorded(launch.options)) return n;
    const auto together = static_cast<uint64_t>(launch.resident);
    const uint64_t first = n / together * together;
    return first + std::min(first + together, all) - 1 - n;
  }
  Launch& launch;
  const uint64_t all;
  std::atomic<uint64_t> total;  // that run
  std::atomic<uint64_t> steps{0};
  std::atomic<uint64_t> next{0};
  std::atomic<int> resident{0};
  std::mutex mutex;
  const bool counts = counted(launch.options);
  Sheet sheet;
  std::optional<Finding> finding;  // of the first cluster that has one, in the order in which they are begun
  std::exception_ptr failure;      // what a thread has thrown besides
  std::atomic<bool> failed{false};
  std::atomic<bool> expired{false};              // the deadline
  std::atomic<uint64_t> found_at{~uint64_t{0}};  // when that was begun

  // Grows with each turn in which a cluster did more than wait.
  std::atomic<uint64_t> progress{1};
  // Whether all that have begun wait for ever, and whether that is new: not where one of them has had a finding.
  enum class Stuck : uint8_t { no, known, fresh };
  std::atomic<Stuck> stuck{Stuck::no};
  uint64_t waiting = 0, waiting_at = 0;  // clusters that could not go on, at which progress

  // The cluster could not go on, and nothing has happened since `seen`.
  void wait(Resident& r, uint64_t seen) {
    const std::lock_guard lock(mutex);
    if (progress != seen) return;
    if (std::exchange(waiting_at, seen) != seen) waiting = 0;
    r.waits_at = seen;
    ++waiting;
  }
  // Notices if all wait, and none can begin.
  void rest() {
    {
      const std::lock_guard lock(mutex);
      const bool all = waiting_at == progress && waiting == static_cast<uint64_t>(resident);
      if (all && (next >= total || resident == launch.resident))
        stuck = found_at == ~uint64_t{0} ? Stuck::fresh : Stuck::known;
    }
    std::this_thread::yield();
  }
  // As no cluster can go on: its finding, if that is new.
  void give_up(const Cluster& cluster) const {
    Finding f = cluster.deadlock();
    if (next < total) {
      f.message += " " + std::to_string(launch.resident) + " of " + std::to_string(total) +
                   (launch.cluster_size() > 1 ? " clusters" : " blocks") +
                   " have begun, and the others have room only when one of these ends;";
    }
    throw f;
  }

  void report(uint64_t begun, Finding f) {
    const std::lock_guard lock(mutex);
    if (begun < found_at) {
      found_at = begun;
      finding = std::move(f);
    }
  }
  void add(Findings&& findings) {
    if (findings.empty()) return;
    for (const auto& [key, f] : findings) log_finding(f, 0);
    const std::lock_guard lock(mutex);
    launch.findings.add(std::move(findings));
  }
  // Out of memory, most likely: the other threads give up.
  void fail() {
    const std::lock_guard lock(mutex);
    if (!failure) failure = std::current_exception();
    failed = true;
  }
};

// Threads that help launches, made when they are first wanted and then kept: to start one takes as long as a small
// launch. They end with the process, so nothing of this is ever destroyed.
class Helpers {
 public:
  // Runs the job, which does not throw, here and on up to so many other threads; returns once all have left it.
  void run(uint64_t others, const std::function<void()>& work) {
    if (!others) return work();
    Job job{work, others};
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(&job);
      uint64_t places = 0;
      for (const Job* j : jobs_) places += j->places;
      try {
        for (; free_ < places; ++free_) std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {  // no more threads: those that there are have to do
      }
    }
    posted_.notify_all();
    work();
    std::unique_lock lock(mutex_);
    jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), &job), jobs_.end());
    left_.wait(lock, [&] { return !job.inside; });
  }

 private:
  struct Job {
    const std::function<void()>& work;
    uint64_t places;  // for threads that may still join
    uint64_t inside = 0;
  };
  void help() {
    std::unique_lock lock(mutex_);
    for (;;) {
      posted_.wait(lock, [&] { return !jobs_.empty(); });
      Job& job = *jobs_.front();
      if (!--job.places) jobs_.pop_front();
      ++job.inside;
      --free_;
      lock.unlock();
      job.work();
      lock.lock();
      ++free_;
      if (!--job.inside) left_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable posted_, left_;
  std::deque<Job*> jobs_;  // those with places
  uint64_t free_ = 0;      // threads without a job
};

Helpers& helpers() {
  static Helpers* current = [] {
    // A fork leaves the child none of the threads, and maybe a locked mutex.
    pthread_atfork(nullptr, nullptr, [] { current = new Helpers; });
    return new Helpers;
  }();
  return *current;
}

// One turn of a cluster. True: it is over, one way or another.
bool turn(Grid& grid, Resident& r) {
  Cluster& cluster = *r.cluster;
  const FindingPolicy& policy = grid.launch.options.policy;
  const auto is_postponed = [&](const auto& entry) { return policy.postpones(entry.second); };
  std::optional<Finding> error;
  try {
    const uint64_t budget = grid.launch.trace ? kRecordedTurn * cluster.ctas.size() : kTurn;
    const uint64_t limit = grid.launch.options.step_limit * cluster.ctas.size(), before = grid.progress;
    if (grid.stuck != Grid::Stuck::no) grid.give_up(cluster);
    const Cluster::Turn t = cluster.run(std::min(budget, limit));
    if (t.progressed) ++grid.progress;
    if (t.end != Cluster::Turn::End::over) {
      const bool goes_on = cluster.steps() < limit;
      for (const auto& [key, f] : cluster.findings) log_finding(f, 0);
      if (goes_on && std::none_of(cluster.findings.begin(), cluster.findings.end(), is_postponed)) {
        if (t.end == Cluster::Turn::End::stuck && !t.progressed) grid.wait(r, before);
        return false;
      }
      if (!goes_on)
        cluster.warps[0]->fail(Kind::deadlock,
                               "the CTA has not ended after " + std::to_string(cluster.steps()) +
                                   " warp instructions; a loop waits for what never comes, or the limit is low");
    }
  } catch (Finding& f) {
    if (!f.ptx_line) cluster.place(f);
    grid.launch.describe(f);
    if (grid.stuck != Grid::Stuck::known) error = std::move(f);
  }
  grid.add(cluster.settle(error));
  if (error) grid.report(r.begun, std::move(*error));
  // a sample is large enough by clusters or by instructions; those that have begun end
  if (grid.launch.options.sample > 0 && (grid.steps += cluster.steps()) > kSampleSteps) {
    grid.total = std::min<uint64_t>(grid.total, grid.next);
  }
  if (grid.launch.trace) grid.launch.trace->end(cluster);
  if (auto* counters = grid.launch.counters) {
    counters->warp_instructions += cluster.steps();
    for (const auto& cta : cluster.ctas) {
      counters->matrix_ns += nanoseconds(cta->matrix_ticks);
      counters->matrix_macs += cta->matrix_macs;
    }
  }
  return true;
}

void work(Grid& grid) {
  const PlainFloats plain;
  std::deque<Resident> residents;
  std::vector<std::unique_ptr<Cluster>> spare;  // their shared memory and shadow serve again
  const Launch& l = grid.launch;
  Sheet sheet;
  for (bool more = true; (more || !residents.empty()) && !grid.failed && !grid.expired;) {
    if (std::chrono::steady_clock::now().time_since_epoch() > l.deadline) grid.expired = true;
    if (more && grid.resident < l.resident) {
      ++grid.resident;
      uint64_t n = grid.next++;
      while (l.may_be_cancelled(n)) n = grid.next++;
      more = n < grid.total && n < grid.found_at;
      if (more) {
        auto cluster = spare.empty() ? std::make_unique<Cluster>() : std::move(spare.back());
        if (!spare.empty()) spare.pop_back();
        cluster->begin(grid.launch, grid.cluster_at(n), grid.counts ? &sheet : nullptr);
        residents.push_back({std::move(cluster), n});
        if (l.trace) continue;
      } else {
        --grid.resident;
      }
    }
    if (residents.empty()) {
      if (more) std::this_thread::yield();
      continue;
    }
    Resident r = std::move(residents.front());
    residents.pop_front();
    const bool hopeless = r.begun > grid.found_at && grid.stuck == Grid::Stuck::no;
    if (!hopeless && r.waits_at == grid.progress && grid.stuck == Grid::Stuck::no) {  // until another goes on
      residents.push_back(std::move(r));
      grid.rest();
      continue;
    }
    if (hopeless) ++grid.progress;  // those that wait are fewer
    if (hopeless || turn(grid, r)) {
      const uint64_t left = r.cluster->successor;
      if (!hopeless && l.may_be_cancelled(left) && left < grid.found_at) {  // nobody has cancelled it
        r.cluster->begin(grid.launch, left, grid.counts ? &sheet : nullptr);
        residents.push_back({std::move(r.cluster), left});
        continue;
      }
      --grid.resident;
      spare.push_back(std::move(r.cluster));
    } else {
      residents.push_back(std::move(r));
    }
  }
  if (!grid.counts) return;
  const std::lock_guard lock(grid.mutex);
  grid.sheet.add(sheet);
}

// An exception that left a thread would end the process.
void work_safely(Grid& grid) {
  try {
    work(grid);
  } catch (...) {
    grid.fail();
  }
}

}  // namespace

bool Launch::may_be_cancelled(uint64_t number) const {
  return cancels && number && number < grid_size() / cluster_size() && (mix(options.seed + mix(number + 1)) & 3);
}

void Launch::index_of(uint64_t number, unsigned index[3]) const {
  uint64_t of_cluster = number / cluster_size(), rank = number % cluster_size();
  for (int d = 0; d < 3; ++d) {
    const uint64_t clusters = grid[d] / cluster[d];
    index[d] = static_cast<unsigned>(of_cluster % clusters * cluster[d] + rank % cluster[d]);
    of_cluster /= clusters;
    rank /= cluster[d];
  }
}

void Launch::describe(Finding& f) const {
  f.kernel = demangled(code->name);
  f.mangled = code->name;
  f.seed = options.seed;
  f.arch = arch;
}

bool Launch::run() {
  constexpr std::string_view kCancels = "clusterlaunchcontrol.try_cancel";
  cancels = std::any_of(code->statements.begin(), code->statements.end(),
                        [&](const Statement* s) { return s->opcode.compare(0, kCancels.size(), kCancels) == 0; });
  if (options.explore || !options.schedule.empty()) explore(*this);
  const GlobalShadow::Recording recording(global_shadow(), *this);
  Grid grid(*this);
  if (recorded(options)) trace = begin_trace(*this);
  const unsigned hardware = std::max(1u, std::thread::hardware_concurrency());
  const uint64_t threads = std::min<uint64_t>(options.threads > 0 ? options.threads : hardware, grid.total);
  helpers().run(threads - 1, [&] { work_safely(grid); });
  if (grid.failure) std::rethrow_exception(grid.failure);
  if (counters) ++counters->launches;
  if (trace) trace->add_to(grid.sheet);
  if (grid.counts)
    record(*this, grid.sheet,
           static_cast<double>(grid.all) / static_cast<double>(std::min(grid.all, grid.total.load())));
  if (recorded(options) && !grid.finding) keep_trace(*this, grid.sheet);
  if (grid.finding) throw *grid.finding;
  return !grid.expired;
}

}  // namespace gpuless
