// What launches with Options::timeline have left, and gpuless_timeline_json, which spends the time on it.
#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <numeric>
#include <optional>
#include <queue>
#include <sstream>
#include <tuple>

#include "core.h"
#include "device.h"
#include "machine.h"
#include "timeline_replay.h"

namespace gpuless {
namespace {

struct Entry {
  std::shared_ptr<LaunchTrace> trace;
  Ops ops;
  const Device* device = nullptr;
  uint64_t launches = 0, programmatic = 0;
  std::optional<LaunchKey> before;  // the launch before a programmatic one
  uint64_t touched = 0;             // sectors of global memory, each once, of the first launch
  bool cut = false;
};

struct Record {
  std::mutex mutex;
  std::map<LaunchKey, Entry> entries;
  std::optional<LaunchKey> last;
};
Record& the_record() {
  static Record* const r = new Record;  // never destroyed: write_report reads it at exit
  return *r;
}

std::string list(const std::vector<std::string>& texts) {
  std::string s = "[";
  for (const auto& t : texts) s += (s.size() > 1 ? "," : "") + quoted(t);
  return s + "]";
}
std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", x);
  return text;
}

// The clusters of each group of multiprocessors, as a GPU hands them out: the next to the first that has room. Time is
// counted in instructions.
std::vector<std::vector<uint64_t>> hand_out(const LaunchTrace& t, uint64_t resident) {
  using Room = std::pair<uint64_t, uint64_t>;  // since when, and whose
  std::priority_queue<Room, std::vector<Room>, std::greater<Room>> rooms;
  for (uint64_t k = 0; k < std::min<uint64_t>(t.groups * resident, t.lengths.size()); ++k) rooms.emplace(0, k);
  std::vector<std::vector<uint64_t>> clusters(t.groups);
  for (uint64_t n = 0; n < t.lengths.size(); ++n) {
    const auto [since, room] = rooms.top();
    rooms.pop();
    clusters[room % t.groups].push_back(n);
    rooms.emplace(since + t.lengths[n], room);
  }
  return clusters;
}

// A group's clusters, each with the recorded one that stands for it: itself, or the nearest in length, of the same
// group if there is one, by turns where several are.
std::vector<ReplayInput::Turn> turns_of(const LaunchTrace& t, const std::vector<uint64_t>& clusters, uint64_t group) {
  std::vector<ReplayInput::Turn> turns;
  for (const uint64_t n : clusters) {
    std::vector<size_t> nearest;
    std::tuple<bool, uint64_t, bool> least(true, ~uint64_t{0}, true);
    for (size_t r = 0; r < t.recorded_clusters.size(); ++r) {
      const uint64_t number = t.recorded_clusters[r], length = t.lengths[number];
      const std::tuple distance(number != n, std::max(length, t.lengths[n]) - std::min(length, t.lengths[n]),
                                number % t.groups != group);
      if (distance < least) nearest.clear();
      if (distance <= least) nearest.push_back(r);
      least = std::min(least, distance);
    }
    const size_t recorded = nearest[turns.size() % nearest.size()];
    turns.push_back({recorded, t.lengths[n], t.lengths[t.recorded_clusters[recorded]]});
  }
  return turns;
}

ReplayInput input_of(const LaunchKey& key, const Entry& e, uint64_t resident) {
  ReplayInput in;
  const LaunchTrace& trace = *e.trace;
  in.ops = &e.ops;
  const auto ctas = trace.ctas();
  in.ctas.assign(ctas.begin(), ctas.end());
  in.cluster_size = static_cast<uint64_t>(key.shape[6]) * key.shape[7] * key.shape[8];
  in.resident = resident;
  double fresh = 0, recorded = 0, every = 0;
  for (const CtaTrace* cta : in.ctas) fresh += static_cast<double>(cta->sheet.footprint.touched());
  for (const uint64_t n : trace.recorded_clusters) recorded += static_cast<double>(trace.lengths[n]);
  for (const uint64_t length : trace.lengths) every += static_cast<double>(length);
  const auto sampled = static_cast<double>(in.ctas.size());
  const double all = fresh / recorded * every;
  in.fresh_share = all > 0 ? std::min(1.0, static_cast<double>(e.touched) / all) : 1;
  // L1 has what the resident CTAs' shared memory leaves of the multiprocessor's.
  const int64_t shared = (key.shared_bytes + e.device->shared_reserved_per_block) * static_cast<int64_t>(in.resident);
  const int64_t l1 = e.device->shared_per_multiprocessor + (28 << 10) - shared;
  in.from_l1 = fresh / sampled * static_cast<double>(kSectorBytes * in.resident) <= static_cast<double>(l1);
  return in;
}

uint64_t ctas_of(const LaunchKey& key) { return static_cast<uint64_t>(key.shape[0]) * key.shape[1] * key.shape[2]; }

// Whether a launch's CTAs find room while those of the one before run: beside them, or on multiprocessors without any.
bool fits_beside(const LaunchKey& key, const Entry& e, const LaunchKey& before_key, const Entry& before) {
  const Device& d = *e.device;
  const auto rounds = [](uint64_t n, uint64_t by) { return (n + by - 1) / by; };
  const auto all = static_cast<uint64_t>(d.multiprocessors);
  if (ctas_of(before_key) + rounds(ctas_of(key), static_cast<uint64_t>(e.trace->blocks)) <= all) return true;
  int64_t registers = 0, shared = 0, threads = 0;
  const auto add = [&](const LaunchKey& k, const Entry& entry) {
    const auto blocks = static_cast<int64_t>(rounds(ctas_of(k), all));
    const int64_t of_block = static_cast<int64_t>(k.shape[3]) * k.shape[4] * k.shape[5];
    threads += blocks * of_block;
    registers += blocks * of_block * entry.trace->registers;
    shared += blocks * (k.shared_bytes + d.shared_reserved_per_block);
  };
  add(key, e);
  add(before_key, before);
  return registers <= d.registers_per_multiprocessor && shared <= d.shared_per_multiprocessor &&
         threads <= d.threads_per_multiprocessor;
}

// The slowest of a launch's multiprocessors, or groups of them that have a cluster.
struct Slowest {
  uint64_t resident, clusters;  // at once; in all
  ReplayResult result;
};
Slowest slowest(const LaunchKey& key, const Entry& e, const Machine& machine, uint64_t resident, uint64_t head_start) {
  const LaunchTrace& trace = *e.trace;
  ReplayInput in = input_of(key, e, resident ? resident : static_cast<uint64_t>(trace.blocks));
  in.head_start = head_start;
  const auto clusters = hand_out(trace, in.resident);
  // Those of which most is recorded, and the one that has most to do, unless one of them has as much.
  std::vector<uint64_t> groups = trace.recorded_groups, work(trace.groups);
  for (uint64_t g = 0; g < trace.groups; ++g)
    for (const uint64_t n : clusters[g]) work[g] += trace.lengths[n];
  const auto busiest = static_cast<uint64_t>(std::max_element(work.begin(), work.end()) - work.begin());
  if (std::all_of(groups.begin(), groups.end(), [&](uint64_t g) { return work[g] < work[busiest]; })) {
    groups.push_back(busiest);
  }
  const double every = std::accumulate(work.begin(), work.end(), 0.0);
  in.active = every / static_cast<double>(work[busiest]) * static_cast<double>(in.cluster_size);
  Slowest r{.resident = in.resident, .clusters = 0, .result = {}};
  for (const uint64_t group : groups) {
    in.turns = turns_of(trace, clusters[group], group);
    ReplayResult result = replay(in, machine);
    if (result.cycles <= r.result.cycles) continue;
    r.clusters = clusters[group].size();
    r.result = std::move(result);
  }
  return r;
}

// Of a programmatic launch, from the end of the launch before on: by then its CTAs have begun, when all of that launch
// had let them, and have done at least what comes before their griddepcontrol.wait.
uint64_t cycles_after(const Record& record, const LaunchKey& key, const Entry& e, const Machine& machine,
                      const ReplayResult& alone, uint64_t resident) {
  uint64_t head_start = alone.dependency;
  const auto before = e.before ? record.entries.find(*e.before) : record.entries.end();
  if (before != record.entries.end() && !before->second.cut && fits_beside(key, e, before->first, before->second))
    head_start = std::max(head_start, slowest(before->first, before->second, machine, 0, 0).result.tail);
  return slowest(key, e, machine, resident, head_start).result.cycles - head_start;
}

std::string json_of(const Record& record, const LaunchKey& key, const Entry& e, const Machine& machine,
                    uint64_t resident) {
  if (e.cut) {
    Finding f;
    f.kind = Kind::unsupported;
    f.kernel = key.kernel;
    f.message = "a CTA executes more instructions than the timeline records: launch a smaller problem";
    throw f;
  }
  const auto [at_once, in_all, r] = slowest(key, e, machine, resident, 0);
  const uint64_t after = e.programmatic && r.dependency ? cycles_after(record, key, e, machine, r, resident) : r.cycles;
  std::string s =
      "{\"kernel\":" + quoted(key.kernel) + ",\"arch\":" + quoted(e.device->arch) +
      ",\"multiprocessors\":" + std::to_string(e.device->multiprocessors) + "," + key.json() +
      ",\"launches\":" + std::to_string(e.launches) + ",\"programmatic\":" + std::to_string(e.programmatic) +
      ",\"resident\":" + std::to_string(at_once) + ",\"clusters\":" + std::to_string(in_all) +
      ",\"replayed\":" + std::to_string(r.replayed) + ",\"cycles\":" + std::to_string(r.cycles) +
      ",\"dependency_cycle\":" + std::to_string(r.dependency) + ",\"after_cycles\":" + std::to_string(after) +
      ",\"replayed_cycles\":" + std::to_string(r.span_cycles) + ",\"busy\":{\"tensor cores\":" + number(r.tensor) +
      ",\"issue\":" + number(r.issue) + ",\"shared memory\":" + number(r.shared) + ",\"L2\":" + number(r.l2) +
      ",\"L2 writes\":" + number(r.l2_writes) + ",\"DRAM\":" + number(r.dram) + "},\n\"instructions\":[";
  bool first = true;
  for (size_t k = 0; k < r.ops.size(); ++k) {
    if (!r.ops[k].issued) continue;
    s += (first ? "{" : ",\n{") + e.ops.lines[k].json() + ",\"issued\":" + std::to_string(r.ops[k].issued) +
         ",\"slots\":" + std::to_string(r.ops[k].issued * e.ops.ops[k].slots) + ",\"waited\":{";
    first = false;
    bool first_wait = true;
    for (int w = 0; w < kWaits; ++w) {
      if (!r.ops[k].waited[w]) continue;
      s += std::string(first_wait ? "\"" : ",\"") + kWaitNames[w] + "\":" + std::to_string(r.ops[k].waited[w]);
      first_wait = false;
    }
    s += "}}";
  }
  s += "],\n\"tracks\":" + list(r.tracks) + ",\"names\":" + list(r.names) +
       ",\"spans_cut\":" + (r.spans_cut ? "true" : "false") + ",\"spans\":[";
  first = true;
  // A name is a number into "names", or ["file", line, "opcode"] of an instruction.
  for (const Span& span : r.spans) {
    const Line* line = span.name & kOfOp ? &e.ops.lines[span.name & ~kOfOp] : nullptr;
    const std::string name = line ? "[" + quoted(line->file) + "," +
                                        std::to_string(line->file.empty() ? line->ptx_line : line->line) + "," +
                                        quoted(line->opcode) + "]"
                                  : std::to_string(span.name);
    s += std::string(first ? "[" : ",[") + std::to_string(span.track) + "," + name + "," + std::to_string(span.begin) +
         "," + std::to_string(span.end) + "]";
    first = false;
  }
  return s + "]}";
}

// Of those that `selects` picks, with the machine that machine_of knows for an architecture.
template <class S, class M>
std::string timeline_json(S selects, M machine_of, uint64_t resident) {
  Record& r = the_record();
  const std::lock_guard lock(r.mutex);
  std::string s = "[";
  for (const auto& [key, entry] : r.entries) {
    if (selects(key))
      s += (s.size() > 1 ? ",\n" : "") + json_of(r, key, entry, machine_of(entry.device->arch), resident);
  }
  return s + "]\n";
}

std::string folder() {
  const char* const path = std::getenv("GPULESS_TIMELINE");
  return path ? path : "";
}

void write_timeline() {
  try {
    const std::string json = timeline_json([](const LaunchKey&) { return true; },
                                           [](const std::string& arch) {
                                             std::stringstream text;
                                             text << std::ifstream(folder() + "/" + arch + ".txt").rdbuf();
                                             return Machine(text.str());
                                           },
                                           0);
    std::ofstream(folder() + "/timeline.json") << json;
  } catch (...) {
    report_caught();
    std::fprintf(stderr, "gpuless: no timeline: %s\n", gpuless_finding());
  }
}
// From the load of the library on.
const bool written = !folder().empty() && !std::atexit(write_timeline);

}  // namespace

bool recorded(const Options& o) { return o.timeline || written; }

std::shared_ptr<LaunchTrace> begin_trace(const Launch& l) {
  Record& r = the_record();
  const std::lock_guard lock(r.mutex);
  const auto entry = r.entries.find(LaunchKey(l));
  return entry == r.entries.end() ? std::make_shared<LaunchTrace>(l) : nullptr;
}

void keep_trace(const Launch& l, const Sheet& all) {
  Record& r = the_record();
  const std::lock_guard lock(r.mutex);
  const LaunchKey key(l);
  Entry& e = r.entries[key];
  ++e.launches;
  e.programmatic += l.programmatic;
  if (l.programmatic && !e.before && r.last && r.last->name == key.name) e.before = r.last;
  r.last = key;
  if (e.trace || !l.trace) return;
  e.trace = l.trace;
  e.device = current_device();
  e.touched = all.footprint.touched();
  std::vector<std::pair<uint32_t, const Code*>> order;
  for (const auto& [code, first] : l.trace->codes()) order.emplace_back(first, code);
  std::sort(order.begin(), order.end());
  for (const auto& [first, code] : order) e.ops.add(*l.module, *code);
  for (CtaTrace* cta : e.trace->ctas()) {
    for (WarpTrace& w : cta->warps) {
      e.cut |= w.cut;
      e.ops.arrange(w.events);
    }
  }
}

}  // namespace gpuless

using namespace gpuless;

extern "C" {

const char* gpuless_timeline_json(uint64_t name, const char* kernel, const char* machine, int resident) {
  return guarded("", [&]() -> const char* {
    thread_local std::string json;
    const Machine rates(machine);
    json =
        timeline_json([&](const LaunchKey& k) { return k.name == name && k.kernel.find(kernel) != std::string::npos; },
                      [&](const std::string&) { return rates; }, static_cast<uint64_t>(resident));
    return json.c_str();
  });
}

void gpuless_timeline_forget(uint64_t name) {
  guarded([&] {
    Record& r = the_record();
    const std::lock_guard lock(r.mutex);
    for (auto e = r.entries.begin(); e != r.entries.end();)
      e = e->first.name == name ? r.entries.erase(e) : std::next(e);
  });
}

}  // extern "C"
