#include "ignore_rules.h"

#include <sstream>
#include <stdexcept>

namespace gpuless {
namespace {

// "*" is any characters, "?" is one.
bool matches(std::string_view pattern, std::string_view text) {
  size_t p = 0, t = 0, star = std::string_view::npos, mark = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      mark = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      ++p;
      ++t;
    } else if (star != std::string_view::npos) {  // the star takes one more
      p = star + 1;
      t = ++mark;
    } else {
      return false;
    }
  }
  return pattern.find_first_not_of('*', p) == std::string_view::npos;
}

bool is_place(const std::string& pattern, const std::string& file, int line, int ptx_line) {
  if (!ptx_line) return false;
  const std::string name = line ? file : "ptx";
  for (const std::string& place : {name, name + ":" + std::to_string(line ? line : ptx_line)})
    if (matches(pattern, place) || matches("*/" + pattern, place)) return true;
  return false;
}

bool is_kind(const std::string& name) {
  for (int k = 0; k <= static_cast<int>(Kind::unsupported); ++k)
    if (name == name_of(static_cast<Kind>(k))) return true;
  return false;
}

}  // namespace

IgnoreRules::IgnoreRules(std::string_view text) {
  std::istringstream lines{std::string(text)};
  int number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    const size_t comment = line.find(" #");
    if (line.find_first_not_of(" \t\r") == std::string::npos || line[line.find_first_not_of(" \t")] == '#') continue;
    std::istringstream words(line.substr(0, comment));
    Rule rule;
    words >> rule.kind >> rule.place >> std::ws;
    std::getline(words, rule.kernel);
    rule.kernel.erase(rule.kernel.find_last_not_of(" \t\r") + 1);
    if (rule.kernel.empty()) rule.kernel = "*";
    const std::string where = "line " + std::to_string(number) + " of the rules, \"" + line + "\": ";
    if (rule.place.empty()) throw std::invalid_argument(where + "a rule is kind, place and kernel; \"*\" is any");
    if (rule.kind != "*" && !is_kind(rule.kind)) {
      throw std::invalid_argument(where + rule.kind + " is no kind of finding; \"*\" is any");
    }
    rules_.push_back(std::move(rule));
  }
}

int IgnoreRules::match(const Finding& f) const {
  for (size_t k = 0; k < rules_.size(); ++k) {
    const Rule& r = rules_[k];
    if (r.kind != "*" && r.kind != name_of(f.kind)) continue;
    if (r.place != "*" && !is_place(r.place, f.file, f.line, f.ptx_line) &&
        !is_place(r.place, f.other_file, f.other_line, f.other_ptx_line)) {
      continue;
    }
    const std::string kernel = "*" + r.kernel + "*";
    if (matches(kernel, f.kernel) || matches(kernel, f.mangled)) return static_cast<int>(k);
  }
  return -1;
}

}  // namespace gpuless
