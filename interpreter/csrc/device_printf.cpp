#include "device_printf.h"

#include <cstdio>
#include <cstring>

#include "finding.h"

namespace gpuless {
namespace {

constexpr int kBuffer = 1 << 20;  // bytes, CUDA's for all output

// The packed arguments: each at its natural alignment, what C promotes to int or double as that.
class Arguments {
 public:
  explicit Arguments(const ArgumentAt& argument) : argument_(argument) {}
  template <class T>
  T next() {
    offset_ = (offset_ + sizeof(T) - 1) / sizeof(T) * sizeof(T);
    T value;
    std::memcpy(&value, argument_(offset_, sizeof value), sizeof value);
    offset_ += sizeof value;
    return value;
  }

 private:
  const ArgumentAt& argument_;
  size_t offset_ = 0;
};

template <class T>
std::string formatted(const std::string& conversion, T value) {
  const int bytes = std::snprintf(nullptr, 0, conversion.c_str(), value);
  if (bytes < 0 || bytes > kBuffer) {
    Finding f;
    f.message = "a conversion of printf, " + conversion + ", of more than " + std::to_string(kBuffer) + " bytes";
    throw f;
  }
  std::string text(static_cast<size_t>(bytes), '\0');
  std::snprintf(text.data(), text.size() + 1, conversion.c_str(), value);
  return text;
}

}  // namespace

// The conversions of the CUDA C++ Programming Guide, "Formatted Output". `*` takes an int argument.
std::string device_printf(const std::string& format, const ArgumentAt& argument, const TextAt& text_at) {
  Arguments arguments(argument);
  std::string out;
  for (const char* p = format.c_str(); *p;) {
    if (*p != '%') {
      out += *p++;
      continue;
    }
    const char* from = p++;
    std::string conversion = "%";
    for (; *p && std::strchr("-+ #0123456789.*", *p); ++p) {
      if (*p == '*')
        conversion += std::to_string(arguments.next<int32_t>());
      else
        conversion += *p;
    }
    int bytes = 4;
    for (; *p && std::strchr("hlLqjzt", *p); ++p) bytes = *p == 'h' ? bytes / 2 : 8;
    const int unused = 64 - 8 * bytes;
    const char type = *p ? *p++ : '\0';
    if (type && std::strchr("di", type)) {
      const int64_t n = bytes == 8 ? arguments.next<int64_t>() : arguments.next<int32_t>();
      out += formatted(conversion + "lld", static_cast<long long>(static_cast<uint64_t>(n) << unused) >> unused);
    } else if (type && std::strchr("uoxX", type)) {
      const uint64_t n = bytes == 8 ? arguments.next<uint64_t>() : arguments.next<uint32_t>();
      out += formatted(conversion + "ll" + type, static_cast<unsigned long long>(n << unused >> unused));
    } else if (type == 'c') {
      out += formatted(conversion + type, arguments.next<int32_t>());
    } else if (type == 'p') {
      out += formatted(conversion + type, reinterpret_cast<void*>(arguments.next<uint64_t>()));
    } else if (type == 's') {
      const uint64_t address = arguments.next<uint64_t>();
      out += formatted(conversion + type, (address ? text_at(address) : "(null)").c_str());
    } else if (type && std::strchr("fFeEgGaA", type)) {
      out += formatted(conversion + type, arguments.next<double>());
    } else if (type == '%') {
      out += '%';
    } else {
      out.append(from, p);  // no conversion: as it stands
    }
  }
  return out;
}

}  // namespace gpuless
