#include "table.h"

#include <unordered_map>

#include "finding.h"

namespace gpuless {
namespace {

std::vector<const Row*>& table() {
  static std::vector<const Row*> rows;
  return rows;
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0;;) {
    const size_t end = text.find(separator, begin);
    parts.push_back(text.substr(begin, end - begin));
    if (end == std::string_view::npos) return parts;
    begin = end + 1;
  }
}

bool match_from(const std::vector<std::string_view>& pattern, size_t p, const std::vector<std::string_view>& parts,
                size_t s, std::vector<std::string_view>& slots) {
  if (p == pattern.size()) return s == parts.size();
  std::string_view slot = pattern[p];
  const bool optional = slot.back() == '?';
  if (optional) slot.remove_suffix(1);
  if (s < parts.size()) {
    for (const auto alternative : split(slot, '|')) {
      if (alternative != parts[s]) continue;
      slots[p] = parts[s];
      if (match_from(pattern, p + 1, parts, s + 1, slots)) return true;
    }
  }
  slots[p] = {};
  return optional && match_from(pattern, p + 1, parts, s, slots);
}

}  // namespace

Register::Register(const Row* rows, size_t count) {
  for (size_t i = 0; i < count; ++i) table().push_back(rows + i);
}

std::vector<const Row*> all_rows() { return table(); }

bool match(const char* pattern, std::string_view opcode, std::vector<std::string_view>& slots) {
  const auto parts = split(opcode, '.'), pattern_parts = split(pattern, '.');
  slots.assign(pattern_parts.size(), {});
  return match_from(pattern_parts, 0, parts, 0, slots);
}

const Row* find_row(std::string_view opcode, std::vector<std::string_view>& slots) {
  // By the word before the first dot: a few rows each.
  static const auto index = [] {
    std::unordered_map<std::string_view, std::vector<const Row*>> by_head;
    for (const Row* row : table()) {
      for (const auto head : split(split(row->pattern, '.')[0], '|')) by_head[head].push_back(row);
    }
    return by_head;
  }();
  const auto rows = index.find(opcode.substr(0, opcode.find('.')));
  if (rows == index.end()) return nullptr;
  for (const Row* row : rows->second)
    if (match(row->pattern, opcode, slots)) return row;
  return nullptr;
}

}  // namespace gpuless
