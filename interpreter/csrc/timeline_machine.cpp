// What the replay is told of the machine.
#include <sstream>

#include "finding.h"
#include "timeline_state.h"

namespace gpuless {

Machine::Machine(const std::string& text) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const size_t tab = line.find('\t');
    if (tab != std::string::npos) values_[line.substr(0, tab)] = std::stod(line.substr(tab + 1));
  }
}

double Machine::operator[](const std::string& name) const {
  const auto entry = values_.find(name);
  if (entry != values_.end()) return entry->second;
  Finding f;
  f.kind = Kind::unsupported;
  f.message = "the timeline needs the machine's \"" + name + "\", and it was not among the rates that it was told";
  throw f;
}

namespace timeline {

Constants::Constants(const Machine& m, const Ops& ops, const ReplayInput& in) {
  for (int p = 0; p < kPipes; ++p) {
    interval[p] = std::max(1.0, 32 * kSchedulers / m[kPipeNames[p]]);
    latency[p] = m[std::string(kPipeNames[p]) + " latency"];
  }
  for (const std::string& type : ops.matrix_types) {
    const bool wgmma = type.rfind("wgmma ", 0) == 0;
    const double rate = m["mma " + type.substr(type.find(' ') + 1)] * (wgmma ? 1 : m["mma share"]);
    matrix_rate.push_back(rate / kSchedulers);
  }
  mma_latency = m["mma latency"];
  mma_intervals = m["mma latency, intervals"];
  wgmma_latency = m["wgmma latency"];
  shared_rate = m["shared memory"];
  shared_latency = m["shared latency"];
  l1_latency = m["L1 latency"];
  l2_latency = m["L2 latency"];
  dram_latency = m["DRAM latency"];
  const auto together = static_cast<double>(in.cluster_size);
  inward_rate = m["L2 of a multiprocessor"];
  l2_rate = std::min(inward_rate, m["L2"] / in.active) * together;
  dram_rate = std::min(inward_rate, m["DRAM"] * 1e3 / m["clock"] * m["DRAM efficiency"] / in.active) * together;
  memory_queue = m["memory queue"];
  bulk_latency = m["TMA latency"];
  bulk_interval = m["TMA interval"];
  signal_latency = m["mbarrier latency"];
  barrier_latency = m["barrier latency"];
  cluster_latency = m["cluster latency"];
  cluster_rate = m["shared memory of a cluster"];
  fence_latency = m["fence latency"];
  branch_latency = m["branch latency"];
  block_latency = m["block latency"];
}
}  // namespace timeline
}  // namespace gpuless
