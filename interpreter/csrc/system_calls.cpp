#include "system_calls.h"

#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

#include "core.h"
#include "device_printf.h"
#include "global_shadow.h"

namespace gpuless {
namespace {

// Host pointer to bytes at a lane's generic address; a finding where there is no such memory.
const uint8_t* host_pointer(Warp& w, int lane, uint64_t address, uint64_t bytes) {
  if ((address & kWindowMask) == kSharedWindow) {
    const uint64_t offset = address - kSharedWindow;
    return shared_range(w, offset, bytes, true, Use::read, lane).shared.data() + shared_offset_of(offset);
  }
  if ((address & kWindowMask) == kLocalWindow) {
    const uint64_t offset = address - kLocalWindow, size = w.local[lane].size();
    if (offset > size || bytes > size - offset) {
      w.fail_at(Kind::out_of_bounds,
                "read of " + std::to_string(bytes) + " bytes at local " + hexadecimal(offset) +
                    ", of which there are " + std::to_string(size) + " bytes",
                lane, address);
    }
    return w.local[lane].data() + offset;
  }
  return access_global(w, address, bytes, Use::constant, lane);
}

std::string text_at(Warp& w, int lane, uint64_t address) {
  std::string text;
  while (const uint8_t c = *host_pointer(w, lane, address + text.size(), 1)) text += static_cast<char>(c);
  return text;
}

uint64_t vprintf(Warp& w, int lane, const uint64_t* a) {
  const std::string text = device_printf(
      text_at(w, lane, a[0]),
      [&](uint64_t offset, uint64_t bytes) { return host_pointer(w, lane, a[1] + offset, bytes); },
      [&](uint64_t address) { return text_at(w, lane, address); });
  std::fputs(text.c_str(), stdout);
  return text.size();
}

// message, file, line, function, character size
uint64_t assertion(Warp& w, int lane, const uint64_t* a) {
  const auto text = [&](uint64_t address) { return text_at(w, lane, address); };
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

// What malloc gave out. Null beyond it, as of CUDA's heap, which is smaller.
struct Heap {
  static constexpr uint64_t kMost = uint64_t{1} << 30;
  std::mutex mutex;
  std::map<void*, uint64_t> blocks;
  uint64_t used = 0;
};
Heap& heap() {
  static auto* const h = new Heap;  // never destroyed, as the memory is not
  return *h;
}

uint64_t allocate(Warp&, int, const uint64_t* a) {
  Heap& h = heap();
  const std::lock_guard lock(h.mutex);
  if (a[0] > Heap::kMost - h.used) return 0;
  void* p = std::malloc(a[0]);
  if (!p) return 0;
  h.blocks[p] = a[0];
  h.used += a[0];
  storage().add(p, static_cast<int64_t>(a[0]), "device malloc");
  return reinterpret_cast<uint64_t>(p);
}

uint64_t release(Warp& w, int lane, const uint64_t* a) {
  void* p = reinterpret_cast<void*>(a[0]);
  if (!p) return 0;
  Heap& h = heap();
  const std::lock_guard lock(h.mutex);
  const auto block = h.blocks.find(p);
  if (block == h.blocks.end()) w.fail_at(Kind::illegal, "free of what malloc has not returned", lane, a[0]);
  h.used -= block->second;
  h.blocks.erase(block);
  global_shadow().forget(a[0], static_cast<uint64_t>(storage().remove(p)));
  std::free(p);
  return 0;
}

struct Provided {
  std::string_view name;
  size_t arguments;
  SystemCall call;
};
constexpr Provided kProvided[] = {
    {"vprintf", 2, vprintf}, {"__assertfail", 5, assertion}, {"malloc", 1, allocate}, {"free", 1, release}};

}  // namespace

SystemCall system_call(std::string_view name, size_t* arguments) {
  for (const Provided& p : kProvided) {
    if (p.name != name) continue;
    *arguments = p.arguments;
    return p.call;
  }
  return nullptr;
}

}  // namespace gpuless
