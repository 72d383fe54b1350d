#pragma once
#include <cstdint>
#include <string>

namespace forwardpass::interpreter {

// What a kernel's printf prints: `arguments` is the buffer that it packs for vprintf, each at its natural alignment.
std::string device_printf(const char* format, const uint8_t* arguments);

}  // namespace forwardpass::interpreter
