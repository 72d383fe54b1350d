#pragma once
// What rows that touch memory share: the address operand with its state space, and how strong the access is.
#include <string_view>
#include <utility>

#include "machine.h"
#include "table.h"

namespace gpuless {

// The state space among the modifiers; none: generic addressing.
inline ptx::Space space_of(const Bind& b) {
  static constexpr std::pair<std::string_view, ptx::Space> names[] = {
      {"shared", ptx::Space::shared}, {"global", ptx::Space::global}, {"const", ptx::Space::constant},
      {"local", ptx::Space::local},   {"param", ptx::Space::param},
  };
  for (int i = 0; i < b.slots(); ++i) {
    if (b.slot(i) == "shared::cluster") return ptx::Space::shared_cluster;
    const std::string_view name = b.slot(i).substr(0, b.slot(i).find("::"));
    for (const auto& [word, space] : names)
      if (name == word) return space;
  }
  return ptx::Space::none;
}

// How strong an access is, and for whom. The ISA writes .sem.scope before the space, ptxas takes any order, and
// programs make use of that (CUTLASS, libcu++, Triton): rows with these slots twice leave the counting to order().
#define SCOPE "cta|cluster|gpu|sys"
#define STATE_SPACE "shared|shared::cta|shared::cluster|global"

enum class Order : uint8_t { weak, volatile_, relaxed, acquire, release, acq_rel };

inline Order order(const Bind& b) {
  static constexpr std::pair<std::string_view, Order> names[] = {
      {"volatile", Order::volatile_}, {"relaxed", Order::relaxed}, {"acquire", Order::acquire},
      {"release", Order::release},    {"acq_rel", Order::acq_rel},
  };
  Order order = Order::weak;
  int orders = 0, scopes = 0, spaces = 0;
  for (int i = 0; i < b.slots(); ++i) {
    for (const auto& [word, o] : names) {
      if (b.slot(i) != word) continue;
      order = o;
      ++orders;
    }
    if (b.slot(i) == "weak") ++orders;
    for (const auto scope : {"cta", "cluster", "gpu", "sys"}) scopes += b.slot(i) == scope;
    const std::string_view name = b.slot(i).substr(0, b.slot(i).find("::"));
    for (const auto space : {"shared", "global", "const", "local", "param"}) spaces += name == space;
  }
  if (orders > 1 || scopes > 1 || spaces > 1) b.refuse("a modifier of its order, scope or state space is there twice");
  if (scopes && order < Order::relaxed && b.slot(0) != "atom" && b.slot(0) != "red") {
    b.refuse("a scope is for .relaxed, .acquire and .release");
  }
  return order;
}

// Loads before an atom.cas of the same address, written the same way, that fill the register which it compares: how
// programs begin a loop of them.
void mark_compared_loads(const Bind&, const Operand& address, const Operand& value);

// The address operand of a row.
struct AddressOperand {
  ptx::Space space;
  bool wide;
  int operand;  // of the instruction
  int64_t displacement;
  Ordering ordering;

  void bind(Bind& b, const Operand& o) {
    ordering = {order(b) >= Order::release, b.has("cta") ? Scope::cta : b.has("cluster") ? Scope::cluster : Scope::gpu};
    space = space_of(b);
    operand = b.instruction.destinations + b.instruction.sources;
    displacement = b.address(o, &wide);
  }
  void addresses(const Warp& w, const Instruction& i, uint64_t out[kLanes]) const {
    w.addresses(i, operand, displacement, wide, out);
  }
  void access(Warp& w, const Instruction& i, int bytes, Use use, Mask mask, uint8_t* host[kLanes]) const {
    uint64_t address[kLanes];
    addresses(w, i, address);
    gpuless::access(w, space, address, bytes, use, mask, host, ordering);
  }
};

}  // namespace gpuless
