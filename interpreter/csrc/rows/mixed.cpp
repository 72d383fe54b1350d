// fp16 and bf16 operands in fp32 arithmetic (ISA 9.7.5): those of the type in the last slot are widened, which is
// exact.
#include "rows/floating.h"
#include "rows/matrix_rows.h"

namespace gpuless {
namespace {

template <class Op, bool Sat>
struct Widened {
  template <class... T>
  float operator()(T... operands) const {
    return Modified<Op, false, Sat ? Clamp::sat : Clamp::none>{}(static_cast<float>(operands)...);
  }
};

// The first Narrow of the operands have 16 bits, the last has 32.
template <class Op, int Narrow>
void bind_widened(Bind& b) {
  require_capability(b, 100);
  const Type type = b.type(b.slots() - 1);
  expect_operands(b, Narrow + 2);
  destination(b, b.operand(0), Type::f32);
  for (int i = 1; i <= Narrow; ++i) b.source(i, Type::b16);
  b.source(Narrow + 1, Type::f32);
  const Rounding mode = rounding_of(b);
  b.instruction.option = static_cast<uint32_t>(mode);
  const auto run = [&](auto t) {
    using T = decltype(t);
    choose(b.has("sat"), [&](auto sat) {
      using O = Widened<Op, decltype(sat)::value>;
      const bool rn = mode == Rounding::rn;
      if constexpr (Narrow == 1) b.run(rn ? &lanewise<O, float, T, float> : &lanewise_rounded<O, float, T, float>);
      if constexpr (Narrow == 2)
        b.run(rn ? &lanewise<O, float, T, T, float> : &lanewise_rounded<O, float, T, T, float>);
    });
  };
  type == Type::bf16 ? run(BFloat16{}) : run(Half{});
}

const Row rows[] = {
    {"add.rn|rz|rm|rp?.sat?.f32.f16|bf16", "9.7.5.1", bind_widened<Plus, 1>},
    {"sub.rn|rz|rm|rp?.sat?.f32.f16|bf16", "9.7.5.2", bind_widened<Minus, 1>},
    {"fma.rn|rz|rm|rp.sat?.f32.f16|bf16", "9.7.5.3", bind_widened<TimesPlus, 2>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
