// What a program has and a library in Python has not (_standin.a alone): the environment says which GPU there is and
// what becomes of findings. One is printed when it is made, all are summed up at exit, and the program then exits
// non-zero, whatever it makes of the error itself.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <iomanip>
#include <map>
#include <mutex>
#include <sstream>
#include <string>

#include "standin.h"

namespace {

// Of the program: something was found; nothing was, but something was not done (a refusal, a limit).
constexpr int kFoundSomething = 3, kIncomplete = 4;

// By summary, as a program launches a kernel many times.
struct Entry {
  uint64_t count = 0;
  bool ignored = false, isa = false, left = false, refused = false;  // left: the program has failed
};
std::map<std::string, Entry>& entries() {
  static auto* const all = new std::map<std::string, Entry>;  // outlives every destructor
  return *all;
}
std::mutex mutex;
bool isa_counts = false;

void note(const gpuless_finding_record* f) {
  const std::lock_guard lock(mutex);
  const bool asserted = f->error == cudaErrorAssert;  // a failed assertion is the program's own finding
  const bool refused = f->refused && !f->ignored;
  const bool left = !asserted && !refused && !f->ignored && (!f->isa || isa_counts);
  const auto [entry, is_new] = entries().try_emplace(f->summary, Entry{0, f->ignored != 0, f->isa != 0, left, refused});
  entry->second.count += f->count;
  if (!is_new || f->ignored) return;
  std::fflush(stdout);
  std::fprintf(stderr, "%s\n", f->text);
}

void leave(int status, void*) {
  const std::lock_guard lock(mutex);
  size_t left = 0, ignored = 0, refused = static_cast<size_t>(gpuless_times_incomplete());
  for (const auto& [summary, e] : entries()) {
    left += e.left;
    ignored += e.ignored;
    refused += e.refused;
  }
  if (entries().size() > 1 || ignored) {
    std::fflush(stdout);
    std::fprintf(stderr, "gpuless: %zu findings, %zu of them ignored\n", entries().size(), ignored);
    for (const auto& [summary, e] : entries()) {
      std::fprintf(stderr, "  %s%s, %llu times\n", summary.c_str(),
                   e.ignored ? " (ignored)"
                   : e.isa   ? " (isa)"
                             : "",
                   static_cast<unsigned long long>(e.count));
    }
  }
  std::fprintf(stderr, "%s", gpuless_explored_text());
  // glibc takes the status of an exit() within a handler, and goes on with the handlers that are left: those of the
  // library write its files.
  if (left) std::exit(kFoundSomething);
  if (refused && !status) std::exit(kIncomplete);
}

[[noreturn]] void refuse(const std::string& why) {
  std::fprintf(stderr, "gpuless: %s\n", why.c_str());
  _exit(2);
}

// The environment's choice of some words; the first is the default.
int choice(const char* name, std::initializer_list<const char*> words) {
  const char* const text = std::getenv(name);
  if (!text || !*text) return 0;
  std::string all;
  int k = 0;
  for (const char* const word : words) {
    if (!std::strcmp(text, word)) return k;
    all += (k++ ? " or " : "") + std::string(word);
  }
  refuse(std::string(name) + " is " + all + ", not " + text);
}

// "32GB", "34359738368", or 0.
int64_t bytes_of(const char* name) {
  const char* const text = std::getenv(name);
  if (!text || !*text) return 0;
  std::istringstream words(text);
  int64_t n = -1;
  std::string unit;
  words >> n >> unit;
  const size_t power = unit.empty() || unit == "B" ? 0 : std::string("KMGT").find(unit[0]) + 1;
  const bool good = words.eof() && n >= 0 && power <= 4 && (unit.size() < 2 || unit.substr(1) == "B");
  if (!good || n > INT64_MAX >> 10 * power)
    refuse(std::string(name) + " is a number of bytes, such as 34359738368 or 32GB, not " + text);
  return n << 10 * power;
}

void ignore(const char* path) {
  std::ifstream file(path);
  std::stringstream rules;
  rules << file.rdbuf();
  if (!file) refuse(std::string("GPULESS_IGNORE: cannot read ") + path);
  if (const char* why = gpuless_ignore(rules.str().c_str())) refuse(std::string(path) + ": " + why);
}

void explore(const char* text, const char* schedule) {
  uint64_t orders = 0;
  if (!(std::istringstream(text) >> orders)) refuse(std::string("GPULESS_EXPLORE is a number of orders, not ") + text);
  if (const char* why = gpuless_wrong_schedule(schedule)) refuse(std::string("GPULESS_SCHEDULE: ") + why);
  gpuless_explore(orders, schedule);
}

// Before the constructors of the program, so that `leave` comes after its destructors.
__attribute__((constructor(101))) void begin() {
  const char* arch = std::getenv("GPULESS_ARCH");
  if (!arch || gpuless_set_device(arch)) {
    std::fprintf(stderr,
                 "This program runs on gpuless, an interpreted GPU: GPULESS_ARCH has to be sm_80 (A100), "
                 "sm_89 (L40S), sm_90a (H100), sm_100a (B200) or sm_120 (RTX PRO 6000), and is %s\n",
                 arch ? arch : "not set");
    _exit(2);
  }
  gpuless_options options;
  gpuless_get_options(&options);
  if (const char* seed = std::getenv("GPULESS_SEED"))  // not strtoull: it binds programs to glibc 2.38
    std::istringstream(seed) >> std::setbase(0) >> options.seed;
  options.largest = bytes_of("GPULESS_LARGEST");
  options.findings = choice("GPULESS_FINDINGS", {"raise", "collect"});
  isa_counts = choice("GPULESS_STRICT", {"0", "1"});
  options.isa = isa_counts ? gpuless_isa_raise : gpuless_isa_report;
  gpuless_set_options(&options);
  if (const char* path = std::getenv("GPULESS_IGNORE"); path && *path) ignore(path);
  if (const char* limit = std::getenv("GPULESS_TIME_LIMIT"); limit && *limit) {
    char* end;
    const double seconds = std::strtod(limit, &end);
    if (*end || !(seconds > 0)) refuse(std::string("GPULESS_TIME_LIMIT is a number of seconds, not ") + limit);
    gpuless_set_time_limit(seconds);
  }
  const char *const orders = std::getenv("GPULESS_EXPLORE"), *const schedule = std::getenv("GPULESS_SCHEDULE");
  explore(orders ? orders : "0", schedule ? schedule : "");
  gpuless_on_finding(note);
  gpuless::standin::errors_stick = true;
  on_exit(leave, nullptr);
}

}  // namespace
