// Warps that go round in circles: the same look, in the same state, with no effect between. Nothing but a change of
// what it looks at lets such a warp go on, so it need not run before something has changed, and where nothing else can
// change anything it never will: a spin lock that nobody frees, a flag that nobody sets.
#include <algorithm>
#include <bit>
#include <cstring>

#include "decode.h"
#include "machine.h"

namespace gpuless {
namespace {

// A warp may look so often before its state is compared: most waits are over sooner.
constexpr uint32_t kPatience = 16;
// Then one state is kept at each power of two, and so many looks after it are compared with it.
constexpr uint32_t kPeriod = 64;
// Turns of each other strand of a warp between two states that are compared.
constexpr uint32_t kRounds = 64;

class Hash {
 public:
  void add(uint64_t x) { value_ = mix(value_ ^ x) + 0x9e3779b97f4a7c15u; }
  void add(const uint8_t* bytes, size_t n) {
    uint64_t word = 0;
    for (; n >= 8; n -= 8, bytes += 8) {
      std::memcpy(&word, bytes, 8);
      add(word);
    }
    word = 0;
    std::memcpy(&word, bytes, n);
    if (n) add(word);
  }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0;
};

// A register's values in some lanes; 4 bytes are a predicate.
void add_lanes(Hash& hash, const uint8_t* place, uint32_t bytes, Mask lanes) {
  if (bytes == sizeof(Mask)) {
    Mask values;
    std::memcpy(&values, place, sizeof values);
    return hash.add(values & lanes);
  }
  if (lanes == kAllLanes) return hash.add(place, bytes);
  const uint32_t lane_bytes = std::min<uint32_t>(bytes / kLanes, 8), halves = bytes / kLanes / lane_bytes;
  for (uint32_t half = 0; half < halves; ++half) {
    for (Mask rest = lanes; rest; rest &= rest - 1) {
      hash.add(place + (half * kLanes + __builtin_ctz(rest)) * lane_bytes, lane_bytes);
    }
  }
}

void add_strand(Hash& hash, const Strand& s) {
  hash.add(uint64_t{s.pc} << 32 | s.mask);
  hash.add(s.ticket << 1 | (s.waiting ? 1 : 0));
  const Code& code = *s.frame->code;
  const auto here = code.live.find(s.pc);
  const auto& live = (here == code.live.end() ? code.live.find(kAnywhere) : here)->second;
  for (const auto& [place, bytes] : live) add_lanes(hash, s.frame->registers + place, bytes, s.mask);
  for (const Frame* f = s.frame->caller; f; f = f->caller) hash.add(f->registers, f->code->image.size());
}

}  // namespace

uint64_t state_of(const Warp& w) {
  Hash hash;
  hash.add(w.carry);
  for (const Strand& s : w.strands) add_strand(hash, s);
  for (const auto& local : w.local) hash.add(local.data(), local.size());
  return hash.value();
}

void look(Warp& w) {
  if (w.cta->launch->execution) return;  // which compares states itself
  Looks& l = w.looks;
  if (l.effects != w.effects) l = {w.effects};
  const uint32_t n = l.count++;
  if (n < kPatience || n - std::bit_floor(n) >= kPeriod) return;
  const uint64_t state = state_of(w);
  if (n == std::bit_floor(n)) l.state = state;
  if (n == std::bit_floor(n) || state != l.state) return;
  l.count = kPatience + 1;  // it is compared with this state from now on
  const auto goes_on = [](const Strand& s) { return !s.waiting; };
  const auto others = static_cast<uint32_t>(std::count_if(w.strands.begin(), w.strands.end(), goes_on)) - 1;
  // Of its own lanes, those that it may wait for have their turns, an instruction each, until they go round too: the
  // whole warp is as it was before so many turns that by chance none of them went without.
  const uint32_t turns = l.switches - std::bit_floor(l.switches);
  w.spins = !others || (state == l.circle && turns >= kRounds * others);
  if (w.spins) return;
  if (std::has_single_bit(++l.switches)) l.circle = state;
  w.turn = kStrandTurn + 1;
}

}  // namespace gpuless
