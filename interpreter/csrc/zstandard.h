#pragma once
#include <optional>
#include <string>
#include <string_view>

namespace gpuless {

// The content of one Zstandard frame, by the system's libzstd.so.1, or nothing: `problem` then has the words.
std::optional<std::string> decompress_zstandard(std::string_view frame, std::string* problem);

}  // namespace gpuless
