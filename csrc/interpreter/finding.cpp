#include "finding.h"

#include <cstdio>

namespace forwardpass::interpreter {

const char* name_of(Kind kind) {
  static const char* names[] = {"race",    "in_flight", "uninitialised", "out_of_bounds", "misaligned", "deadlock",
                                "barrier", "mbarrier",  "illegal",       "assertion",     "unsupported"};
  return names[static_cast<int>(kind)];
}

std::string Finding::text() const {
  std::string s = std::string(name_of(kind)) + ": " + message;
  if (!kernel.empty()) s += "\n  kernel " + kernel;
  if (line) s += "\n  at " + file + ":" + std::to_string(line);
  if (ptx_line) s += std::string(line ? ", " : "\n  at ") + "PTX line " + std::to_string(ptx_line);
  if (!instruction.empty()) s += ": " + instruction;
  if (warp >= 0) {
    s += "\n  block (" + std::to_string(block[0]) + ", " + std::to_string(block[1]) + ", " + std::to_string(block[2]) +
         "), warp " + std::to_string(warp);
    if (lane >= 0) s += ", lane " + std::to_string(lane);
  }
  if (has_address) {
    s += "\n  address " + hexadecimal(address);
  }
  if (!arch.empty()) s += "\n  repeat with arch " + arch + ", seed " + std::to_string(seed);
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
  return "{\"kind\":" + quoted(name_of(kind)) + ",\"message\":" + quoted(message) + ",\"kernel\":" + quoted(kernel) +
         ",\"file\":" + quoted(file) + ",\"instruction\":" + quoted(instruction) + ",\"arch\":" + quoted(arch) +
         number("line", line) + number("ptx_line", ptx_line) + ",\"block\":[" + std::to_string(block[0]) + "," +
         std::to_string(block[1]) + "," + std::to_string(block[2]) + "]" + number("warp", warp) + number("lane", lane) +
         ",\"address\":" + (has_address ? std::to_string(address) : "null") + ",\"seed\":" + std::to_string(seed) +
         ",\"text\":" + quoted(text()) + "}";
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

}  // namespace forwardpass::interpreter
