#include "finding_log.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <mutex>
#include <set>
#include <vector>

#include "core.h"

namespace gpuless {
namespace {

std::atomic<int> incomplete{0};

class Log {
 public:
  explicit Log(const char* path) : file_(open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666)) {}

  void add(const Finding& f, uint64_t times) {
    const std::lock_guard lock(mutex_);
    const auto [place, is_new] = numbers_.try_emplace(Findings::key_of(f), counts_.size());
    if (is_new) {
      counts_.push_back(0);
      const std::string json = f.json();
      write("finding", json.substr(1));
    }
    counts_[place->second] += times;
  }
  void add_incomplete(const std::string& why) {
    const std::lock_guard lock(mutex_);
    if (reasons_.insert(why).second) write("incomplete", "\"why\":" + quoted(why) + "}");
  }
  void add_explored(const std::string& json) {
    const std::lock_guard lock(mutex_);
    write("explored", json.substr(1));
  }
  void end() {
    const std::lock_guard lock(mutex_);
    gpuless_counters c;
    gpuless_counters_read(&c);
    std::string counts;
    for (const uint64_t n : counts_) counts += (counts.empty() ? "" : ",") + std::to_string(n);
    write("end", "\"launches\":" + std::to_string(c.launches) +
                     ",\"warp_instructions\":" + std::to_string(c.warp_instructions) + ",\"counts\":[" + counts + "]}");
  }

 private:
  void write(const char* event, const std::string& fields) {
    const std::string line =
        std::string("{\"event\":\"") + event + "\",\"pid\":" + std::to_string(getpid()) + "," + fields + "\n";
    if (file_ < 0 || ::write(file_, line.data(), line.size()) != static_cast<ssize_t>(line.size())) ++incomplete;
  }
  const int file_;
  std::mutex mutex_;
  std::map<Findings::Key, size_t> numbers_;  // of findings, in the order in which they came
  std::vector<uint64_t> counts_;
  std::set<std::string> reasons_;
};

// From the load of the library on, so that a program which launches nothing has its line at the end.
Log* const the_log = [] {
  const char* const path = std::getenv("GPULESS_LOG");
  Log* const log = path && *path ? new Log(path) : nullptr;  // outlives every destructor
  if (log) std::atexit([] { the_log->end(); });
  return log;
}();

}  // namespace

void log_finding(const Finding& f, uint64_t times) {
  if (the_log) the_log->add(f, times);
}

void log_incomplete(const std::string& why) {
  ++incomplete;
  if (the_log) the_log->add_incomplete(why);
}

void log_explored(const std::string& json) {
  if (the_log) the_log->add_explored(json);
}

int times_incomplete() { return incomplete; }

}  // namespace gpuless

extern "C" {

void gpuless_log_incomplete(const char* why) {
  gpuless::guarded([&] { gpuless::log_incomplete(why); });
}
int gpuless_times_incomplete(void) { return gpuless::times_incomplete(); }

}  // extern "C"
