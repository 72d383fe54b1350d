// tcgen05.cp, ISA 9.7.16.9: from shared memory to tensor memory, in the tensor cores' queue. Of a pair of CTAs each
// copies what it has itself.
#include "rows/async.h"
#include "rows/matrix_descriptor.h"
#include "rows/matrix_rows.h"
#include "rows/tcgen05.h"

namespace gpuless {
namespace {

struct Form {
  bool pair = false;
  uint32_t rows = 128, columns = 8;
  uint8_t quarters[4] = {0, 1, 2, 3};  // which 32 of the rows each 32 lanes get
  int64_t displacement = 0;
};

struct CopyOperation final : TensorOperation {
  const Form* form = nullptr;
  CtaGroup group;
  TensorAddress to{0};
  uint64_t descriptor = 0;

  void perform(Cta& issuer) override {
    alignas(64) uint32_t fragments[16][2][kLanes];
    for (int p = 0; p < group.count; ++p) {
      Cta& cta = *group.ctas[p];
      if (&cta != &issuer) cta.visited(actor(Proxy::async));
      gather(cta, MatrixDescriptor(descriptor), false, 0, static_cast<int>(form->rows) / 8, actor(Proxy::async),
             fragments, 2, form->columns / 4);
      TensorMemory& memory = *cta.tensor_memory;
      if (checked(cta)) {
        memory.access(actor(Proxy::generic), 0, TensorMemory::kRows, to.column, form->columns, Use::write);
      }
      for (uint32_t lane = 0; lane < TensorMemory::kRows; ++lane) {
        const uint32_t row = form->quarters[lane / 32] * 32 + lane % 32;
        for (uint32_t k = 0; k < form->columns; ++k) {
          memory.cell(lane, to.column + k) = fragments[row / 8][k / 4][row % 8 * 4 + k % 4];
        }
      }
    }
  }
};

// [taddr], s-desc
Step copy(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Form*>(i.data);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    auto operation = std::make_shared<CopyOperation>();
    operation->form = &form;
    operation->group = group_of(w, form.pair);
    operation->to = TensorAddress(w.operand<uint32_t>(i, 0)[l] + static_cast<uint32_t>(form.displacement));
    operation->descriptor = w.operand<uint64_t>(i, 1)[l];
    require_descriptor(w, operation->descriptor, "s-desc", l);
    if (operation->to.lane) w.fail(Kind::illegal, "tcgen05.cp writes all lanes: its address must have lane 0", l);
    for (int p = 0; p < operation->group.count; ++p) {
      tensor_memory(*operation->group.ctas[p]).require(operation->to.column, form.columns, "tcgen05.cp");
    }
    issue(w, i, std::move(operation));
  }
  return Step::next;
}

void bind(Bind& b) {
  require_targets(b, {100});
  expect_operands(b, 2);
  auto& form = b.data<Form>();
  form.pair = b.has("cta_group::2");
  form.columns = b.has("128x256b") ? 8 : 4;
  form.rows = b.has("32x128b") ? 32 : b.has("64x128b") ? 64 : 128;
  const bool four = b.has("warpx4"), interleaved = b.has("warpx2::02_13"), halves = b.has("warpx2::01_23");
  if (four != (form.rows == 32) || (interleaved || halves) != (form.rows == 64)) {
    b.refuse(b.statement.opcode + ": .32x128b goes with .warpx4, .64x128b with .warpx2::02_13 or .warpx2::01_23");
  }
  for (uint8_t q = 0; q < 4; ++q) {
    if (four) form.quarters[q] = 0;
    if (interleaved) form.quarters[q] = q % 2;
    if (halves) form.quarters[q] = q / 2;
  }
  bool wide;
  form.displacement = b.address(b.operand(0), &wide);
  if (wide) b.refuse("an address of tensor memory has 32 bits");
  b.source(1, Type::b64);
  b.run(&copy);
}

void refuse_format(Bind& b) { b.refuse(b.statement.opcode + ": copies that decompress are not supported"); }
void refuse_shape(Bind& b) { b.refuse(b.statement.opcode + ": .4x256b and tcgen05.shift are not supported"); }

#define GROUP "cta_group::1|cta_group::2"
#define MULTICAST "warpx4|warpx2::02_13|warpx2::01_23"
#define SHAPES "128x256b|128x128b|64x128b|32x128b"
// The ISA has the shape first, Triton writes it last; ptxas takes both.
const Row rows[] = {
    {"tcgen05.cp." GROUP "." SHAPES "." MULTICAST "?", "9.7.16.9", bind},
    {"tcgen05.cp." GROUP "." MULTICAST "." SHAPES, "9.7.16.9", bind},
    {"tcgen05.cp." GROUP ".4x256b", "9.7.16.9", refuse_shape},
    {"tcgen05.cp." GROUP "." SHAPES "|4x256b." MULTICAST "?.b8x16.b4x16_p64|b6x16_p32", "9.7.16.9", refuse_format},
    {"tcgen05.shift." GROUP ".down", "9.7.16.9", refuse_shape},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
