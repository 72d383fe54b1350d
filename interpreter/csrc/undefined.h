#pragma once
// Undefined registers: loaded from shared memory that nothing has written, or made of such values.
//
// To load them is no error: the value is unspecified, and nothing has to come of it. Tiled kernels rely on that: where
// a tile hangs over the edge of the matrix, CUTLASS's pipelines of cp.async leave its rows in shared memory as they
// are, load and multiply them like the others, stage the products in shared memory, and do not store them to global
// memory. What depends on one is the finding, told as the load of memory that nothing has written: an address, a
// predicate, global memory, another lane, an asynchronous operation. So definedness follows the values, as in Memcheck
// (Seward and Nethercote, USENIX 2005), by register and lane; arithmetic passes it on to its own lane, mma to rows and
// columns, a store to shared memory to the bytes it writes.
#include <string>
#include <string_view>
#include <vector>

#include "machine.h"

namespace gpuless {

// Whether an opcode computes each lane's registers from the same lane's registers, and keeps nothing else.
bool is_lanewise(std::string_view opcode);

class UndefinedRegisters {  // of one warp
 public:
  bool empty() const { return !count_; }
  Mask lanes(const Warp&, Offset) const;
  // In the lanes of `mask`, the register is now undefined where `undefined` says so, for the reason that `origin` has.
  void set(const Warp&, Offset, Mask mask, Mask undefined, uint32_t origin);
  uint32_t origin_of(const Warp&, Offset) const;  // of one that is undefined in some lane
  // Called before an instruction runs. Reports what must not depend on them, and sets which results are undefined,
  // unless the handler does.
  void before(const Warp&, const Instruction&, Mask);
  void depends(const Warp&, const Instruction&, Offset) const;  // reports it

  uint32_t loaded = 0;  // origin of the load under way
  uint32_t origin(const Warp&, const uint64_t address[kLanes], int bytes, int lane);

 private:
  struct Entry {
    Mask lanes = 0;
    uint32_t origin = 0;
  };
  const Entry* find(const Warp&, Offset) const;
  std::vector<std::vector<Entry>> entries_;            // by depth of the frame, by offset / 64
  int count_ = 0;                                      // of entries that have lanes
  std::vector<std::pair<uint32_t, Finding>> origins_;  // by line of the load
};

// A load met bytes that nothing has written: fills in Warp::unwritten.
void note_unwritten(Warp&, const uint64_t address[kLanes], int bytes, Mask);
// A destination of that load.
void set_undefined(Warp&, Offset, Mask mask, Mask undefined);

// The end of a load: what it took from unwritten bytes is undefined.
inline void loaded(Warp& w, const Instruction& i) {
  if (__builtin_expect(!w.unwritten, 1)) return;
  const Mask unwritten = std::exchange(w.unwritten, 0);
  for (int k = 0; k < i.destinations; ++k) set_undefined(w, i.operand[k], unwritten, unwritten);
}
// The end of a store of operand `n` to `bytes` at host + offset.
void store_undefined(Warp&, const Instruction&, int n, Mask, uint8_t* const host[kLanes], int offset, int bytes);
inline void stored(Warp& w, const Instruction& i, int n, Mask mask, uint8_t* const host[kLanes], int offset,
                   int bytes) {
  if (__builtin_expect(w.undefined && !w.undefined->empty(), 0)) store_undefined(w, i, n, mask, host, offset, bytes);
}

}  // namespace gpuless
