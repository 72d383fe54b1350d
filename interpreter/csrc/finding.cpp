#include "finding.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "ignore_rules.h"

namespace gpuless {

const char* name_of(Kind kind) {
  static const char* names[] = {"race",     "in_flight", "uninitialised", "out_of_bounds", "overflow",  "misaligned",
                                "deadlock", "barrier",   "mbarrier",      "illegal",       "assertion", "unsupported"};
  return names[static_cast<int>(kind)];
}

std::string demangled(const std::string& name) {
  int status = 0;
  const std::unique_ptr<char, decltype(&std::free)> text(abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status),
                                                         &std::free);
  return text && name.compare(0, 2, "_Z") == 0 ? text.get() : name;
}

std::string Finding::place() const {
  return line ? file + ":" + std::to_string(line) : ptx_line ? "ptx:" + std::to_string(ptx_line) : "*";
}

std::string Finding::summary() const {
  return std::string(name_of(kind)) + " " + (line ? shown(file) + ":" + std::to_string(line) : place()) + " " + kernel;
}

std::string shown(const std::string& path) {
  std::error_code error;
  const std::string folder = std::filesystem::current_path(error).string() + "/";
  return !error && path.compare(0, folder.size(), folder) == 0 ? path.substr(folder.size()) : path;
}

namespace {

constexpr size_t kColumns = 100;

// In lines of at most kColumns, broken at blanks; those after the first are indented.
std::string wrapped(const std::string& text) {
  std::string lines;
  size_t width = 0;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin + 1), text.size());  // with the blank before the word
    if (width && width + end - begin > kColumns) {
      lines += "\n   ";
      width = 3;
    }
    lines.append(text, begin, end - begin);
    width += end - begin;
    begin = end;
  }
  return lines;
}

// One line: what does not fit is left out.
std::string shortened(const std::string& text) {
  return text.size() <= kColumns ? text : text.substr(0, kColumns - 3) + "...";
}

// A line of a source that is there, without its indentation.
std::string source_text(const std::string& path, int line) {
  std::ifstream file(path);
  std::string text;
  for (int n = 0; n < line; ++n)
    if (!std::getline(file, text)) return "";
  const size_t begin = text.find_first_not_of(" \t");
  return begin == std::string::npos ? "" : text.substr(begin);
}

}  // namespace

std::string Finding::text() const {
  std::string s = std::string(name_of(kind)) + ": " + message;
  if (kind != Kind::assertion) s = wrapped(s);  // those are the program's words, which scripts search for
  if (breaks == Breaks::isa) s += "\n  against the letter of the PTX ISA; no GPU is known to mind";
  if (!kernel.empty()) s += "\n" + wrapped("  kernel " + kernel);
  if (line) s += "\n" + wrapped("  at " + shown(file) + ":" + std::to_string(line));
  if (const std::string source = line ? source_text(file, line) : ""; !source.empty())
    s += "\n" + shortened("    | " + source);
  if (ptx_line)
    s += "\n" + shortened("  PTX line " + std::to_string(ptx_line) + (instruction.empty() ? "" : ": " + instruction));
  if (warp >= 0) {
    s += "\n  block (" + std::to_string(block[0]) + ", " + std::to_string(block[1]) + ", " + std::to_string(block[2]) +
         "), warp " + std::to_string(warp);
    if (lane >= 0) s += ", lane " + std::to_string(lane);
  }
  if (has_address) {
    s += "\n  address " + hexadecimal(address);
  }
  if (count > 1) s += "\n  " + std::to_string(count) + " times";
  if (!arch.empty()) s += "\n  repeat with arch " + arch + ", seed " + std::to_string(seed);
  if (!schedule.empty()) s += ", schedule " + schedule;
  return s;
}

std::string quoted(const std::string& text) {
  std::string s = "\"";
  for (const unsigned char c : text) {
    if (c == '"' || c == '\\') {
      s += '\\';
      s += static_cast<char>(c);
    } else if (c < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", c);
      s += escape;
    } else {
      s += static_cast<char>(c);
    }
  }
  return s + "\"";
}

std::string Finding::json() const {
  auto number = [](const char* name, int64_t n) { return std::string(",\"") + name + "\":" + std::to_string(n); };
  auto text_field = [](const char* name, const std::string& t) {
    return std::string(",\"") + name + "\":" + quoted(t);
  };
  return "{\"kind\":" + quoted(name_of(kind)) + text_field("breaks", breaks == Breaks::isa ? "isa" : "hardware") +
         text_field("message", message) + text_field("kernel", kernel) + text_field("mangled", mangled) +
         text_field("other_file", other_file) + number("other_line", other_line) +
         number("other_ptx_line", other_ptx_line) + ",\"within_warp\":" + (within_warp ? "true" : "false") +
         number("rule", rule) + ",\"count\":" + std::to_string(count) + ",\"file\":" + quoted(file) +
         ",\"instruction\":" + quoted(instruction) + ",\"arch\":" + quoted(arch) + number("line", line) +
         number("ptx_line", ptx_line) + ",\"block\":[" + std::to_string(block[0]) + "," + std::to_string(block[1]) +
         "," + std::to_string(block[2]) + "]" + number("warp", warp) + number("lane", lane) +
         ",\"address\":" + (has_address ? std::to_string(address) : "null") + ",\"seed\":" + std::to_string(seed) +
         ",\"schedule\":" + quoted(schedule) + ",\"text\":" + quoted(text()) + "}";
}

std::string hexadecimal(uint64_t n) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(n));
  return text;
}

Finding finding_at(Kind kind, std::string message, uint64_t address) {
  Finding f;
  f.kind = kind;
  f.message = std::move(message);
  f.address = address;
  f.has_address = true;
  return f;
}

bool Findings::again(const Key& key) {
  const auto place = all_.find(key);
  if (place == all_.end()) return false;
  ++place->second.count;
  return true;
}

void Findings::add(Finding f) {
  const auto [place, is_new] = all_.try_emplace(key_of(f), std::move(f));
  if (is_new) return;  // and f has been moved
  Finding& before = place->second;
  const uint64_t count = before.count + f.count;
  if (f.cluster < before.cluster) before = std::move(f);
  before.count = count;
}

void Findings::add(Findings&& others) {
  for (auto& [key, finding] : others.all_) add(std::move(finding));
  others.all_.clear();
}

bool FindingPolicy::accepts(Finding& f) const {
  f.rule = rules ? rules->match(f) : -1;
  if (f.rule >= 0 || collect) return true;
  return f.breaks == Breaks::isa && isa != Isa::raise;
}

}  // namespace gpuless
