#pragma once
// What the interpreter has to say about a kernel. One is enough: the first stops the launch.
#include <cstdint>
#include <string>

namespace forwardpass::interpreter {

enum class Kind : uint8_t {
  race,           // two accesses that nothing orders
  in_flight,      // data of an asynchronous operation used before it was waited for
  uninitialised,  // shared memory read before anything wrote it
  out_of_bounds,
  misaligned,
  deadlock,     // every warp waits and nothing is under way
  barrier,      // wrong thread counts, lanes missing at an aligned or .sync instruction
  mbarrier,     // uninitialised, too many arrivals, overwritten
  illegal,      // what the ISA forbids: bad descriptor, bad operand value, trap
  assertion,    // the kernel's own assert
  unsupported,  // an instruction, modifier or feature that the interpreter does not know
};
const char* name_of(Kind);
std::string quoted(const std::string&);  // as JSON

struct Finding {
  Kind kind = Kind::illegal;
  std::string message;
  std::string kernel, file, instruction;  // instruction: its spelling
  int line = 0, ptx_line = 0;             // of the source file (0: compiled without -lineinfo) and of the PTX
  unsigned block[3] = {0, 0, 0};
  int warp = -1, lane = -1;
  uint64_t address = 0, seed = 0;
  bool has_address = false;
  std::string arch;

  std::string text() const;  // one paragraph, every field that is known
  std::string json() const;
};

std::string hexadecimal(uint64_t);

// With an address; the place is filled in by whoever catches it.
Finding finding_at(Kind, std::string message, uint64_t address);

}  // namespace forwardpass::interpreter
