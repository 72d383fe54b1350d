// Opened at run time, so that only who loads compressed PTX needs it. apt, rpm and pacman use it themselves, so nearly
// every Linux system has it.
#include "zstandard.h"

#include <dlfcn.h>

namespace gpuless {
namespace {

struct Library {
  unsigned long long (*content_size)(const void*, size_t) = nullptr;
  size_t (*decompress)(void*, size_t, const void*, size_t) = nullptr;
  unsigned (*is_error)(size_t) = nullptr;
  Library() {
    void* handle = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!handle) return;
    content_size = reinterpret_cast<decltype(content_size)>(dlsym(handle, "ZSTD_getFrameContentSize"));
    decompress = reinterpret_cast<decltype(decompress)>(dlsym(handle, "ZSTD_decompress"));
    is_error = reinterpret_cast<decltype(is_error)>(dlsym(handle, "ZSTD_isError"));
  }
  explicit operator bool() const { return content_size && decompress && is_error; }
};

constexpr unsigned long long kLargest = 1ull << 30;  // of a sane image; unknown and invalid sizes are larger

}  // namespace

std::optional<std::string> decompress_zstandard(std::string_view frame, std::string* problem) {
  static const Library zstd;
  if (!zstd) {
    *problem = "libzstd.so.1 is not on this system: install it (Debian and Ubuntu: libzstd1)";
    return std::nullopt;
  }
  const unsigned long long size = zstd.content_size(frame.data(), frame.size());
  std::string text;
  if (size <= kLargest) {
    text.resize(size);
    const size_t length = zstd.decompress(text.data(), size, frame.data(), frame.size());
    if (!zstd.is_error(length) && length == size) return text;
  }
  *problem = "it is damaged";
  return std::nullopt;
}

}  // namespace gpuless
