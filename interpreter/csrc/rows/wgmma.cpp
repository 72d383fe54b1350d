// wgmma: PTX ISA 9.7.15.5.2 and 9.7.15.7. A wgmma.fence does nothing here: where one is missing was found beforehand
// (wgmma_fence.cpp).
#include "rows/wgmma.h"

#include <cstring>

#include "explore/execution.h"
#include "rows/async.h"
#include "rows/matrix_rows.h"

namespace gpuless {
namespace {

Wgmma& state_of(Warp& w) {
  if (w.wgmma) return *w.wgmma;
  const int first = w.id / 4 * 4;
  if (first + 4 > static_cast<int>(w.cta->warps.size())) {
    w.fail(Kind::barrier, "wgmma needs a whole warpgroup of four warps, and the block ends with warp " +
                              std::to_string(w.cta->warps.size() - 1));
  }
  const auto group = std::make_shared<Warpgroup>();
  group->first_warp = first;
  for (int k = first; k < first + 4; ++k) {
    w.cta->warps[k].wgmma = std::make_shared<Wgmma>();
    w.cta->warps[k].wgmma->group = group;
  }
  return *w.wgmma;
}

template <class T>
T uniform(const Warp& w, const T* lanes, const char* what) {
  T difference = 0;
  for (int l = 1; l < kLanes; ++l) difference |= lanes[l] ^ lanes[0];
  if (difference) w.fail(Kind::illegal, std::string(what) + " differs between the lanes of a warp");
  return lanes[0];
}

uint64_t descriptor(const Warp& w, Offset o, const char* what) {
  const uint64_t bits = uniform(w, w.at<uint64_t>(o), what);
  if (const char* why = illegal_descriptor(bits)) {
    w.fail(Kind::illegal, std::string(what) + " " + hexadecimal(bits) + " is illegal: " + why);
  }
  return bits;
}

// The operation that this warp issues now: another warp's, or a new one.
WgmmaOperation& meet(Warp& w, Wgmma& state, const Instruction& i, const WgmmaShape& shape) {
  Warpgroup& group = *state.group;
  const uint64_t number = state.issued + 1;
  const size_t index = number - group.completed - 1;
  if (index == group.pending.size()) {
    w.cta->cluster->begin_series(group.series);
    const auto operation = std::make_shared<WgmmaOperation>();
    operation->instruction = &i;
    operation->code = w.frame->code;
    operation->warp = w.id;
    operation->shape = &shape;
    operation->number = number;
    operation->group = &group;
    operation->now = w.cta->cluster->advance(group.series);
    group.pending.push_back(operation);
    w.cta->add(operation);
    return *operation;
  }
  WgmmaOperation& op = *group.pending[index];
  if (op.instruction != &i) {
    w.fail(Kind::illegal, "the warps of a warpgroup issue different operations: this is number " +
                              std::to_string(number) + " of warp " + std::to_string(w.id) + ", and that of warp " +
                              std::to_string(op.warp) + " was " + place_of(w, *op.shape));
  }
  return op;
}

// The accumulators: the registers themselves, or what they stand for since an earlier operation.
void take_accumulators(Warp& w, Wgmma& state, const Instruction& i, const WgmmaShape& shape, WgmmaOperation& op,
                       WgmmaOperation::Part& part) {
  RegistersInFlight& flight = state.flight;
  const auto* first = flight.find(i.operand[0]);
  Accumulator* const before = first ? first->value : nullptr;
  const bool same = !before || same_shape(*before->shape, shape);
  const bool known =
      before && !before->moved && std::memcmp(before->registers, i.operand, shape.d_registers * sizeof(Offset)) == 0;
  for (int r = 0; r < shape.d_registers && !(known && same); ++r) {
    const auto* e = flight.find(i.operand[r]);
    if (same && (before ? e && e->value == before && e->index == r : !e)) continue;
    w.fail(Kind::in_flight, "register " + std::to_string(r) +
                                " of D is in flight as something else: only operations of the same shape on the same "
                                "registers may follow each other without wgmma.wait_group");
  }
  const bool fresh = !before, shared = before && before->references != shape.d_registers;
  if (before) part.from = flight.share(before);
  part.to = fresh || shared ? flight.make(shape, i.operand) : part.from;
  const uint32_t poison = 0x7fc00000 | (w.random() & 0x3fffff);
  for (int r = 0; r < shape.d_registers && (fresh || shared); ++r) {
    flight.stands_for(i.operand[r], part.to.get(), r, false);
    if (!fresh) continue;
    uint32_t* const lanes = w.at<uint32_t>(i.operand[r]);
    if (op.scale_d) std::memcpy(part.to->values + r * kLanes, lanes, kLanes * 4);
    std::fill_n(lanes, kLanes, poison);
  }
  if (fresh) part.from = part.to;
  if (!op.scale_d) part.from = nullptr;
  part.to->last = op.number;
  part.to->shape = &shape;
}

Step mma_async(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const WgmmaShape& shape = *static_cast<const WgmmaShape*>(i.data);
  Wgmma& state = state_of(w);
  if (state.flight.empty()) state.frame = w.frame;
  if (state.frame != w.frame) {
    w.fail(Kind::unsupported, "wgmma operations in flight across a function call: wait for them within the function");
  }
  const int a_registers = shape.a_in_registers ? 4 : 1;
  const Offset* const a = i.operand + shape.d_registers;
  const Offset* const b = a + a_registers;
  for (int k = 0; k <= a_registers; ++k) {  // A and the descriptors
    const auto* e = state.flight.find(a[k]);
    if (e && e->value)
      w.fail(Kind::in_flight, "operand A or B reads an accumulator in flight of " + place_of(w, *e->value->shape));
  }
  const uint64_t a_bits = shape.a_in_registers ? 0 : descriptor(w, *a, "a-desc"), b_bits = descriptor(w, *b, "b-desc");
  const Mask scale = w.predicate(b[1]) ^ (shape.scale_d_negated ? kAllLanes : 0);
  if (scale && scale != kAllLanes) w.fail(Kind::illegal, "scale-d differs between the lanes of a warp");

  WgmmaOperation& op = meet(w, state, i, shape);
  if (!op.issued) {
    op.a_descriptor = a_bits;
    op.b_descriptor = b_bits;
    op.scale_d = scale != 0;
  } else if (op.a_descriptor != a_bits || op.b_descriptor != b_bits || op.scale_d != (scale != 0)) {
    w.fail(Kind::illegal, std::string(op.scale_d != (scale != 0) ? "scale-d" : "a matrix descriptor") +
                              " differs between the warps of a warpgroup");
  }
  WgmmaOperation::Part& part = op.part[w.id % 4];
  take_accumulators(w, state, i, shape, op, part);
  if (shape.a_in_registers) {
    for (int r = 0; r < 4; ++r) {
      std::memcpy(part.a[r], w.at<uint32_t>(a[r]), sizeof part.a[r]);
      const auto* e = state.flight.find(a[r]);
      if (e && e->value) w.fail(Kind::in_flight, "a register is in both A and D");
      state.flight.reads(a[r], op.number, &shape);
    }
  }
  if (checked(*w.cta)) require_wgmma_fence(w, i);
  part.knowledge = w.knowledge;
  w.release();
  w.watched = true;
  ++state.issued;
  state.now = op.now;
  op.issued |= 1u << w.id % 4;
  ++w.effects;
  if (Execution* e = w.cta->launch->execution) e->phase(warpgroup_object(*w.cta, w.id / 4), op.number, Touch::arrive);
  if (op.issued == 15) w.cta->cluster->happened();
  return Step::next;
}

Step fence(Warp& w, const Instruction&, Mask mask) {
  require_whole_warp(w, mask);
  return Step::next;
}

Step commit_group(Warp& w, const Instruction&, Mask mask) {
  require_whole_warp(w, mask);
  Wgmma& state = state_of(w);
  state.groups.push_back({state.issued, state.now});
  return Step::next;
}

Step wait_group(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  if (!w.wgmma || w.wgmma->groups.size() <= i.immediate) return Step::next;
  Wgmma& state = *w.wgmma;
  const size_t done = state.groups.size() - i.immediate;
  const auto [last, now] = state.groups[done - 1];
  if (!complete_until(w, last)) return Step::blocked;
  if (Execution* e = w.cta->launch->execution) e->phase(warpgroup_object(*w.cta, w.id / 4), last + 1, Touch::pass);
  if (!state.flight.empty()) {
    if (state.frame != w.frame) {
      w.fail(Kind::unsupported, "wgmma operations in flight across a function call: wait for them within the function");
    }
    state.flight.land(last, w.frame->registers);
    update_watched(w);
  }
  if (now) w.knowledge.join(learnt(state.group->series, now));
  state.groups.erase(state.groups.begin(), state.groups.begin() + done);
  return Step::next;
}

}  // namespace

bool complete_until(Warp& w, uint64_t operation) {
  Warpgroup& group = *w.wgmma->group;
  while (group.completed < operation) {
    WgmmaOperation& next = *group.pending.front();
    if (next.issued != 15) return false;
    w.cta->cluster->complete(next);
  }
  return true;
}

bool is_wgmma_fence(const Instruction& i) { return i.run == &fence; }

bool same_shape(const WgmmaShape& a, const WgmmaShape& b) { return a.n == b.n && a.k == b.k && a.exact.d == b.exact.d; }

bool WgmmaOperation::ready(Cta&) const { return issued == 15 && group->completed + 1 == number; }

void WgmmaOperation::complete(Cta& cta) {
  const Product& product = cta.launch->options.truncating ? shape->truncating : shape->exact;
  const int tiles = shape->n / 8;
  static thread_local PanelA panel_a;
  static thread_local PanelB panel_b;
  alignas(64) static thread_local uint32_t fragments[kMaxTiles][2][kLanes];
  const auto actor = [&](const Knowledge& k) {
    return Actor{group->series, now, &k, Proxy::async, static_cast<uint32_t>(shape->statement->line), {}};
  };

  for (Part& p : part) cta.cluster->complement(p.knowledge);
  // Every warp reads B: what is written there must be known to all four. A warp's rows of A need be known to it alone.
  Knowledge common = part[0].knowledge;
  for (int q = 1; q < 4; ++q) common.meet(part[q].knowledge);
  gather(cta, MatrixDescriptor(b_descriptor), shape->b_transposed, 0, tiles, actor(common), fragments);
  {
    Fragment b[kMaxTiles * 2];
    for (int t = 0; t < tiles * 2; ++t) b[t] = fragments[t / 2][t % 2];
    const MatrixTimer timer(cta, static_cast<uint64_t>(64) * shape->n * shape->k);
    expand_b(product, b, tiles, panel_b);
  }
  for (int q = 0; q < 4; ++q) {
    Part& p = part[q];
    Fragment a[4];
    if (shape->a_in_registers) {
      for (int r = 0; r < 4; ++r) a[r] = p.a[r];
    } else {
      gather(cta, MatrixDescriptor(a_descriptor), shape->a_transposed, q * 2, 2, actor(p.knowledge), fragments);
      for (int r = 0; r < 4; ++r) a[r] = fragments[r % 2][r / 2];
    }
    const size_t bytes = static_cast<size_t>(shape->d_registers) * kLanes * 4;
    if (!p.from) {
      std::memset(p.to->values, 0, bytes);
    } else if (p.from != p.to) {
      std::memcpy(p.to->values, p.from->values, bytes);
    }
    const MatrixTimer timer(cta, 0);
    expand_a(product, a, panel_a);
    multiply(product, panel_a, panel_b, tiles, p.to->values);
  }
  for (Part& p : part) p.from = p.to = nullptr;
  ++group->completed;
  group->pending.pop_front();
}

namespace {

int sign(const Bind& b, int operand) {
  const int64_t value = b.constant(b.operand(operand));
  if (value != 1 && value != -1) b.refuse(b.statement.opcode + ": imm-scale-a and imm-scale-b are 1 or -1");
  return static_cast<int>(value);
}
bool transposed(const Bind& b, int operand) {
  const int64_t value = b.constant(b.operand(operand));
  if (value != 0 && value != 1) b.refuse(b.statement.opcode + ": imm-trans-a and imm-trans-b are 0 or 1");
  return value == 1;
}

void require_sm_90a(const Bind& b) {
  if (b.module.arch == "sm_90a") return;
  b.refuse(b.statement.opcode + " needs sm_90a, and this PTX is for " + b.module.arch + ": compile it for sm_90a");
}

// Operands: d, a-desc or {a}, b-desc, scale-d; floating point: imm-scale-a, imm-scale-b; 16-bit: imm-trans-a where A
// has a descriptor, imm-trans-b.
void bind_mma_async(Bind& b) {
  require_sm_90a(b);
  const bool integer = b.has("s32");
  const int d = integer ? 6 : 5;
  const Shape dimensions = shape_of(b.slot(4));
  b.instruction.asynchronous = true;
  WgmmaShape& shape = b.data<WgmmaShape>();
  shape.n = dimensions.n;
  shape.k = dimensions.k;
  shape.statement = &b.statement;
  shape.a_in_registers = b.operand(1).kind == Operand::Kind::vector;
  Product& p = shape.exact;
  p.d = accumulate_of(b, d);
  p.a = element_of(b, d + 1);
  p.b = element_of(b, d + 2);
  p.halves = 2;
  p.saturate = b.has("satfinite");
  shape.d_registers = shape.n / (p.d == Accumulate::f16 ? 4 : 2);
  const bool may_transpose = p.a == Element::f16 || p.a == Element::bf16;
  expect_operands(b, 4 + (integer ? 0 : 2) + (may_transpose ? shape.a_in_registers ? 1 : 2 : 0));
  if (!integer) p.negate = sign(b, 4) * sign(b, 5) < 0;
  shape.a_transposed = may_transpose && !shape.a_in_registers && transposed(b, 6);
  shape.b_transposed = may_transpose && transposed(b, b.operands() - 1);
  shape.truncating = p;
  if (is_fp8(p.a)) shape.truncating.truncation = {shape.k, 13, 13};

  for (const Operand& o : registers_of(b, 0, shape.d_registers)) destination(b, o, Type::b32);
  if (shape.a_in_registers) {
    for (const Operand& o : registers_of(b, 1, 4)) b.source(o, Type::b32);
  } else {
    b.source(1, Type::b64);
  }
  b.source(2, Type::b64);
  shape.scale_d_negated = b.predicate(b.operand(3));
  b.run(&mma_async);
}

template <Step (*handler)(Warp&, const Instruction&, Mask)>
void bind_plain(Bind& b) {
  require_sm_90a(b);
  b.run(handler);
}

void bind_wait_group(Bind& b) {
  require_sm_90a(b);
  expect_operands(b, 1);
  const int64_t n = b.constant(b.operand(0));
  if (n < 0 || n > 7) b.refuse(b.statement.opcode + " " + std::to_string(n) + ": the number of groups is 0 to 7");
  b.instruction.immediate = static_cast<uint64_t>(n);
  b.run(&wait_group);
}

void refuse_binary(Bind& b) {
  b.refuse(b.statement.opcode + ": products of single bits are not supported; use s8 or u8");
}
void refuse_sparse(Bind& b) {
  b.refuse(b.statement.opcode + ": sparse products are not supported; use wgmma.mma_async");
}

// clang-format off
#define GPULESS_N8_TO_32(k) "m64n8k" k "|m64n16k" k "|m64n24k" k "|m64n32k" k
#define GPULESS_N48_TO_256_BY_16(k) "|m64n48k" k "|m64n64k" k "|m64n80k" k "|m64n96k" k "|m64n112k" k "|m64n128k" k \
  "|m64n144k" k "|m64n160k" k "|m64n176k" k "|m64n192k" k "|m64n208k" k "|m64n224k" k "|m64n240k" k "|m64n256k" k
#define GPULESS_N40_TO_248_BY_16(k) "|m64n40k" k "|m64n56k" k "|m64n72k" k "|m64n88k" k "|m64n104k" k "|m64n120k" k \
  "|m64n136k" k "|m64n152k" k "|m64n168k" k "|m64n184k" k "|m64n200k" k "|m64n216k" k "|m64n232k" k "|m64n248k" k
#define GPULESS_INTEGER_SHAPES(k) GPULESS_N8_TO_32(k) GPULESS_N48_TO_256_BY_16(k)
#define GPULESS_SHAPES(k) GPULESS_INTEGER_SHAPES(k) GPULESS_N40_TO_248_BY_16(k)
// clang-format on

constexpr char kSection[] = "9.7.15.5.2";

const Row rows[] = {
    {"wgmma.mma_async.sync.aligned." GPULESS_SHAPES("16") ".f16|f32.f16.f16", kSection, bind_mma_async},
    {"wgmma.mma_async.sync.aligned." GPULESS_SHAPES("16") ".f32.bf16.bf16", kSection, bind_mma_async},
    {"wgmma.mma_async.sync.aligned." GPULESS_SHAPES("8") ".f32.tf32.tf32", kSection, bind_mma_async},
    {"wgmma.mma_async.sync.aligned." GPULESS_SHAPES("32") ".f16|f32.e4m3|e5m2.e4m3|e5m2", kSection, bind_mma_async},
    {"wgmma.mma_async.sync.aligned." GPULESS_INTEGER_SHAPES("32") ".satfinite?.s32.s8|u8.s8|u8.satfinite?", kSection,
     bind_mma_async},
    {"wgmma.mma_async.sync.aligned." GPULESS_INTEGER_SHAPES("256") ".s32.b1.b1.and.popc", kSection, refuse_binary},
    {"wgmma.mma_async.sp.sync.aligned." GPULESS_SHAPES("16") "|" GPULESS_SHAPES("32") "|" GPULESS_SHAPES(
         "64") ".satfinite?.f16|f32|s32.f16|bf16|tf32|e4m3|e5m2|s8|u8.f16|bf16|tf32|e4m3|e5m2|s8|u8.satfinite?",
     "9.7.15.6.3", refuse_sparse},
    {"wgmma.fence.sync.aligned", "9.7.15.7.1", bind_plain<fence>},
    {"wgmma.commit_group.sync.aligned", "9.7.15.7.2", bind_plain<commit_group>},
    {"wgmma.wait_group.sync.aligned", "9.7.15.7.3", bind_wait_group},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
