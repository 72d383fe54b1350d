#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace forwardpass::interpreter {

// What a kernel's printf prints: `arguments` is the buffer that it packs for vprintf, each at its natural alignment;
// `text_at` gives the string at a generic address.
std::string device_printf(const char* format, const uint8_t* arguments,
                          const std::function<const char*(uint64_t address)>& text_at);

}  // namespace forwardpass::interpreter
