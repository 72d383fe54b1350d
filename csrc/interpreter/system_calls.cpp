#include "system_calls.h"

#include <cstdio>
#include <cstdlib>

#include "core.h"
#include "device_printf.h"
#include "global_shadow.h"

namespace forwardpass::interpreter {
namespace {

// Host pointer to what a lane's generic address names; nothing is checked but that it is not shared memory.
const uint8_t* host_pointer(Warp& w, int lane, uint64_t address) {
  if (address & kSharedWindow) {
    const Cta* const cta = shared_cta(*w.cta, address & ~kSharedWindow);
    return cta->shared.data() + shared_offset_of(address);
  }
  if (address & kLocalWindow) return w.local[lane].data() + (address & ~kLocalWindow);
  return reinterpret_cast<const uint8_t*>(address);
}

uint64_t vprintf(Warp& w, int lane, const uint64_t* a) {
  const auto text_at = [&](uint64_t address) { return reinterpret_cast<const char*>(host_pointer(w, lane, address)); };
  const std::string text = device_printf(text_at(a[0]), a[1] ? host_pointer(w, lane, a[1]) : nullptr, text_at);
  std::fputs(text.c_str(), stdout);
  return text.size();
}

// message, file, line, function, character size
uint64_t assertion(Warp& w, int lane, const uint64_t* a) {
  const auto text = [&](uint64_t p) { return std::string(reinterpret_cast<const char*>(host_pointer(w, lane, p))); };
  const auto triple = [](uint64_t x, uint64_t y, uint64_t z) {
    return "[" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + "]";
  };
  const unsigned *block = w.cta->index, *n = w.cta->launch->block;
  const unsigned t = static_cast<unsigned>(w.id * kLanes + lane);
  w.fail(Kind::assertion,  // the words of CUDA
         text(a[1]) + ":" + std::to_string(static_cast<uint32_t>(a[2])) + ": " + text(a[3]) + ": block: " +
             triple(block[0], block[1], block[2]) + ", thread: " + triple(t % n[0], t / n[0] % n[1], t / n[0] / n[1]) +
             " Assertion `" + text(a[0]) + "` failed",
         lane);
}

uint64_t allocate(Warp&, int, const uint64_t* a) {
  void* p = std::malloc(a[0]);
  if (p) storage().add(p, static_cast<int64_t>(a[0]), "device malloc");
  return reinterpret_cast<uint64_t>(p);
}

uint64_t release(Warp&, int, const uint64_t* a) {
  void* p = reinterpret_cast<void*>(a[0]);
  if (p) global_shadow().forget(a[0], static_cast<uint64_t>(storage().remove(p)));
  std::free(p);
  return 0;
}

}  // namespace

SystemCall system_call(std::string_view name) {
  if (name == "vprintf") return vprintf;
  if (name == "__assertfail") return assertion;
  if (name == "malloc") return allocate;
  if (name == "free") return release;
  return nullptr;
}

}  // namespace forwardpass::interpreter
