#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace gpuless {

using ArgumentAt = std::function<const uint8_t*(uint64_t offset, uint64_t bytes)>;
using TextAt = std::function<std::string(uint64_t address)>;

// What a kernel's printf prints: `argument` gives the bytes at an offset of the buffer that it packs for vprintf, each
// at its natural alignment, `text_at` the string at a generic address; both throw where there is none. Throws a
// Finding.
std::string device_printf(const std::string& format, const ArgumentAt& argument, const TextAt& text_at);

}  // namespace gpuless
