#pragma once
// What the interpreter has to say about a kernel.
//
// A check that execution can go on behind reports what it sees (Cluster::report); anything else is thrown. The policy
// of the launch decides what is an error of it: then what is reported is thrown too, and the first one stops the
// launch.
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>

namespace gpuless {

enum class Kind : uint8_t {
  race,           // two accesses that nothing orders
  in_flight,      // data of an asynchronous operation used before it was waited for
  uninitialised,  // shared memory read before anything wrote it
  out_of_bounds,
  overflow,  // an address whose 32-bit offset wrapped
  misaligned,
  deadlock,     // every warp waits and nothing is under way
  barrier,      // wrong thread counts, lanes missing at an aligned or .sync instruction
  mbarrier,     // uninitialised, too many arrivals, overwritten
  illegal,      // what the ISA forbids: bad descriptor, bad operand value, trap
  assertion,    // the kernel's own assert
  unsupported,  // an instruction, modifier or feature that the interpreter does not know
};
const char* name_of(Kind);
std::string quoted(const std::string&);     // as JSON
std::string demangled(const std::string&);  // the name itself, where it is none of C++

// Hardware, as far as is known, or only the letter of the ISA: today's GPUs and ptxas are known to do what was meant.
enum class Breaks : uint8_t { hardware, isa };

struct Finding {
  Kind kind = Kind::illegal;
  Breaks breaks = Breaks::hardware;
  std::string message;
  std::string kernel, mangled;    // its name, and as the PTX has it
  std::string file, instruction;  // instruction: its spelling
  int line = 0, ptx_line = 0;     // of the source file (0: compiled without -lineinfo) and of the PTX
  std::string other_file;         // of the access before, that this one is in conflict with
  int other_line = 0, other_ptx_line = 0;
  bool within_warp = false;  // between lanes of one warp
  unsigned block[3] = {0, 0, 0};
  int warp = -1, lane = -1;
  uint64_t address = 0, seed = 0;
  bool has_address = false;
  std::string arch;
  std::string schedule;  // of the order that it came of, where orders were explored (explore/search.h)
  uint64_t cluster = 0;  // of the grid, whose finding it is
  int rule = -1;         // that ignores it: IgnoreRules
  uint64_t count = 1;    // how often it came

  std::string place() const;    // "file.cu:12", "ptx:34" where there is no line information
  std::string summary() const;  // one line
  std::string text() const;     // one paragraph, every field that is known
  std::string json() const;
};

std::string hexadecimal(uint64_t);
std::string shown(const std::string& path);  // relative to the working directory, where it lies below that

// With an address; the place is filled in by whoever catches it.
Finding finding_at(Kind, std::string message, uint64_t address);

// What has been found, each once, with how often it came: two findings are the same that are of one kind, between the
// same two instructions, and both within a warp or both not.
class Findings {
 public:
  using Key = std::tuple<std::string, Kind, int, int, bool>;  // kernel; lines of the PTX
  static Key key_of(const Finding& f) { return {f.mangled, f.kind, f.ptx_line, f.other_ptx_line, f.within_warp}; }
  bool again(const Key&);  // it is there, and has come once more
  void add(Finding);       // of two that are the same the lower cluster's is kept
  void add(Findings&&);
  bool empty() const { return all_.empty(); }
  void clear() { all_.clear(); }
  auto begin() const { return all_.begin(); }
  auto end() const { return all_.end(); }

 private:
  std::map<Key, Finding> all_;
};

class IgnoreRules;  // ignore_rules.h

// Which findings are errors of a launch.
struct FindingPolicy {
  bool collect = false;  // none: each is kept, and the launch goes on where it can
  enum class Isa : uint8_t { report, ignore, raise } isa = Isa::report;  // those that break no hardware
  std::shared_ptr<const IgnoreRules> rules;

  // Whether the launch is none the worse for it. Fills in the rule.
  bool accepts(Finding&) const;
  // Whether it is an error whose cause may come later: a race often shows first as a read of what nobody has written.
  // The cluster goes on until another finding, its end, or the end of its turn decides (launch.cpp).
  bool postpones(const Finding& f) const {
    return !collect && f.rule < 0 && f.kind == Kind::uninitialised && f.breaks == Breaks::hardware;
  }
};

}  // namespace gpuless
