#include "explore/search.h"

#include <algorithm>
#include <deque>
#include <optional>
#include <sstream>
#include <unordered_set>

#include "explore/execution.h"
#include "finding_log.h"
#include "formats.h"
#include "global_shadow.h"
#include "matrix.h"

namespace gpuless {
namespace {

// Executions that shrink one schedule.
constexpr int kMostShrinking = 200;
// Beginnings that wait for their turn, for each order that may be tried.
constexpr size_t kMostWaiting = 64;

// ---- Schedules as text: "launch.cluster:choice=thread,choice=thread", a thread as "warp+operation+..." ----

struct Schedule {
  uint64_t stream = 0, cluster = 0;  // the launch since the seed was set, and the first of the clusters
  Decisions decisions;

  std::string text() const {
    std::string s = std::to_string(stream) + "." + std::to_string(cluster) + ":";
    const char* comma = "";
    for (const auto& [choice, thread] : decisions) {
      s += comma + std::to_string(choice);
      const char* sign = "=";
      for (const uint32_t part : thread) s += std::exchange(sign, "+") + std::to_string(part);
      comma = ",";
    }
    return s;
  }
  static std::optional<Schedule> read(const std::string& text) {
    std::istringstream in(text);
    Schedule s;
    char point = 0, colon = 0;
    if (!(in >> s.stream >> point >> s.cluster >> colon) || point != '.' || colon != ':') return {};
    const auto more = [&] { return in.good() && in.peek() != EOF; };
    for (char sign = ','; more();) {
      uint64_t choice = 0;
      if (sign != ',' || !(in >> choice >> sign) || sign != '=') return {};
      Thread& thread = s.decisions[choice];
      for (uint32_t part; (sign == '=' || sign == '+') && in >> part;) {
        thread.push_back(part);
        sign = ';';
        if (more()) in >> sign;
      }
      if (in.fail() || (sign != ';' && !more())) return {};  // a sign at the end
    }
    return s;
  }
};

class Search {
 public:
  explicit Search(Launch& launch) : launch_(launch) {}
  void run();

 private:
  struct Candidate {
    std::shared_ptr<const Trace> trace;  // null: the order that comes by itself
    Reversal reversal;
  };
  Outcome execute(const std::vector<uint64_t>& clusters, const std::vector<Thread>& beginning, const Decisions&,
                  Survey* survey = nullptr);
  std::vector<std::vector<uint64_t>> groups();
  void search(const std::vector<uint64_t>& clusters);
  void add_reversals(const std::shared_ptr<const Trace>&);
  Decisions shrink(const std::vector<uint64_t>& clusters, const Outcome&);
  void keep(const std::vector<uint64_t>& clusters, Outcome&);
  void limit(const std::string& why) {
    if (launch_.explored.limit.empty()) launch_.explored.limit = why;
  }

  Launch& launch_;
  const PlainFloats plain_;
  std::vector<std::unique_ptr<Cluster>> spare_;
  // Of the clusters that are searched.
  std::deque<Candidate> waiting_;
  std::unordered_set<uint64_t> begun_, orders_;
};

Outcome Search::execute(const std::vector<uint64_t>& clusters, const std::vector<Thread>& beginning,
                        const Decisions& decisions, Survey* survey) {
  const GlobalShadow::Recording recording(global_shadow(), launch_);
  return Execution(launch_, clusters, spare_, survey).run(beginning, decisions);
}

// The clusters that synchronise with each other are searched together, and all others apart.
std::vector<std::vector<uint64_t>> Search::groups() {
  std::vector<uint64_t> all(launch_.grid_size() / launch_.cluster_size());
  for (uint64_t c = 0; c < all.size(); ++c) all[c] = c;
  if (all.size() == 1) return {all};
  Survey survey;
  Outcome outcome = execute(all, {}, {}, &survey);
  ++launch_.explored.runs;
  if (outcome.finding) keep(all, outcome);
  if (!outcome.limit.empty()) limit(outcome.limit);
  if (outcome.finding || !outcome.limit.empty()) return {};
  uint64_t others = 0;
  auto groups = survey.groups(all.size(), &others);
  launch_.explored.orders += others;
  return groups;
}

void Search::add_reversals(const std::shared_ptr<const Trace>& trace) {
  for (const Reversal& r : trace->reversals) {
    if (begun_.insert(trace->hash(r)).second) waiting_.push_back({trace, r});
  }
}

void Search::search(const std::vector<uint64_t>& clusters) {
  Explored& explored = launch_.explored;
  waiting_.clear();
  begun_.clear();
  orders_.clear();
  waiting_.push_back({});
  while (!waiting_.empty()) {
    if (explored.runs >= launch_.options.explore || waiting_.size() > kMostWaiting * launch_.options.explore) {
      limit("the bound of " + std::to_string(launch_.options.explore) + " executions");
      break;
    }
    // By turns the one that differs least from the first order, and the one that differs most: a fault may need either.
    const bool first = explored.runs & 1;
    const Candidate next = std::move(first ? waiting_.front() : waiting_.back());
    first ? waiting_.pop_front() : waiting_.pop_back();
    std::vector<Thread> beginning;
    if (next.trace)
      for (const uint32_t t : next.trace->beginning(next.reversal)) beginning.push_back(next.trace->threads[t]);
    Outcome outcome = execute(clusters, beginning, {});
    ++explored.runs;
    if (outcome.finding) {
      explored.orders += orders_.size() + 1;
      return keep(clusters, outcome);
    }
    for (const auto& [key, f] : outcome.findings) log_finding(f, 0);
    launch_.findings.add(std::move(outcome.findings));
    if (!outcome.limit.empty()) {
      limit(outcome.limit);
      continue;
    }
    orders_.insert(outcome.trace->hash());
    add_reversals(outcome.trace);  // of a known order too: looks in vain are not part of it, but may have come earlier
  }
  explored.orders += orders_.size();
}

// Fewer decisions that end in a finding of the same kind: each is left out that is not needed.
Decisions Search::shrink(const std::vector<uint64_t>& clusters, const Outcome& outcome) {
  Decisions least = outcome.decisions;
  int left = kMostShrinking;
  const auto fails = [&](const Decisions& some) {
    const Outcome again = execute(clusters, {}, some);
    return again.finding && again.finding->kind == outcome.finding->kind;
  };
  if (fails({})) return {};
  for (size_t part = std::max<size_t>(least.size() / 2, 1); part && left > 0;) {
    bool smaller = false;
    for (size_t begin = 0; begin < least.size() && left > 0; --left) {
      Decisions some;
      size_t k = 0;
      for (const auto& d : least) {
        if (k < begin || k >= begin + part) some.insert(d);
        ++k;
      }
      if (fails(some)) {
        least = std::move(some);
        smaller = true;
      } else {
        begin += part;
      }
    }
    if (!smaller || part > 1) part /= 2;
  }
  return least;
}

// The finding of an order ends the launch, or the search.
void Search::keep(const std::vector<uint64_t>& clusters, Outcome& outcome) {
  Finding f = std::move(*outcome.finding);
  outcome.finding = f;
  f.schedule = Schedule{launch_.stream, clusters[0], shrink(clusters, outcome)}.text();
  limit("a finding");
  if (!launch_.options.policy.accepts(f)) throw f;
  log_finding(f, 0);
  launch_.findings.add(std::move(f));
}

void Search::run() {
  const std::optional<Schedule> schedule = Schedule::read(launch_.options.schedule);
  if (schedule && schedule->stream != launch_.stream) return;
  for (const auto& clusters : groups()) {
    if (!schedule) {
      search(clusters);
    } else if (clusters[0] == schedule->cluster) {
      const Outcome outcome = execute(clusters, {}, schedule->decisions);
      if (!outcome.finding) continue;
      Finding f = *outcome.finding;
      f.schedule = launch_.options.schedule;
      throw f;
    }
  }
}

}  // namespace

std::string ExploredLaunch::text() const {
  const std::string some = std::to_string(orders) + (orders == 1 ? " order" : " orders");
  return kernel + ", launch " + std::to_string(launch) + ": explored " +
         (complete ? "all " + some : some + " of more (" + limit + ")");
}

std::string ExploredLaunch::json() const {
  return "{\"kernel\":" + quoted(kernel) + ",\"launch\":" + std::to_string(launch) +
         ",\"orders\":" + std::to_string(orders) + ",\"runs\":" + std::to_string(runs) +
         ",\"complete\":" + (complete ? "true" : "false") + ",\"limit\":" + quoted(limit) + "}";
}

const char* wrong_schedule(const std::string& text) {
  if (text.empty() || Schedule::read(text)) return nullptr;
  return "a schedule reads \"launch.cluster:choice=thread,...\", as findings have it";
}

void explore(Launch& launch) {
  if (launch.cancels) {
    launch.explored.limit = "clusterlaunchcontrol";
    return;
  }
  Search(launch).run();
  launch.releases.forget();
  launch.explored.complete = launch.explored.limit.empty();
}

}  // namespace gpuless
