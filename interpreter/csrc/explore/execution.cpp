#include "explore/execution.h"

#include <algorithm>
#include <cstring>

#include "finding.h"

namespace gpuless {
namespace {

constexpr uint64_t kSlice = 1 << 16;        // instructions between two looks at the limits
constexpr uint64_t kMostSteps = 1 << 26;    // of a warp
constexpr uint64_t kMostEvents = 100'000;   // of an order
constexpr uint64_t kMostClocks = 1 << 25;   // events times chains
constexpr uint64_t kMostJournal = 1 << 28;  // bytes

bool looks(const Warp& w) {
  const Strand& s = w.strands[w.running];
  return s.frame->code->instructions[s.pc].visible == Visible::looks;
}

}  // namespace

uint64_t object_of(const Cta& cta, int kind, uint64_t number) {
  return mix(mix(mix(static_cast<uint64_t>(kind)) + cta.cluster->number + 1) + static_cast<uint64_t>(cta.rank) + 1) +
         number;
}

// ---- Journal ----

void Journal::save(uint64_t address, uint64_t bytes) {
  writes_.push_back({address, before_.size()});
  const auto* from = reinterpret_cast<const uint8_t*>(address);
  before_.insert(before_.end(), from, from + bytes);
}

void Journal::restore() {
  while (!writes_.empty()) {
    const Write& w = writes_.back();
    std::memcpy(reinterpret_cast<uint8_t*>(w.address), before_.data() + w.begin, before_.size() - w.begin);
    before_.resize(w.begin);
    writes_.pop_back();
  }
}

// ---- Survey ----

uint64_t Survey::root(uint64_t cluster) {
  uint64_t& parent = parents_.try_emplace(cluster, cluster).first->second;
  return parent == cluster ? cluster : parent = root(parent);
}

void Survey::word(uint64_t cluster, uint64_t object, uint64_t commutes) {
  Word& w = words_.try_emplace(object, Word{commutes, {}}).first->second;
  if (w.clusters.empty() || w.clusters.back() != cluster) w.clusters.push_back(cluster);
  if (w.commutes != commutes) w.commutes = 0;
  if (w.commutes) return;
  for (const uint64_t other : w.clusters) {
    const uint64_t a = root(other), b = root(cluster);
    parents_[std::max(a, b)] = std::min(a, b);
  }
  w.clusters.resize(1);
}

void Survey::touched(uint64_t cluster, uint32_t thread) {
  Touching& t = touching_.try_emplace(cluster, Touching{thread}).first->second;
  t.more |= t.first != thread;
}

std::vector<std::vector<uint64_t>> Survey::groups(uint64_t clusters, uint64_t* others) {
  std::map<uint64_t, std::vector<uint64_t>> by_root;
  for (const auto& [cluster, touching] : touching_) by_root[root(cluster)].push_back(cluster);
  std::vector<std::vector<uint64_t>> all;
  *others = clusters;
  for (auto& [first, group] : by_root) {
    if (group.size() == 1 && !touching_.at(group[0]).more) continue;
    *others -= group.size();
    all.push_back(std::move(group));
  }
  return all;
}

// ---- Execution ----

Execution::Execution(Launch& launch, std::vector<uint64_t> clusters, std::vector<std::unique_ptr<Cluster>>& spare,
                     Survey* survey)
    : launch_(launch), clusters_(std::move(clusters)), spare_(spare), survey_(survey) {
  const uint64_t threads = uint64_t{launch.block[0]} * launch.block[1] * launch.block[2];
  const auto warps = static_cast<uint32_t>((threads + kLanes - 1) / kLanes * launch.cluster_size());
  trace_ = std::make_shared<Trace>(static_cast<uint32_t>(warps * clusters_.size()));
  for (const uint64_t c : clusters_) {
    for (uint32_t k = 0; k < warps; ++k) {
      trace_->number_of({static_cast<uint32_t>(c * warps + k)});
      actors_.emplace_back();
    }
  }
}

void Execution::begin_clusters() {
  while (next_cluster_ < clusters_.size() && running_.size() < static_cast<size_t>(launch_.resident)) {
    auto cluster = spare_.empty() ? std::make_unique<Cluster>() : std::move(spare_.back());
    if (!spare_.empty()) spare_.pop_back();
    cluster->begin(launch_, clusters_[next_cluster_], nullptr);
    for (size_t k = 0; k < cluster->warps.size(); ++k) {
      actors_[next_cluster_ * cluster->warps.size() + k].warp = cluster->warps[k];
    }
    ++next_cluster_;
    running_.push_back(std::move(cluster));
  }
}

Cluster& Execution::cluster_of(const Actor& a) const { return *(a.warp ? a.warp->cta : a.pending->cta)->cluster; }

bool Execution::ready(uint32_t thread) const {
  const Actor& a = actors_[thread];
  if (a.pending) return !a.pending->done && a.pending->ready(*a.pending->cta);
  if (!a.warp || !a.warp->live || a.warp->blocked_at == a.warp->cta->cluster->events) return false;
  return !a.waits || std::any_of(a.waits_for.begin(), a.waits_for.end(), [&](uint64_t object) {
    const auto change = changed_.find(object);
    return change != changed_.end() && change->second > a.waits_since;
  });
}

// Whoever acts goes on as long as it can; then the first warp that can, then what is under way, the oldest first.
uint32_t Execution::by_itself() {
  if (now_ != Trace::kNone && actors_[now_].warp && ready(now_)) return now_;
  for (const auto& cluster : running_) {
    if (!cluster->live_warps) continue;
    for (const Warp* w : cluster->warps) {
      if (!w->live) continue;
      const auto thread = static_cast<uint32_t>(
          (std::lower_bound(clusters_.begin(), clusters_.end(), cluster->number) - clusters_.begin()) *
              cluster->warps.size() +
          (w->agent - kFirstWarp));
      if (ready(thread)) return thread;
    }
  }
  std::erase_if(under_way_, [&](uint32_t t) { return actors_[t].pending->done; });
  for (const uint32_t t : under_way_)
    if (ready(t)) return t;
  return Trace::kNone;
}

uint32_t Execution::find(const Thread& thread) const {
  const auto place = std::find(trace_->threads.begin(), trace_->threads.end(), thread);
  return place == trace_->threads.end() ? Trace::kNone : static_cast<uint32_t>(place - trace_->threads.begin());
}

// The next of a beginning that can act; kNone: it is over. Where nobody could go on, time limits have expired.
uint32_t Execution::next_of(const std::vector<Thread>& beginning, size_t& next) {
  while (next < beginning.size()) {
    const uint32_t t = find(beginning[next++]);
    if (t == Trace::kNone) continue;
    if (ready(t) || (by_itself() == Trace::kNone && stir() && ready(t))) return t;
  }
  return Trace::kNone;
}

void Execution::act(uint32_t thread) {
  ++steps_;
  now_ = thread;
  Actor& a = actors_[thread];
  const uint32_t effects = a.warp ? a.warp->effects : 0;
  const size_t before = trace_->events.size();
  if (a.pending) {
    const std::shared_ptr<Pending> p = a.pending;
    p->cta->cluster->complete(*p);
  } else {
    a.waits = false;
    if (!a.looks.empty()) a.looks.back().second = trace_->events.size();  // where it is now
    advance(a);
  }
  trace_->close();
  if (a.pending || a.warp->effects != effects) {
    ++changes_;
    for (const uint64_t object : trace_->touched_since(before)) changed_[object] = changes_;
  }
  if (a.warp && a.warp->live && a.warp->blocked_at != a.warp->cta->cluster->events) goes_round(a);
}

// To behind the next event of the warp, or as far as it comes. A survey has no events: to where it waits. States before
// looks are noted on the way.
void Execution::advance(Actor& a) {
  Warp& w = *a.warp;
  Cluster& cluster = *w.cta->cluster;
  while (w.live) {
    cluster.step(w, kSlice);
    check_limits();
    if (!w.live || w.blocked_at == cluster.events || trace_->open()) return;
    goes_round(a);
    if (a.waits) return;
  }
}

// A warp that comes to a look in a state in which it came to it before, and has had no effect since, waits until what
// it has looked at changes. Its looks since then are none: whoever looks later sees the same.
void Execution::goes_round(Actor& a) {
  Warp& w = *a.warp;
  if (a.effects != w.effects) {
    a.looks.clear();
    a.effects = w.effects;
    a.switches = 0;
  }
  if (!looks(w)) return;
  const uint64_t state = state_of(w);
  const auto same = std::find_if(a.looks.begin(), a.looks.end(), [&](const auto& l) { return l.first == state; });
  if (same == a.looks.end()) {
    a.looks.emplace_back(state, trace_->events.size());
    return;
  }
  const size_t since = same->second;
  a.waits_for = trace_->touched_since(since);
  const auto is_its = [&](const Event& e) { return e.thread == now_; };
  if (std::all_of(trace_->events.begin() + static_cast<int64_t>(since), trace_->events.end(), is_its)) {
    trace_->drop(since);
    for (Actor& other : actors_)
      for (auto& l : other.looks) l.second = std::min(l.second, since);
  }
  a.looks.erase(same + 1, a.looks.end());
  const auto others = std::count_if(w.strands.begin(), w.strands.end(), [](const Strand& s) { return !s.waiting; }) - 1;
  if (a.switches < 2 * others) {  // of its own lanes, those that it may wait for have their turn
    ++a.switches;
    w.turn = kStrandTurn + 1;
    return;
  }
  a.waits = true;
  a.waits_since = changes_;
}

void Execution::look_again() {
  for (Actor& a : actors_) a.waits = false;
}

// Nobody can go on: time limits expire; then those that go round in circles look again, once, as a weak store leaves
// no trace here. False: neither helps.
bool Execution::stir() {
  bool any = false;
  for (const auto& cluster : running_) {
    if (cluster->idle_at == cluster->events) continue;
    cluster->idle_at = cluster->events;
    for (Warp* blocked : cluster->warps) blocked->blocked_at = ~uint64_t{0};
    any = true;
  }
  if (any) return true;
  if (stirred_at_ == changes_) return false;
  stirred_at_ = changes_;
  look_again();
  return std::any_of(actors_.begin(), actors_.end(), [](const Actor& a) { return a.warp && a.warp->live; });
}

// Leaves clusters that are over, or all, to the next execution.
void Execution::retire(bool all) {
  for (size_t k = 0; k < running_.size();) {
    Cluster& c = *running_[k];
    const auto open = [](const auto& p) { return !p->done && p->ready(*p->cta); };
    if (!all && (c.live_warps || std::any_of(c.pending.begin(), c.pending.end(), open))) {
      ++k;
      continue;
    }
    for (Actor& a : actors_) {
      if (a.warp && a.warp->cta->cluster == &c) a.warp = nullptr;
    }
    c.end();
    findings_.add(c.settle(error_));
    spare_.push_back(std::move(running_[k]));
    running_.erase(running_.begin() + static_cast<int64_t>(k));
  }
}

void Execution::check_limits() const {
  const auto most = [](uint64_t n, const std::string& what) {
    return "an order has more than " + std::to_string(n) + " " + what;
  };
  if (trace_->events.size() > kMostEvents) throw GivenUp{most(kMostEvents, "synchronisations")};
  if (trace_->events.size() * trace_->threads.size() > kMostClocks)
    throw GivenUp{"too many warps and operations synchronise with each other"};
  if (journal_.bytes() > kMostJournal) throw GivenUp{most(kMostJournal, "bytes written to global memory")};
  const Warp* const w = actors_[now_].warp;
  if (w && w->steps > kMostSteps) throw GivenUp{most(kMostSteps, "instructions of a warp")};
  if (std::chrono::steady_clock::now().time_since_epoch() > launch_.deadline) throw GivenUp{"the time limit is over"};
}

Finding Execution::deadlock() const {
  for (const Actor& a : actors_)
    if (a.warp && a.waits) a.warp->spins_at = 1;
  for (const auto& cluster : running_)
    if (cluster->live_warps) return cluster->deadlock();
  return {};
}

Outcome Execution::run(const std::vector<Thread>& beginning, const Decisions& decisions) {
  Outcome outcome;
  size_t next = 0;
  launch_.execution = this;
  launch_.releases.forget();
  try {
    for (;;) {
      retire(false);
      begin_clusters();
      if (running_.empty()) break;
      uint32_t thread = by_itself();
      uint32_t forced = next_of(beginning, next);
      if (const auto d = decisions.find(steps_); d != decisions.end()) forced = find(d->second);
      if (forced != Trace::kNone && forced != thread && ready(forced)) {
        outcome.decisions[steps_] = trace_->threads[forced];
        thread = forced;
      }
      if (thread != Trace::kNone) {
        act(thread);
      } else if (!stir()) {
        throw deadlock();
      }
    }
  } catch (Finding& f) {
    if (!f.ptx_line && now_ != Trace::kNone) cluster_of(actors_[now_]).place(f);
    launch_.describe(f);
    error_ = std::move(f);
  } catch (const GivenUp& g) {
    outcome.limit = g.why;
  }
  trace_->close();
  retire(true);
  launch_.execution = nullptr;
  journal_.restore();
  outcome.finding = std::move(error_);
  outcome.findings = std::move(findings_);
  outcome.trace = trace_;
  return outcome;
}

// ---- What handlers tell ----

void Execution::issued(const std::shared_ptr<Pending>& p) {
  Actor& issuer = actors_[now_];
  Thread name = trace_->threads[now_];
  name.push_back(issuer.issues++);
  const uint32_t last = trace_->open() ? static_cast<uint32_t>(trace_->events.size() - 1) : trace_->last_of(now_);
  const uint32_t by = last == Trace::kNone ? issuer.issued_by : last;
  under_way_.push_back(trace_->number_of(name));
  actors_.emplace_back();
  actors_.back().pending = p;
  actors_.back().issued_by = by;
}

void Execution::phase(uint64_t object, uint64_t phase, Touch touch) {
  if (survey_) return survey_->touched(cluster_of(actors_[now_]).number, now_);
  trace_->phase(now_, actors_[now_].issued_by, object, phase, touch);
}

void Execution::touch(uint64_t object, uint64_t commutes) {
  if (!survey_) return trace_->word(now_, actors_[now_].issued_by, object, commutes);
  const uint64_t cluster = cluster_of(actors_[now_]).number;
  survey_->touched(cluster, now_);
  survey_->word(cluster, object, commutes);
}

void Execution::access(const Cta& issuer, bool shared, const uint64_t address[kLanes], int bytes, Use use, Mask mask) {
  words_.clear();
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const Cta* const cta = shared ? shared_cta(const_cast<Cta&>(issuer), address[l]) : nullptr;
    const uint64_t begin = shared ? shared_offset_of(address[l]) : address[l];
    for (uint64_t word = begin / 4; word <= (begin + static_cast<uint64_t>(bytes) - 1) / 4; ++word)
      words_.emplace_back(shared ? object_of(cta ? *cta : issuer, 5, word) : word, l);
  }
  if (use == Use::atomic) return;  // it depends on what comes of it
  std::sort(words_.begin(), words_.end());
  words_.erase(std::unique(words_.begin(), words_.end(), [](auto& a, auto& b) { return a.first == b.first; }),
               words_.end());
  for (const auto& [word, lane] : words_) touch(word, is_write(use) ? 0 : Trace::kReads);
}

void Execution::atomic(Mask changed, uint64_t commutes) {
  std::sort(words_.begin(), words_.end());
  for (size_t k = 0; k < words_.size();) {
    const uint64_t word = words_[k].first;
    bool any = false;
    for (; k < words_.size() && words_[k].first == word; ++k) any |= changed >> words_[k].second & 1;
    touch(word, any ? commutes : Trace::kReads);
  }
}

}  // namespace gpuless
