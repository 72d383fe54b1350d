// A grid on several threads: CTAs begin in order, a CTA that does not end in its turn shares its thread with the next.
#include <deque>
#include <optional>
#include <thread>

#include "formats.h"
#include "global_shadow.h"
#include "machine.h"
#include "matrix.h"

namespace forwardpass::interpreter {
namespace {

// A CTA that needs more than this may be waiting for another one: the next is begun beside it.
constexpr uint64_t kTurnOfCta = 1 << 22;

struct Grid {
  explicit Grid(Launch& l) : launch(l), total(l.grid_size()) {}
  Launch& launch;
  uint64_t total;
  std::atomic<uint64_t> next{0};
  std::atomic<int> resident{0};
  std::mutex mutex;
  const bool counts = counted(launch.options);
  Sheet sheet;
  std::optional<Finding> finding;  // of the lowest CTA that has one
  std::atomic<uint64_t> found_at{~uint64_t{0}};

  void report(uint64_t cta, Finding f) {
    const std::lock_guard lock(mutex);
    if (cta < found_at) {
      found_at = cta;
      finding = std::move(f);
    }
  }
};

struct Resident {
  std::unique_ptr<Cta> cta;
  uint64_t number;
};

uint64_t steps(const Cta& cta) {
  uint64_t n = 0;
  for (const Warp& w : cta.warps) n += w.steps;
  return n;
}

// One turn of a CTA. True: it is over, one way or another.
bool turn(Grid& grid, Resident& r) {
  Cta& cta = *r.cta;
  try {
    if (!cta.run(std::min(kTurnOfCta, grid.launch.options.step_limit))) {
      if (steps(cta) < grid.launch.options.step_limit) return false;
      cta.warps[0].fail(Kind::deadlock,
                        "the CTA has not ended after " + std::to_string(steps(cta)) +
                            " warp instructions; a loop waits for what never comes, or the limit is low");
    }
  } catch (Finding& f) {
    if (!f.ptx_line) {
      for (const Warp& w : cta.warps) {
        const bool at = cta.running() ? &w == cta.running() : w.live != 0;
        if (!at || w.strands.empty()) continue;
        cta.place(f, w);
        break;
      }
    }
    f.kernel = grid.launch.code->name;
    std::copy(cta.index, cta.index + 3, f.block);
    f.seed = grid.launch.options.seed;
    grid.report(r.number, std::move(f));
  }
  if (auto* counters = grid.launch.counters) {
    counters->warp_instructions += steps(cta);
    counters->matrix_ns += nanoseconds(cta.matrix_ticks);
    counters->matrix_macs += cta.matrix_macs;
  }
  return true;
}

void work(Grid& grid) {
  const PlainFloats plain;
  std::deque<Resident> mine;
  std::vector<std::unique_ptr<Cta>> spare;  // their shared memory and shadow serve again
  const Launch& l = grid.launch;
  Sheet sheet;
  for (bool more = true; more || !mine.empty();) {
    if (more && grid.resident < l.resident) {
      ++grid.resident;
      const uint64_t n = grid.next++;
      more = n < grid.total && n < grid.found_at;
      if (more) {
        auto cta = spare.empty() ? std::make_unique<Cta>() : std::move(spare.back());
        if (!spare.empty()) spare.pop_back();
        const uint64_t x = l.grid[0], y = l.grid[1];
        const unsigned index[3] = {static_cast<unsigned>(n % x), static_cast<unsigned>(n / x % y),
                                   static_cast<unsigned>(n / x / y)};
        cta->sheet = grid.counts ? &sheet : nullptr;
        cta->begin(grid.launch, index, n);
        mine.push_back({std::move(cta), n});
      } else {
        --grid.resident;
      }
    }
    if (mine.empty()) {
      if (more) std::this_thread::yield();
      continue;
    }
    Resident r = std::move(mine.front());
    mine.pop_front();
    const bool hopeless = r.number > grid.found_at;
    if (hopeless || turn(grid, r)) {
      --grid.resident;
      spare.push_back(std::move(r.cta));
    } else {
      mine.push_back(std::move(r));
    }
  }
  if (!grid.counts) return;
  const std::lock_guard lock(grid.mutex);
  grid.sheet.add(sheet);
}

}  // namespace

void Launch::run() {
  const GlobalShadow::Recording recording(global_shadow(), *this);
  Grid grid(*this);
  const unsigned hardware = std::max(1u, std::thread::hardware_concurrency());
  const uint64_t wanted = std::min<uint64_t>(options.threads > 0 ? options.threads : hardware, grid.total);
  std::vector<std::thread> others;
  for (uint64_t k = 1; k < wanted; ++k) others.emplace_back([&] { work(grid); });
  work(grid);
  for (auto& t : others) t.join();
  if (counters) ++counters->launches;
  if (grid.counts) record(*this, grid.sheet);
  if (grid.finding) throw *grid.finding;
}

}  // namespace forwardpass::interpreter
