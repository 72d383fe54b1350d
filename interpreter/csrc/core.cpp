#include "core.h"

#include <cstdio>
#include <cstring>
#include <mutex>
#include <new>
#include <utility>

#include "device.h"
#include "explore/search.h"
#include "finding_log.h"
#include "global_shadow.h"
#include "ignore_rules.h"
#include "table.h"

namespace gpuless {
namespace {

using namespace cuda;

struct State {
  Options options;
  Memory memory;
  std::vector<std::vector<const void*>> scopes;
  std::atomic<uint64_t> launches{0};
  uint64_t seeded = 0;            // launches since the options were set
  uint64_t first_concurrent = 0;  // of the chain of programmatic launches that the last one belongs to
  Launch::Counters counters;
  Findings recorded;                     // until gpuless_findings_json
  std::vector<ExploredLaunch> explored;  // until gpuless_explored_json
  std::atomic<void (*)(const gpuless_finding_record*)> listener{nullptr};
  std::atomic<void (*)(const gpuless_launch_record*)> recorder{nullptr};
  std::atomic<Deadline::rep> allowance{Deadline::max().count()};  // what launches may still take together
  std::mutex mutex;
};
State& state() {
  static State s;
  return s;
}

Deadline now() { return std::chrono::duration_cast<Deadline>(std::chrono::steady_clock::now().time_since_epoch()); }

// For as long as a launch runs: gives it its deadline, and takes what it took from what launches may take together.
class TimeLimit {
 public:
  TimeLimit(std::atomic<Deadline::rep>& allowance, Deadline& deadline)
      : allowance_(allowance), limited_(allowance != Deadline::max().count()), begin_(now()) {
    if (limited_) deadline = begin_ + Deadline(allowance);
  }
  ~TimeLimit() {
    if (limited_) allowance_ -= (now() - begin_).count();
  }
  TimeLimit(const TimeLimit&) = delete;

 private:
  std::atomic<Deadline::rep>& allowance_;
  const bool limited_;
  const Deadline begin_;
};

thread_local std::string finding_text, finding_json, refusal;
thread_local int refusal_error = kSuccess;

void tell(const Finding& f, int error) {
  log_finding(f, f.count);
  const auto listener = state().listener.load();
  if (!listener) return;
  const std::string text = f.text(), summary = f.summary();
  const gpuless_finding_record record{
      text.c_str(), summary.c_str(), f.count, error, f.rule >= 0, f.breaks == Breaks::isa, f.kind == Kind::unsupported};
  listener(&record);
}

void keep(const Launch& l) {
  if (!l.options.explore) return;
  const std::lock_guard lock(state().mutex);
  const ExploredLaunch& e =
      state().explored.emplace_back(ExploredLaunch{l.explored, demangled(l.code->name), l.stream});
  log_explored(e.json());
  if (!e.complete) log_incomplete(e.text());
}

void keep(Findings&& findings) {
  for (const auto& [key, f] : findings) tell(f, kSuccess);
  const std::lock_guard lock(state().mutex);
  state().recorded.add(std::move(findings));
}

std::string three(const unsigned n[3]) {
  return "(" + std::to_string(n[0]) + ", " + std::to_string(n[1]) + ", " + std::to_string(n[2]) + ")";
}

// The launch's cluster: as configured, else as compiled in. A cudaError_t.
int set_cluster(const Device& device, const ptx::Function& source, const gpuless_launch_config& config, int largest,
                unsigned cluster[3]) {
  std::copy(config.cluster, config.cluster + 3, cluster);
  const auto size = [&] { return static_cast<uint64_t>(cluster[0]) * cluster[1] * cluster[2]; };
  if (source.cluster[0]) {
    if (size() == 1) std::copy(source.cluster, source.cluster + 3, cluster);
    if (!std::equal(cluster, cluster + 3, source.cluster))
      return refuse(kInvalidClusterSize, "a cluster of " + three(cluster) + " blocks, and the kernel is compiled for " +
                                             three(source.cluster));
  }
  const auto no = [&](const std::string& why) {
    return refuse(kInvalidClusterSize, "a cluster of " + three(cluster) + " blocks: " + why);
  };
  if (size() < 1 || size() > static_cast<uint64_t>(largest))
    return no("1 to " + std::to_string(largest) + " are allowed" +
              (largest < kLargestCluster ? ", more by cudaFuncAttributeNonPortableClusterSizeAllowed" : ""));
  if (size() > 1 && !device.clusters) return no(std::string(device.arch) + " has no clusters");
  if (source.max_cluster_rank && size() > source.max_cluster_rank)
    return no("the kernel is compiled for at most " + std::to_string(source.max_cluster_rank));
  for (int d = 0; d < 3; ++d)
    if (config.grid[d] % cluster[d]) return no("a grid of " + three(config.grid) + " is no multiple");
  return kSuccess;
}

}  // namespace

Memory& storage() { return state().memory; }

int refuse(int error, std::string why) {
  refusal_error = error;
  refusal = std::move(why);
  return error;
}

int report(const Finding& f) { return report(f, f.kind == Kind::assertion ? kAssert : kLaunchFailure); }

int report(const Finding& f, int error) {
  finding_text = f.text();
  finding_json = f.json();
  tell(f, error);
  return error;
}

int report_caught() noexcept {
  try {
    Finding f;
    f.kind = Kind::unsupported;
    try {
      throw;
    } catch (const Finding& finding) {
      return report(finding);
    } catch (const std::bad_alloc&) {
      f.message = "the interpreter has no memory left for this";
      return report(f, kMemoryAllocation);
    } catch (const std::exception& e) {
      f.message = std::string("the interpreter has failed: ") + e.what();
    } catch (...) {
      f.message = "the interpreter has failed";
    }
    return report(f, kUnknown);
  } catch (...) {  // no memory for the words either
    return kMemoryAllocation;
  }
}

namespace {

int launch(const Module& module, const Code& code, const gpuless_launch_config& config, std::vector<uint8_t> parameters,
           int largest_cluster) {
  const Device* device = current_device();
  if (!device) return kNoDevice;
  const uint64_t threads = static_cast<uint64_t>(config.block[0]) * config.block[1] * config.block[2];
  const auto& source = *code.source;
  const auto shape = [&] {
    return "a grid of " + three(config.grid) + " blocks of " + three(config.block) + " threads";
  };
  for (int d = 0; d < 3; ++d) {
    if (!config.grid[d] || config.grid[d] > (d ? 65535u : 0x7fffffffu))
      return refuse(kInvalidConfiguration, shape() + ": 1 to (2147483647, 65535, 65535) blocks are a grid");
    if (!config.block[d] || config.block[d] > (d == 2 ? 64u : 1024u))
      return refuse(kInvalidConfiguration, shape() + ": 1 to (1024, 1024, 64) threads are a block, and 1024 together");
    if (source.required_threads[0] && config.block[d] != std::max(1u, source.required_threads[d]))
      return refuse(kInvalidValue,
                    shape() + ", and the kernel is compiled for blocks of " + three(source.required_threads));
  }
  if (static_cast<uint64_t>(config.grid[0]) * config.grid[1] * config.grid[2] > UINT32_MAX) {
    Finding f;  // CTAs are numbered in 32 bits
    f.kind = Kind::unsupported;
    f.message = "a grid of more than " + std::to_string(UINT32_MAX) + " CTAs";
    throw f;
  }
  const uint64_t limit = source.max_threads[0]
                             ? static_cast<uint64_t>(source.max_threads[0]) * std::max(1u, source.max_threads[1]) *
                                   std::max(1u, source.max_threads[2])
                             : 1024;
  if (threads > 1024) return refuse(kInvalidConfiguration, shape() + ": 1024 threads are the most of a block");
  if (threads > limit)
    return refuse(kInvalidValue, shape() + ", and the kernel is compiled for at most " + std::to_string(limit) +
                                     " (__launch_bounds__)");
  if (config.dynamic_shared < 0 || code.shared_bytes + config.dynamic_shared > device->shared_per_block_optin)
    return refuse(kInvalidValue, shared_words(*device, code, config.dynamic_shared));
  if (static_cast<int64_t>(parameters.size()) < code.own_param_bytes)
    return refuse(kInvalidValue, std::to_string(parameters.size()) + " bytes of parameters, and the kernel takes " +
                                     std::to_string(code.own_param_bytes));
  Launch l;
  if (const int error = set_cluster(*device, source, config, largest_cluster, l.cluster)) return error;

  State& s = state();
  if (const auto recorder = s.recorder.load()) {
    const gpuless_launch_record record{module.text.c_str(), code.name.c_str(), config, parameters.data(),
                                       static_cast<int64_t>(parameters.size())};
    recorder(&record);
  }
  {
    const std::lock_guard lock(s.mutex);
    l.options = s.options;
    l.number = ++s.launches;
    l.stream = ++s.seeded;
    if (!config.programmatic) s.first_concurrent = l.number;
    l.first_concurrent = config.programmatic && l.number > 1 ? std::min(s.first_concurrent, l.number - 1) : l.number;
  }
  l.module = &module;
  l.code = &code;
  l.arch = device->arch;
  std::copy(config.grid, config.grid + 3, l.grid);
  std::copy(config.block, config.block + 3, l.block);
  l.dynamic_shared = config.dynamic_shared;
  l.parameters = std::move(parameters);
  l.programmatic = config.programmatic;
  l.memory = &s.memory;
  if (l.options.largest > 0)
    l.growth = static_cast<double>(l.options.largest) / static_cast<double>(std::max<uint64_t>(1, s.memory.largest()));
  l.counters = &s.counters;
  const int blocks =
      std::max(1, resident_blocks(*device, code, static_cast<int>(threads), code.shared_bytes + l.dynamic_shared));
  const int size = static_cast<int>(l.cluster_size());
  l.resident = size == 1 ? blocks * device->multiprocessors : resident_clusters(*device, blocks, size);
  if (!l.resident)
    return refuse(kLaunchOutOfResources, "a cluster of " + three(l.cluster) + " blocks of " + std::to_string(threads) +
                                             " threads with " + std::to_string(code.shared_bytes + l.dynamic_shared) +
                                             " bytes of shared memory each: no GPC of " + device->arch +
                                             " has room for one");
  bool in_time = false;
  try {
    const TimeLimit limit(s.allowance, l.deadline);
    in_time = l.run();
    if (!in_time) log_incomplete("a launch of " + demangled(code.name) + " ran out of time");
  } catch (...) {
    keep(l);
    keep(std::move(l.findings));
    throw;
  }
  keep(l);
  keep(std::move(l.findings));
  return in_time ? kSuccess : kLaunchTimeout;
}

// Once, after a launch that came through: its functions hold instructions that would have ended it.
void warn_of_refused(Module& module) {
  const std::lock_guard lock(module.mutex);
  for (auto& [name, code] : module.functions) {
    if (code.refused.empty()) continue;
    const Statement& first = *code.statements[code.refused[0]];
    const auto& why = *static_cast<const std::string*>(code.instructions[code.refused[0]].data);
    std::fprintf(
        stderr,
        "gpuless: warning: %s has instructions that the interpreter refuses, and would end there; none has run. "
        "%zu in all, the first in PTX line %d, %s: %s\n",
        demangled(name).c_str(), code.refused.size(), first.line, first.opcode.c_str(), why.c_str());
    code.refused.clear();
  }
}

}  // namespace

int launch(Module& module, const std::string& kernel, const gpuless_launch_config& config,
           const ArgumentBytes& arguments, int largest_cluster) {
  try {
    const Code* const code = function(module, kernel);
    if (!code || !code->source->entry) return kInvalidValue;
    const int error = launch(module, *code, config, arguments(*code), largest_cluster);
    if (!error) warn_of_refused(module);
    return error;
  } catch (Finding& f) {
    if (f.mangled.empty()) f.mangled = kernel;
    f.kernel = demangled(f.mangled);
    if (const Device* device = current_device()) f.arch = device->arch;
    FindingPolicy policy;
    {
      const std::lock_guard lock(state().mutex);
      policy = state().options.policy;
    }
    if (!policy.accepts(f)) throw;
    Findings one;
    one.add(std::move(f));
    keep(std::move(one));
    return kSuccess;
  }
}

}  // namespace gpuless

using namespace gpuless;

extern "C" {

const char* gpuless_version(void) { return GPULESS_VERSION; }

void gpuless_set_options(const gpuless_options* o) {
  guarded([&] {
    const std::lock_guard lock(state().mutex);
    Options& options = state().options;
    state().seeded = 0;
    options.seed = o->seed;
    options.checks = o->checks != 0;
    options.truncating = o->truncating != 0;
    options.approximate = o->approximate != 0;
    options.threads = o->threads;
    options.counters = o->counters;
    options.timeline = o->timeline != 0;
    options.sample = o->sample;
    options.step_limit = o->step_limit ? o->step_limit : Options().step_limit;
    options.largest = o->largest;
    options.policy.collect = o->findings == gpuless_findings_collect;
    options.policy.isa = static_cast<FindingPolicy::Isa>(o->isa);
  });
}

void gpuless_get_options(gpuless_options* o) {
  guarded([&] {
    const std::lock_guard lock(state().mutex);
    const Options& options = state().options;
    *o = {options.seed,
          options.checks,
          options.truncating,
          options.approximate,
          options.threads,
          options.step_limit,
          options.counters,
          options.timeline,
          options.sample,
          options.policy.collect,
          static_cast<int32_t>(options.policy.isa),
          options.largest};
  });
}

const char* gpuless_wrong_schedule(const char* schedule) {
  return guarded<const char*>("no memory", [&] { return wrong_schedule(schedule); });
}

void gpuless_explore(uint64_t orders, const char* schedule) {
  guarded([&] {
    const std::lock_guard lock(state().mutex);
    state().options.explore = orders;
    state().options.schedule = schedule;
  });
}

const char* gpuless_explored_text() {
  return guarded("", [&]() -> const char* {
    thread_local std::string text;
    text.clear();
    const std::lock_guard lock(state().mutex);
    for (const ExploredLaunch& e : std::exchange(state().explored, {})) text += e.text() + "\n";
    return text.c_str();
  });
}

const char* gpuless_explored_json() {
  return guarded("[]", [&]() -> const char* {
    thread_local std::string json;
    const std::lock_guard lock(state().mutex);
    json = "[";
    for (const ExploredLaunch& e : std::exchange(state().explored, {})) json += (json.size() > 1 ? "," : "") + e.json();
    json += "]";
    return json.c_str();
  });
}

const char* gpuless_ignore(const char* text) {
  thread_local std::string complaint;
  try {
    auto rules = std::make_shared<const IgnoreRules>(text);
    const std::lock_guard lock(state().mutex);
    state().options.policy.rules = std::move(rules);
    return nullptr;
  } catch (const std::exception& e) {
    complaint = e.what();
    return complaint.c_str();
  }
}

void gpuless_set_time_limit(double seconds) {
  const auto limit = std::chrono::duration_cast<Deadline>(std::chrono::duration<double>(seconds));
  state().allowance = (seconds > 0 ? limit : Deadline::max()).count();
}

void gpuless_storage_enter() {
  guarded([&] {
    const std::lock_guard lock(state().mutex);
    state().scopes.emplace_back();
  });
}

void gpuless_storage_add(const void* begin, int64_t bytes, const char* name, int read_only) {
  guarded([&] {
    const std::lock_guard lock(state().mutex);
    state().memory.add(begin, bytes, name, read_only != 0);
    if (!state().scopes.empty()) state().scopes.back().push_back(begin);
  });
}

void gpuless_storage_remove(const void* begin) {
  guarded([&] {
    const std::lock_guard lock(state().mutex);
    const int64_t bytes = state().memory.remove(begin);
    global_shadow().forget(reinterpret_cast<uint64_t>(begin), static_cast<uint64_t>(bytes));
  });
}

int gpuless_storage_find(const void* begin, int64_t bytes) {
  return guarded(0, [&]() -> int {
    Memory::Region region;
    return state().memory.find(reinterpret_cast<uint64_t>(begin), static_cast<uint64_t>(bytes), &region);
  });
}

int gpuless_storage_region(const void* address, void** begin, int64_t* bytes) {
  return guarded(0, [&]() -> int {
    Memory::Region region;
    if (!state().memory.find(reinterpret_cast<uint64_t>(address), 1, &region)) return 0;
    *begin = reinterpret_cast<void*>(region.begin);
    *bytes = static_cast<int64_t>(region.end - region.begin);
    return 1;
  });
}

void gpuless_storage_leave() {
  guarded([&] {
    const std::lock_guard lock(state().mutex);
    if (state().scopes.empty()) return;
    for (const void* begin : state().scopes.back()) state().memory.remove(begin);
    state().scopes.pop_back();
  });
}

void* gpuless_module_load(const char* ptx) {
  return guarded(static_cast<void*>(nullptr), [&]() -> void* { return load(ptx).release(); });
}

void gpuless_module_unload(void* module) {
  guarded([&] { delete static_cast<Module*>(module); });
}

const char* gpuless_module_json(void* handle) {
  return guarded("", [&]() -> const char* {
    thread_local std::string json;
    const auto& m = *static_cast<Module*>(handle);
    const Device* device = current_device();
    json = "{\"arch\":\"" + m.arch + "\",\"entries\":[";
    bool first = true;
    for (const auto& f : m.source.functions) {
      if (!f.entry) continue;
      json += std::string(first ? "" : ",") + "{\"name\":\"" + f.name +
              "\",\"shared_bytes\":" + std::to_string(m.functions.at(f.name).shared_bytes) +
              ",\"registers\":" + std::to_string(device ? assumed_registers(*device, f) : 0) + ",\"parameters\":[";
      first = false;
      int64_t end = 0;
      for (size_t k = 0; k < f.parameters.size(); ++k) {
        const auto& p = f.parameters[k];
        const int64_t a = std::max(p.alignment, 1), offset = (end + a - 1) / a * a;
        end = offset + p.bytes;
        json += (k ? ",{\"offset\":" : "{\"offset\":") + std::to_string(offset) +
                ",\"size\":" + std::to_string(p.bytes) + "}";
      }
      json += "]}";
    }
    json += "]}";
    return json.c_str();
  });
}

int gpuless_module_launch(void* handle, const char* kernel, const unsigned grid[3], const unsigned block[3],
                          const unsigned cluster[3], int64_t dynamic_shared, const void* parameters,
                          int64_t parameter_bytes, int programmatic) {
  return guarded([&]() -> int {
    auto& m = *static_cast<Module*>(handle);
    std::string name = kernel ? kernel : "";
    if (!kernel) {
      for (const auto& f : m.source.functions)
        if (f.entry) name = name.empty() ? f.name : "";
    }
    gpuless_launch_config c{};
    std::copy(grid, grid + 3, c.grid);
    std::copy(block, block + 3, c.block);
    std::copy(cluster, cluster + 3, c.cluster);
    c.dynamic_shared = dynamic_shared;
    c.programmatic = programmatic;
    const auto* bytes = static_cast<const uint8_t*>(parameters);
    const auto arguments = [&](const Code&) { return std::vector<uint8_t>(bytes, bytes + parameter_bytes); };
    return launch(m, name, c, arguments, kLargestCluster);
  });
}

void gpuless_refuse(int error, const char* why) {
  guarded([&] { refuse(error, why); });
}
const char* gpuless_take_refusal(int error) {
  return guarded<const char*>("", [&] {
    thread_local std::string words;
    words = std::exchange(refusal_error, kSuccess) == error ? refusal : std::string();
    return words.c_str();
  });
}
const char* gpuless_finding() { return finding_text.c_str(); }
const char* gpuless_finding_json() { return finding_json.c_str(); }
void gpuless_finding_clear() {
  finding_text.clear();
  finding_json.clear();
}

void gpuless_on_launch(void (*recorder)(const gpuless_launch_record*)) { state().recorder = recorder; }

void gpuless_on_finding(void (*listener)(const gpuless_finding_record*)) { state().listener = listener; }

const char* gpuless_findings_json() {
  return guarded("[]", [&]() -> const char* {
    thread_local std::string json;
    Findings recorded;
    {
      const std::lock_guard lock(state().mutex);
      std::swap(recorded, state().recorded);
    }
    json = "[";
    for (const auto& [key, f] : recorded) json += (json.size() > 1 ? "," : "") + f.json();
    json += "]";
    return json.c_str();
  });
}

void gpuless_counters_read(gpuless_counters* c) {
  const auto& k = state().counters;
  *c = {k.launches, k.warp_instructions, k.matrix_ns, k.matrix_macs};
}

void gpuless_counters_reset() {
  auto& k = state().counters;
  k.launches = k.warp_instructions = k.matrix_ns = k.matrix_macs = 0;
}

const char* gpuless_rows_json() {
  return guarded("", [&]() -> const char* {
    static const std::string json = [] {
      std::string s = "[";
      for (const Row* r : all_rows()) {
        s += std::string(s.size() > 1 ? "," : "") + "{\"pattern\":\"" + r->pattern + "\",\"section\":\"" + r->section +
             "\"}";
      }
      return s + "]";
    }();
    return json.c_str();
  });
}

}  // extern "C"
