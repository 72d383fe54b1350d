// st.async and red.async (ISA 9.7.9.12, 9.7.13.7): stores and reductions in the shared memory of a CTA of the cluster,
// each lane's told to an mbarrier there by its bytes. In the generic proxy; to the race check those that are told to
// one mbarrier are a series.
#include "../mbarrier.h"
#include "../table.h"
#include "../timeline_trace.h"
#include "async.h"
#include "reductions.h"

namespace gpuless {
namespace {

constexpr int kMaxBytes = 16;

// The lanes of one instruction that name one mbarrier.
struct Store final : Pending {
  Mask lanes = 0;
  uint32_t bytes = 0;
  Cta* target = nullptr;
  uint32_t mbarrier = 0, to[kLanes];
  uint8_t values[kLanes][kMaxBytes];
  Reduce reduce = nullptr;
  int series = 0;

  void complete(Cta& cta) override {
    const Actor actor = completing(*this, series, Proxy::generic);
    if (target != &cta) target->visited(actor);
    for (Mask rest = lanes; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      uint8_t* const memory = target->shared.data() + to[l];
      // A reduction has counted as an atomic since it was issued: others may reduce the same elements.
      if (reduce) {
        reduce(memory, values[l], bytes);
      } else {
        std::memcpy(memory, values[l], bytes);
        if (checked(cta)) target->shadow.land(actor, to[l], bytes);
      }
      MBarrier& b = mbarrier_at(*target, mbarrier);
      b.gathering.join(learnt(series, actor.now));
      b.complete_transactions(*target, bytes);
    }
  }
};

struct Form {
  Place to, mbarrier;
  int first = 0, count = 1;  // operands of the values
  uint32_t element = 0;      // bytes
  Reduce reduce = nullptr;
};

Step store(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Form*>(i.data);
  uint64_t to[kLanes], mbarrier[kLanes];
  form.to.read(w, i, to);
  form.mbarrier.read(w, i, mbarrier);
  for (Mask left = mask; left;) {
    auto s = std::make_shared<Store>();
    s->instruction = &i;
    s->code = w.frame->code;
    s->warp = w.id;
    s->lanes = equal_lanes(mbarrier, left);
    left &= ~s->lanes;
    s->reduce = form.reduce;
    s->bytes = form.element * static_cast<uint32_t>(form.count);
    const int first = __builtin_ctz(s->lanes);
    const SharedRange barrier = shared_at(w, form.mbarrier, mbarrier[first], 8, 8, first, "an mbarrier");
    Cta& target = *(s->target = barrier.cta);
    s->mbarrier = barrier.offset;
    const MBarrier& object = use_mbarrier(w, target, s->mbarrier);
    s->series = target.arrivals_at(s->mbarrier);
    Actor actor = w.cta->cluster->issued(w, s->series, Proxy::generic);
    actor.lanes = w.lanes();
    for (Mask rest = s->lanes; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      const SharedRange there = shared_at(w, form.to, to[l], s->bytes, s->bytes, l, "the destination");
      if (there.cta != &target) {
        w.fail_at(Kind::illegal, "the mbarrier must lie in the shared memory of the CTA that has the destination", l,
                  mbarrier[l]);
      }
      s->to[l] = there.offset;
      for (int k = 0; k < form.count; ++k) {
        std::memcpy(s->values[l] + k * form.element,
                    w.operand<uint8_t>(i, form.first + k) + static_cast<size_t>(l) * form.element, form.element);
      }
      if (w.trace) w.trace->signal(Signal::Kind::copy, target, object, 0, s->bytes);
      if (!checked(target)) continue;
      actor.lanes.set = {Mask{1} << l, false};
      if (form.reduce) {
        target.shadow.atomic(actor, there.offset, s->bytes);
      } else {
        target.shadow.take_off(actor, there.offset, s->bytes);
        std::memset(target.shared.data() + there.offset, kPoison, s->bytes);
      }
    }
    w.cta->add(std::move(s));
  }
  return Step::next;
}

void bind_place(Bind& b, Place& place, const Operand& o) {
  place.operand = b.instruction.sources;
  place.displacement = b.address(o, &place.wide);
  place.generic = !b.has("shared::cluster");
  place.cluster = true;
}

// [address], value or {values}, [mbarrier]
void bind_store(Bind& b) {
  if (b.operands() != 3) b.refuse("expected [address], a value, [mbarrier]");
  auto& form = b.data<Form>();
  const Type type = b.type(b.slots() - 1);
  form.element = static_cast<uint32_t>(ptx::size_of(type));
  form.count = b.has("v4") ? 4 : b.has("v2") ? 2 : 1;
  if (form.count * form.element > kMaxBytes) b.refuse("vectors of more than 16 bytes do not exist");
  for (const char* operation : {"add", "min", "max", "inc", "dec", "and", "or", "xor"}) {
    if (b.has(operation)) form.reduce = reduction(operation, type);
  }
  bind_place(b, form.to, b.operand(0));
  form.first = b.instruction.sources;
  const Operand& values = b.operand(1);
  if ((values.kind == Operand::Kind::vector ? static_cast<int>(values.parts.size()) : 1) != form.count) {
    b.refuse("expected " + std::to_string(form.count) + " registers");
  }
  for (int k = 0; k < form.count; ++k) b.source(form.count > 1 ? values.parts[k] : values, type);
  bind_place(b, form.mbarrier, b.operand(2));
  b.run(&store);
}

#define TO "shared::cluster?.mbarrier::complete_tx::bytes."
const Row rows[] = {
    {"st.async.weak?." TO "v2|v4?.b32|b64|u32|u64|s32|s64|f32|f64", "9.7.9.12", bind_store},
    {"red.async.relaxed.cluster." TO "add.u32|s32|u64", "9.7.13.7", bind_store},
    {"red.async.relaxed.cluster." TO "min|max.u32|s32", "9.7.13.7", bind_store},
    {"red.async.relaxed.cluster." TO "inc|dec.u32", "9.7.13.7", bind_store},
    {"red.async.relaxed.cluster." TO "and|or|xor.b32", "9.7.13.7", bind_store},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
