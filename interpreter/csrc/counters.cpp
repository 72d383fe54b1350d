#include "counters.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <mutex>

#include "core.h"
#include "device.h"
#include "instruction_class.h"
#include "machine.h"
#include "table.h"
#include "timeline_trace.h"

namespace gpuless {

// ---- Counting ----

namespace {
uint64_t scaled(uint64_t n, double times) {
  return times == 1 ? n : static_cast<uint64_t>(static_cast<double>(n) * times);
}
}  // namespace

void Count::add(const Count& other, double times) {
#define GPULESS_ADD(name) name += scaled(other.name, times);
  GPULESS_COUNTS(GPULESS_ADD)
#undef GPULESS_ADD
}

void Footprint::touch(uint64_t sector, bool read, bool write) {
  const uint64_t page = sector / kSectorsOfPage, bit = uint64_t{1} << sector % kSectorsOfPage;
  if (page != last_) {
    last_page_ = &pages_[page];  // stays where it is as the map grows
    last_ = page;
  }
  touched_ += !((last_page_->read | last_page_->written) & bit);
  if (read) last_page_->read |= bit;
  if (write) last_page_->written |= bit;
}

void Footprint::add(const Footprint& other) {
  for (const auto& [n, page] : other.pages_) {
    Page& known = pages_[n];
    touched_ += static_cast<uint64_t>(__builtin_popcountll((page.read | page.written) & ~(known.read | known.written)));
    known.read |= page.read;
    known.written |= page.written;
  }
}

uint64_t Footprint::sectors(bool written) const {
  uint64_t n = 0;
  for (const auto& [number, page] : pages_) {
    n += static_cast<uint64_t>(__builtin_popcountll(written ? page.written : page.read));
  }
  return n;
}

void Sheet::choose(const Code& code) {
  auto& rows = counts[&code];
  rows.resize(code.instructions.size());
  counts_ = rows.data();
  code_ = &code;
}

void Sheet::add(const Sheet& other) {
  for (const auto& [code, other_rows] : other.counts) {
    auto& rows = counts[code];
    rows.resize(other_rows.size());
    for (size_t k = 0; k < other_rows.size(); ++k) rows[k].add(other_rows[k]);
  }
  footprint.add(other.footprint);
}

void count_global(Warp& w, const uint64_t address[kLanes], uint64_t bytes, Use use, Mask mask) {
  // An access is aligned to its size, which divides a sector's: it lies within one.
  uint64_t sectors[kLanes];
  int n = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const uint64_t sector = address[__builtin_ctz(rest)] / kSectorBytes;
    if (!n || sectors[n - 1] != sector) sectors[n++] = sector;
  }
  std::sort(sectors, sectors + n);
  n = static_cast<int>(std::unique(sectors, sectors + n) - sectors);
  Count& c = *w.count;
  c.requests += n != 0;
  c.sectors += static_cast<uint64_t>(n);
  if (is_read(use)) c.global_read += bytes;
  if (is_write(use)) c.global_written += bytes;
  for (int k = 0; k < n; ++k) w.cta->sheet->footprint.touch(sectors[k], is_read(use), is_write(use));
}

Wavefronts wavefronts_of(const uint64_t address[kLanes], int bytes, Mask mask) {
  constexpr uint64_t kBanks = 32, kWord = 4;
  const int words = std::max(1, bytes / static_cast<int>(kWord)), lanes = kLanes / words;  // of a lane; of a phase
  Wavefronts wavefronts;
  for (int first = 0; first < kLanes; first += lanes) {
    uint64_t word_numbers[kLanes];
    int n = 0;
    for (int l = first; l < first + lanes; ++l)
      for (int k = 0; k < words && (mask >> l & 1); ++k)
        word_numbers[n++] = address[l] / kWord + static_cast<uint64_t>(k);
    if (!n) continue;
    std::sort(word_numbers, word_numbers + n);
    n = static_cast<int>(std::unique(word_numbers, word_numbers + n) - word_numbers);
    uint64_t of_bank[kBanks] = {}, busiest = 0;
    for (int k = 0; k < n; ++k) busiest = std::max(busiest, ++of_bank[word_numbers[k] % kBanks]);
    wavefronts.actual += busiest;
    ++wavefronts.ideal;
  }
  return wavefronts;
}

void count_shared(Warp& w, const uint64_t address[kLanes], int bytes, Use use, Mask mask) {
  Count& c = *w.count;
  const uint64_t all = static_cast<uint64_t>(__builtin_popcount(mask)) * static_cast<uint64_t>(bytes);
  if (is_read(use)) c.shared_read += all;
  if (is_write(use)) c.shared_written += all;
  if (use == Use::atomic) return;
  const Wavefronts wavefronts = wavefronts_of(address, bytes, mask);
  c.wavefronts += wavefronts.actual;
  c.ideal_wavefronts += wavefronts.ideal;
}

void count_access(Warp& w, ptx::Space space, const uint64_t address[kLanes], int bytes, Use use, Mask mask) {
  const uint64_t all = static_cast<uint64_t>(__builtin_popcount(mask)) * static_cast<uint64_t>(bytes);
  if (space == ptx::Space::global) return count_global(w, address, all, use, mask);
  if (space == ptx::Space::shared || space == ptx::Space::shared_cluster)
    return count_shared(w, address, bytes, use, mask);
  if (space != ptx::Space::local) return;  // parameters and constants have a cache of their own
  if (is_read(use)) w.count->local_read += all;
  if (is_write(use)) w.count->local_written += all;
}

void count_bulk(Warp& w, uint64_t address, uint64_t bytes, bool load) {
  (load ? w.count->bulk_read : w.count->bulk_written) += bytes;
  if (!bytes) return;
  for (uint64_t s = address / kSectorBytes; s <= (address + bytes - 1) / kSectorBytes; ++s) {
    w.cta->sheet->footprint.touch(s, load, !load);
  }
}

// ---- The record ----

namespace {

struct Entry {
  uint64_t launches = 0, sectors_read = 0, sectors_written = 0;
  const Device* device = nullptr;
  int resident = 0;  // CTAs of a multiprocessor
  struct Function {
    std::vector<Line> lines;
    std::vector<Count> counts;
  };
  std::map<std::string, Function> functions;
};

struct Record {
  std::mutex mutex;
  std::map<LaunchKey, Entry> entries;
};
Record& the_record() {
  static Record* const r = new Record;  // never destroyed: write_report reads it at exit
  return *r;
}

}  // namespace

std::vector<Line> describe(const Module& m, const Code& code) {
  std::vector<Line> lines;
  std::vector<std::string_view> slots;
  for (const Statement* s : code.statements) {
    const ptx::Location &outer = m.source.outermost(s->location), &inner = m.source.locations[s->location];
    const Row* const row = find_row(s->opcode, slots);  // null: it is refused where it runs
    lines.push_back({s->opcode, m.source.files[outer.file], m.source.files[inner.file], outer.line, inner.line, s->line,
                     s->guard >= 0, row ? class_of(row->section, s->opcode) : "other", matrix_work(*s)});
  }
  return lines;
}

std::string Line::json() const {
  return "\"opcode\":" + quoted(opcode) + ",\"class\":" + quoted(name) + ",\"file\":" + quoted(file) +
         ",\"line\":" + std::to_string(line) + ",\"inner_file\":" + quoted(inner_file) +
         ",\"inner_line\":" + std::to_string(inner_line) + ",\"ptx_line\":" + std::to_string(ptx_line);
}

LaunchKey::LaunchKey(const Launch& l)
    : name(l.options.counters),
      module(l.module->serial),
      kernel(l.code->name),
      shared_bytes(l.code->shared_bytes + l.dynamic_shared) {
  std::copy(l.grid, l.grid + 3, shape.begin());
  std::copy(l.block, l.block + 3, shape.begin() + 3);
  std::copy(l.cluster, l.cluster + 3, shape.begin() + 6);
}

std::string LaunchKey::json() const {
  const auto three = [&](size_t first) {
    return "[" + std::to_string(shape[first]) + "," + std::to_string(shape[first + 1]) + "," +
           std::to_string(shape[first + 2]) + "]";
  };
  return "\"grid\":" + three(0) + ",\"block\":" + three(3) + ",\"cluster\":" + three(6) +
         ",\"shared_bytes\":" + std::to_string(shared_bytes);
}

namespace {

std::string json_of(const Line& l, Count c) {
  std::string s = "{" + l.json();
  if (!l.work.type.empty()) s += ",\"matrix\":" + quoted(l.work.type);
  c.macs += l.work.macs * c.active;
  c.matrix_shared += l.work.shared_bytes * c.active;
#define GPULESS_WRITE(name) \
  if (c.name) s += ",\"" #name "\":" + std::to_string(c.name);
  GPULESS_COUNTS(GPULESS_WRITE)
#undef GPULESS_WRITE
  return s + "}";
}

std::string json_of(const LaunchKey& key, const Entry& e) {
  std::string s = "{\"kernel\":" + quoted(key.kernel) + ",\"arch\":" + quoted(e.device->arch) +
                  ",\"multiprocessors\":" + std::to_string(e.device->multiprocessors) +
                  ",\"resident\":" + std::to_string(e.resident) + "," + key.json() +
                  ",\"launches\":" + std::to_string(e.launches) +
                  ",\"footprint_read\":" + std::to_string(e.sectors_read * kSectorBytes) +
                  ",\"footprint_written\":" + std::to_string(e.sectors_written * kSectorBytes) + ",\"instructions\":[";
  bool first = true;
  for (const auto& [name, f] : e.functions) {
    for (size_t k = 0; k < f.counts.size(); ++k) {
      if (!f.counts[k].issued && !f.counts[k].waits) continue;
      s += (first ? "" : ",\n") + json_of(f.lines[k], f.counts[k]);
      first = false;
    }
  }
  return s + "]}";
}

// Of a kernel that was launched, or of a function that it called.
std::string coverage_json(const LaunchKey& key, const std::string& function, const Entry::Function& f) {
  std::string s = "{\"kernel\":" + quoted(key.kernel) + ",\"function\":" + quoted(function) +
                  ",\"module\":" + std::to_string(key.module) + ",\"instructions\":[";
  for (size_t k = 0; k < f.counts.size(); ++k) {
    const Count& c = f.counts[k];
    s += (k ? ",\n{" : "{") + f.lines[k].json() + ",\"guarded\":" + (f.lines[k].guarded ? "true" : "false") +
         ",\"active\":" + std::to_string(c.active) + ",\"passed\":" + std::to_string(c.passed) + "}";
  }
  return s + "]}";
}

// Of one name, or of all.
std::string coverage_json(const uint64_t* name) {
  Record& r = the_record();
  const std::lock_guard lock(r.mutex);
  std::string s = "[";
  for (const auto& [key, entry] : r.entries)
    for (const auto& [function, f] : entry.functions)
      if (!name || key.name == *name) s += (s.size() > 1 ? ",\n" : "") + coverage_json(key, function, f);
  return s + "]\n";
}

std::string profile_json(const uint64_t* name) {
  Record& r = the_record();
  const std::lock_guard lock(r.mutex);
  std::string s = "[";
  for (const auto& [key, entry] : r.entries)
    if (!name || key.name == *name) s += (s.size() > 1 ? ",\n" : "") + json_of(key, entry);
  return s + "]\n";
}

bool reports() {
  static const bool any = [] {
    const bool counters = std::getenv("GPULESS_COUNTERS"), coverage = std::getenv("GPULESS_COVERAGE");
    if (counters) std::atexit([] { std::ofstream(std::getenv("GPULESS_COUNTERS")) << profile_json(nullptr); });
    if (coverage) std::atexit([] { std::ofstream(std::getenv("GPULESS_COVERAGE")) << coverage_json(nullptr); });
    return counters || coverage;
  }();
  return any;
}
// From the load of the library on, so that a program which launches nothing has an empty report.
const bool reported = reports();

}  // namespace

bool counted(const Options& o) { return o.counters || reported || recorded(o); }

void record(const Launch& l, const Sheet& sheet, double times) {
  Record& r = the_record();
  const std::lock_guard lock(r.mutex);
  Entry& e = r.entries[LaunchKey(l)];
  if (!e.device) {
    e.device = current_device();
    e.resident = std::max(1, l.resident / e.device->multiprocessors);
  }
  ++e.launches;
  e.sectors_read += scaled(sheet.footprint.sectors(false), times);
  e.sectors_written += scaled(sheet.footprint.sectors(true), times);
  for (const auto& [code, counts] : sheet.counts) {
    auto& f = e.functions[code->name];
    if (f.lines.empty()) f.lines = describe(*l.module, *code);
    f.counts.resize(counts.size());
    for (size_t k = 0; k < counts.size(); ++k) f.counts[k].add(counts[k], times);
  }
}

}  // namespace gpuless

using namespace gpuless;

extern "C" {

const char* gpuless_profile_json(uint64_t name) {
  return guarded("", [&]() -> const char* {
    thread_local std::string json;
    json = profile_json(&name);
    return json.c_str();
  });
}

const char* gpuless_coverage_json(uint64_t name) {
  return guarded("", [&]() -> const char* {
    thread_local std::string json;
    json = coverage_json(&name);
    return json.c_str();
  });
}

void gpuless_profile_forget(uint64_t name) {
  guarded([&] {
    Record& r = the_record();
    const std::lock_guard lock(r.mutex);
    for (auto e = r.entries.begin(); e != r.entries.end();)
      e = e->first.name == name ? r.entries.erase(e) : std::next(e);
  });
}

}  // extern "C"
