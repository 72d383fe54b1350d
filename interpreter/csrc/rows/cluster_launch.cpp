// clusterlaunchcontrol, ISA 9.7.13.17 and 9.7.13.18: a cluster cancels another of its grid that has not begun, to do
// its work. Which clusters can be cancelled the seed decides (Launch::may_be_cancelled); the answer has a layout of our
// own.
#include "mbarrier.h"
#include "rows/async.h"
#include "rows/matrix_rows.h"

namespace gpuless {
namespace {

struct Answer {
  uint32_t first_cta[3];
  uint32_t cancelled;  // kCancelled, or 0
};
constexpr uint32_t kCancelled = 0xca9ce1;
constexpr uint32_t kBytes = sizeof(Answer);

struct Form {
  Place answer, mbarrier;
  bool everywhere = false;  // .multicast::cluster::all
};

// The answer on its way to one CTA.
struct Request final : Pending {
  Cta* target = nullptr;
  uint32_t to = 0, mbarrier = 0;
  int series = 0;
  Answer answer;

  void complete(Cta& cta) override {
    const Actor actor = completing(*this, series);
    if (target != &cta) target->visited(actor);
    std::memcpy(target->shared.data() + to, &answer, kBytes);
    if (checked(cta)) target->shadow.land(actor, to, kBytes);
    MBarrier& b = mbarrier_at(*target, mbarrier);
    b.gathering.join(learnt(series, actor.now));
    b.complete_transactions(*target, kBytes);
  }
};

Answer cancel(Cluster& cluster) {
  const Launch& launch = *cluster.launch;
  Answer answer = {};
  if (!launch.may_be_cancelled(cluster.successor)) return answer;
  launch.index_of(cluster.successor++ * launch.cluster_size(), answer.first_cta);
  answer.cancelled = kCancelled;
  return answer;
}

Step try_cancel(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Form*>(i.data);
  uint64_t to[kLanes], mbarrier[kLanes];
  form.answer.read(w, i, to);
  form.mbarrier.read(w, i, mbarrier);
  Cluster& cluster = *w.cta->cluster;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    Request request;
    request.instruction = &i;
    request.code = w.frame->code;
    request.warp = w.id;
    request.to = shared_offset(w, form.answer, to[l], kBytes, kBytes, l, "the answer of try_cancel");
    request.mbarrier = shared_offset(w, form.mbarrier, mbarrier[l], 8, 8, l, "an mbarrier");
    request.answer = cancel(cluster);
    for (uint64_t rank = 0; rank < w.cta->launch->cluster_size(); ++rank) {
      Cta& target = *cluster.ctas[rank];
      if (&target != w.cta && !form.everywhere) continue;
      auto one = std::make_shared<Request>(request);
      one->target = &target;
      use_mbarrier(w, target, one->mbarrier, false);
      one->series = target.arrivals_at(one->mbarrier);
      const Actor actor = cluster.issued(w, one->series, Proxy::async);
      if (&target != w.cta) target.visited(actor);
      if (checked(target)) target.shadow.take_off(actor, one->to, kBytes);
      std::memset(target.shared.data() + one->to, kPoison, kBytes);
      w.cta->add(std::move(one));
    }
  }
  return Step::next;
}

// Word n of the answer that a lane holds.
uint32_t word(const uint64_t* answer, int lane, int n) {
  return static_cast<uint32_t>(answer[n / 2 * kLanes + lane] >> n % 2 * 32);
}

Step is_canceled(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t* answer = w.operand<uint64_t>(i, 1);
  Mask& result = *w.operand<Mask>(i, 0);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const uint32_t cancelled = word(answer, l, 3);
    if (cancelled && cancelled != kCancelled) w.fail(Kind::illegal, "this is no answer of try_cancel", l);
    result = (result & ~(Mask{1} << l)) | Mask{cancelled != 0} << l;
  }
  return Step::next;
}

// Instruction::option: the first dimension.
Step first_cta(Warp& w, const Instruction& i, Mask mask) {
  const uint64_t* answer = w.operand<uint64_t>(i, i.destinations);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (word(answer, l, 3) != kCancelled)
      w.fail(Kind::illegal, "the request has cancelled nothing: is_canceled is false", l);
    for (int d = 0; d < i.destinations; ++d) {
      if (i.operand[d] != kSink)
        w.operand<uint32_t>(i, d)[l] = d < 3 ? word(answer, l, d + static_cast<int>(i.option)) : 0;
    }
  }
  return Step::next;
}

void bind_try_cancel(Bind& b) {
  require_capability(b, 100);
  expect_operands(b, 2);
  auto& form = b.data<Form>();
  for (Place* place : {&form.answer, &form.mbarrier}) {
    place->operand = b.instruction.sources;
    place->displacement = b.address(b.operand(place == &form.mbarrier), &place->wide);
    place->generic = !b.has("shared::cta");
  }
  form.everywhere = b.has("multicast::cluster::all");
  b.run(&try_cancel);
}

void bind_is_canceled(Bind& b) {
  require_capability(b, 100);
  expect_operands(b, 2);
  destination(b, b.operand(0), Type::pred);
  b.source(1, Type::b128);
  b.run(&is_canceled);
}

void bind_first_cta(Bind& b) {
  require_capability(b, 100);
  expect_operands(b, 2);
  const bool all = b.has("v4");
  for (const Operand& o : registers_of(b, 0, all ? 4 : 1)) b.destination(o, Type::b32);
  b.source(1, Type::b128);
  if (!all) b.instruction.option = b.slot(2).back() - 'x';
  b.run(&first_cta);
}

const Row rows[] = {
    {"clusterlaunchcontrol.try_cancel.async.shared::cta?.mbarrier::complete_tx::bytes.multicast::cluster::all?.b128",
     "9.7.13.17", bind_try_cancel},
    {"clusterlaunchcontrol.query_cancel.is_canceled.pred.b128", "9.7.13.18", bind_is_canceled},
    {"clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128", "9.7.13.18", bind_first_cta},
    {"clusterlaunchcontrol.query_cancel.get_first_ctaid::x|get_first_ctaid::y|get_first_ctaid::z.b32.b128", "9.7.13.18",
     bind_first_cta},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
