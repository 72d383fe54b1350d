// cp.async.bulk and cp.async.bulk.tensor, tile mode (ISA 9.7.9.25.4, 9.7.9.25.5): transfers between global and shared
// memory in the async proxy. To the race check each is an agent of its own.
#include <algorithm>

#include "../mbarrier.h"
#include "../table.h"
#include "../tensor_map.h"
#include "async.h"

namespace forwardpass::interpreter {
namespace {

// One transfer of one thread.
struct Transfer : Pending {
  bool load = true, tensor = false;
  uint32_t shared = 0, bytes = 0;
  uint8_t* global = nullptr;  // of one that is not a tensor's
  TensorMap map;
  int32_t at[TensorMap::kMaxRank];
  int agent = 0;
  uint32_t mbarrier = 0;  // load
  Clock read_time = 0;    // store: of the shared memory that it reads
  bool has_read = false;
  std::vector<uint8_t> data;  // store: what it has read, as rows of the box

  // f(shared offset before swizzling, begin, end, global address), the range as one row where there is no tensor.
  template <class F>
  void each_row(F f) const {
    if (tensor) {
      map.each_row(at, f);
    } else {
      f(0u, 0u, bytes, reinterpret_cast<uint64_t>(global));
    }
  }
  uint32_t row_bytes() const { return tensor ? map.row_bytes() : bytes; }

  // f(shared address, offset within the row, bytes) over a part of a row: whole where it is not swizzled, else by the
  // chunks of 16 bytes.
  template <class F>
  void pieces(uint32_t offset, uint32_t begin, uint32_t end, F f) const {
    if (!tensor || !map.swizzle) {
      if (begin < end) f(shared + offset + begin, begin, end - begin);
      return;
    }
    for (uint32_t from = begin, to; from < end; from = to) {
      to = std::min(end, (from / 16 + 1) * 16);
      f(map.swizzled(shared + offset + from), from, to - from);
    }
  }

  void arrive(Cta& cta) {
    uint8_t* memory = cta.shared.data();
    std::vector<uint8_t> row(tensor ? row_bytes() : 0);
    each_row([&](uint32_t offset, uint32_t begin, uint32_t end, uint64_t address) {
      const auto* source = reinterpret_cast<const uint8_t*>(address);
      if (!tensor) {
        std::memcpy(memory + shared, source, bytes);
        return;
      }
      std::memcpy(row.data() + begin, source, end - begin);
      map.finish_row(row.data(), begin, end);
      pieces(offset, 0, row_bytes(),
             [&](uint32_t to, uint32_t from, uint32_t n) { std::memcpy(memory + to, row.data() + from, n); });
    });
    const Clock time = completion_time(cta, agent);
    if (checked(cta)) cta.shadow.land(acting(*this, cta.cluster->async_actor(agent)), shared, bytes);
    MBarrier& b = mbarrier_at(cta, mbarrier);
    b.gathering.join(learnt(agent, time));
    b.complete_transactions(cta, bytes);
  }

  // The shared memory of a store has been read: it may be written again by whoever learns of it.
  void read(Cta& cta) {
    if (has_read) return;
    has_read = true;
    data.resize(bytes);
    each_row([&](uint32_t offset, uint32_t begin, uint32_t end, uint64_t) {
      pieces(offset, begin, end, [&](uint32_t from, uint32_t to, uint32_t n) {
        std::memcpy(data.data() + offset + to, cta.shared.data() + from, n);
      });
    });
  }

  void complete(Cta& cta) override {
    if (load) return arrive(cta);
    read(cta);
    each_row([&](uint32_t offset, uint32_t begin, uint32_t end, uint64_t address) {
      std::memcpy(reinterpret_cast<uint8_t*>(address), data.data() + offset + begin, end - begin);
    });
  }
};

}  // namespace

// Bulk async-groups (ISA 9.7.9.25.6): the stores of each thread that it has not waited for.
struct Bulk {
  struct Entry {
    int lane;
    uint64_t group;
    std::shared_ptr<Transfer> store;
  };
  uint64_t committed[kLanes] = {};
  std::vector<Entry> entries;
};

namespace {

Bulk& state_of(Warp& w) {
  if (!w.bulk) w.bulk = std::make_shared<Bulk>();
  return *w.bulk;
}

enum class Direction : uint8_t { load, store, prefetch };

struct Form {
  Direction direction = Direction::load;
  bool tensor = false;
  int rank = 0, coordinates = 0;   // coordinates: operand of the first
  Place shared, global, mbarrier;  // global: the tensor map's, of a tensor
  int size = 0;                    // operand, of one that is not a tensor's
};

constexpr uint32_t kBulkAlignment = 16, kTensorAlignment = 128;

// The global memory that it touches must be there.
void check_global(Warp& w, Transfer& t, Use use, int lane) {
  if (!t.tensor) {
    if (t.bytes) t.global = access_global(w, reinterpret_cast<uint64_t>(t.global), t.bytes, use, lane);
    return;
  }
  uint64_t first = 0, last = 0;  // rows that follow each other are one range
  const auto check = [&] {
    if (first != last) access_global(w, first, last - first, use, lane);
  };
  t.each_row([&](uint32_t, uint32_t begin, uint32_t end, uint64_t address) {
    if (begin == end) return;
    if (address != last) {
      check();
      first = address;
    }
    last = address + (end - begin);
  });
  check();
}

void issue_load(Warp& w, const Form& form, Transfer& t, uint64_t mbarrier, int lane) {
  Cta& cta = *w.cta;
  t.mbarrier = shared_offset(w, form.mbarrier, mbarrier, 8, 8, lane, "an mbarrier");
  mbarrier_at(cta, t.mbarrier);
  t.agent = cta.cluster->async_agent(w);
  check_global(w, t, Use::read, lane);
  if (!checked(cta)) return;
  cta.shadow.use_mbarrier(w.actor(), t.mbarrier);
  cta.shadow.take_off(cta.cluster->async_actor(t.agent), t.shared, t.bytes);
  std::memset(cta.shared.data() + t.shared, kPoison, t.bytes);
}

void issue_store(Warp& w, Transfer& t, int lane) {
  Cta& cta = *w.cta;
  t.agent = cta.cluster->async_agent(w);
  t.read_time = cta.cluster->async_now(t.agent);
  check_global(w, t, Use::write, lane);
  if (!checked(cta)) return;
  t.each_row([&](uint32_t offset, uint32_t begin, uint32_t end, uint64_t) {
    t.pieces(offset, begin, end,
             [&](uint32_t from, uint32_t, uint32_t n) { cta.shadow.read(cta.cluster->async_actor(t.agent), from, n); });
  });
}

Step transfer(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Form*>(i.data);
  uint64_t shared[kLanes], global[kLanes], mbarrier[kLanes];
  form.global.read(w, i, global);
  if (form.direction != Direction::prefetch) form.shared.read(w, i, shared);
  if (form.direction == Direction::load) form.mbarrier.read(w, i, mbarrier);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    auto t = std::make_shared<Transfer>();
    t->instruction = &i;
    t->code = w.frame->code;
    t->warp = w.id;
    t->load = form.direction == Direction::load;
    t->tensor = form.tensor;
    if (form.tensor) {
      t->map = read_tensor_map(w, global[l], form.rank, l);
      for (int d = 0; d < form.rank; ++d) t->at[d] = w.operand<int32_t>(i, form.coordinates + d)[l];
      t->bytes = t->map.box_bytes();
    } else {
      t->bytes = w.operand<uint32_t>(i, form.size)[l];
      if (t->bytes % 16) {
        w.fail(Kind::illegal, "the size must be a multiple of 16 bytes, not " + std::to_string(t->bytes), l);
      }
      if (global[l] % kBulkAlignment) {
        w.fail_at(Kind::misaligned, "the global address of a bulk copy must be aligned to 16 bytes", l, global[l]);
      }
      t->global = reinterpret_cast<uint8_t*>(global[l]);
    }
    if (form.direction == Direction::prefetch) {
      check_global(w, *t, Use::read, l);
      continue;
    }
    t->shared = shared_offset(w, form.shared, shared[l], t->bytes, form.tensor ? kTensorAlignment : kBulkAlignment, l,
                              "the shared memory of a bulk copy");
    if (t->load) {
      issue_load(w, form, *t, mbarrier[l], l);
    } else {
      issue_store(w, *t, l);
      Bulk& bulk = state_of(w);
      bulk.entries.push_back({l, bulk.committed[l], t});
    }
    w.cta->add(std::move(t));
  }
  return Step::next;
}

Step commit_group(Warp& w, const Instruction&, Mask mask) {
  Bulk& bulk = state_of(w);
  for (Mask rest = mask; rest; rest &= rest - 1) ++bulk.committed[__builtin_ctz(rest)];
  return Step::next;
}

// Waits for all groups of each lane but the last few: for their reads alone, or until they are complete.
template <bool read>
Step wait_group(Warp& w, const Instruction& i, Mask mask) {
  if (!w.bulk) return Step::next;
  auto& entries = w.bulk->entries;
  const auto over = [&](const Bulk::Entry& e) {
    if (!(mask >> e.lane & 1) || e.group + i.immediate >= w.bulk->committed[e.lane]) return false;
    if (read) {
      e.store->read(*w.cta);
    } else {
      w.cta->cluster->complete(*e.store);
    }
    w.knowledge.join(learnt(e.store->agent, e.store->read_time));
    return e.store->done;  // one that is only read may be waited for again
  };
  entries.erase(std::remove_if(entries.begin(), entries.end(), over), entries.end());
  return Step::next;
}

void bind_place(Bind& b, Place& place, const Operand& o, bool generic = false) {
  place.operand = b.instruction.sources;
  place.displacement = b.address(o, &place.wide);
  place.generic = generic;
}

// [map, {coordinates}]
void bind_map(Bind& b, Form& form, const Operand& o) {
  form.tensor = true;
  for (const char* dim : {"1d", "2d", "3d", "4d", "5d"}) {
    if (b.has(dim)) form.rank = dim[0] - '0';
  }
  if (o.kind != Operand::Kind::address || o.parts.size() != 2) b.refuse("expected [tensor map, {coordinates}]");
  bind_place(b, form.global, o, true);
  const Operand& at = o.parts[1];
  const bool list = at.kind == Operand::Kind::vector;
  if ((list ? static_cast<int>(at.parts.size()) : 1) != form.rank) {
    b.refuse("expected " + std::to_string(form.rank) + " coordinates");
  }
  form.coordinates = b.instruction.sources;
  for (int d = 0; d < form.rank; ++d) b.source(list ? at.parts[d] : at, Type::b32);
}

// The cache policy comes last and has no effect on what is copied.
void bind_policy(Bind& b, int operands, const char* expected) {
  const int policy = b.has("L2::cache_hint") ? 1 : 0;
  if (b.operands() != operands + policy) {
    b.refuse(std::string("expected ") + expected + " and with .L2::cache_hint a cache-policy");
  }
  if (policy) b.source(operands, Type::b64);
  b.run(&transfer);
}

void bind_load(Bind& b) {
  auto& form = b.data<Form>();
  bind_place(b, form.shared, b.operand(0));
  bind_place(b, form.global, b.operand(1));
  form.size = b.instruction.sources;
  b.source(2, Type::b32);
  bind_place(b, form.mbarrier, b.operand(3));
  bind_policy(b, 4, "[dst], [src], size, [mbarrier]");
}

void bind_store(Bind& b) {
  auto& form = b.data<Form>();
  form.direction = Direction::store;
  bind_place(b, form.global, b.operand(0));
  bind_place(b, form.shared, b.operand(1));
  form.size = b.instruction.sources;
  b.source(2, Type::b32);
  bind_policy(b, 3, "[dst], [src], size");
}

void bind_prefetch(Bind& b) {
  auto& form = b.data<Form>();
  form.direction = Direction::prefetch;
  bind_place(b, form.global, b.operand(0));
  form.size = b.instruction.sources;
  b.source(1, Type::b32);
  bind_policy(b, 2, "[src], size");
}

void bind_tensor_load(Bind& b) {
  auto& form = b.data<Form>();
  bind_place(b, form.shared, b.operand(0));
  bind_map(b, form, b.operand(1));
  bind_place(b, form.mbarrier, b.operand(2));
  bind_policy(b, 3, "[dst], [tensor map, {coordinates}], [mbarrier]");
}

void bind_tensor_store(Bind& b) {
  auto& form = b.data<Form>();
  form.direction = Direction::store;
  bind_map(b, form, b.operand(0));
  bind_place(b, form.shared, b.operand(1));
  bind_policy(b, 2, "[tensor map, {coordinates}], [src]");
}

void bind_tensor_prefetch(Bind& b) {
  auto& form = b.data<Form>();
  form.direction = Direction::prefetch;
  bind_map(b, form, b.operand(0));
  bind_policy(b, 1, "[tensor map, {coordinates}]");
}

template <bool read>
void bind_wait(Bind& b) {
  const int64_t n = b.operands() == 1 ? b.constant(b.operand(0)) : -1;
  if (n < 0) b.refuse("expected the number of groups that may stay under way");
  b.instruction.immediate = static_cast<uint64_t>(n);
  b.run(&wait_group<read>);
}

template <int feature>
void refuse(Bind& b) {
  constexpr const char* why[] = {
      "multicast needs clusters of several CTAs, which are not supported yet; load into each CTA by itself",
      "copies to the shared memory of another CTA of the cluster are not supported yet; go through global memory",
      "bulk reductions are not supported yet; use red or atom, or a bulk copy into memory of its own",
      "im2col, gather and scatter modes are not supported; use tile mode"};
  b.refuse(why[feature]);
}
constexpr auto refuse_multicast = refuse<0>, refuse_distributed = refuse<1>, refuse_reduction = refuse<2>,
               refuse_mode = refuse<3>;

#define DIMENSIONS "1d|2d|3d|4d|5d"
#define MBARRIER "mbarrier::complete_tx::bytes"
#define MODES "im2col|im2col::w|im2col::w::128|im2col_no_offs|tile::gather4|tile::scatter4"
#define OPERATIONS "add|min|max|inc|dec|and|or|xor"
const Row rows[] = {
    {"cp.async.bulk.shared::cluster|shared::cta.global." MBARRIER ".L2::cache_hint?", "9.7.9.25.4.1", bind_load},
    {"cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint?", "9.7.9.25.4.1", bind_store},
    {"cp.async.bulk.prefetch.L2.global.L2::cache_hint?", "9.7.9.25.4.3", bind_prefetch},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster|shared::cta.global.tile?." MBARRIER ".L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor." DIMENSIONS ".global.shared::cta.tile?.bulk_group.L2::cache_hint?", "9.7.9.25.5.2",
     bind_tensor_store},
    {"cp.async.bulk.prefetch.tensor." DIMENSIONS ".L2.global.tile?.L2::cache_hint?", "9.7.9.25.5.4",
     bind_tensor_prefetch},
    {"cp.async.bulk.shared::cluster.global." MBARRIER ".multicast::cluster.L2::cache_hint?", "9.7.9.25.4.1",
     refuse_multicast},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.tile|" MODES "?." MBARRIER
     ".multicast::cluster.L2::cache_hint?",
     "9.7.9.25.5.2", refuse_multicast},
    {"cp.async.bulk.shared::cluster.shared::cta." MBARRIER, "9.7.9.25.4.1", refuse_distributed},
    {"cp.reduce.async.bulk.shared::cluster|global.shared::cta." MBARRIER "|bulk_group.L2::cache_hint?." OPERATIONS
     ".noftz?.f16|bf16|b32|u32|s32|b64|u64|s64|f32|f64",
     "9.7.9.25.4.2", refuse_reduction},
    {"cp.reduce.async.bulk.tensor." DIMENSIONS ".global.shared::cta." OPERATIONS ".tile|" MODES
     "?.bulk_group.L2::cache_hint?",
     "9.7.9.25.5.3", refuse_reduction},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster|shared::cta.global." MODES "." MBARRIER ".L2::cache_hint?",
     "9.7.9.25.5.2", refuse_mode},
    {"cp.async.bulk.tensor." DIMENSIONS ".global.shared::cta." MODES ".bulk_group.L2::cache_hint?", "9.7.9.25.5.2",
     refuse_mode},
    {"cp.async.bulk.prefetch.tensor." DIMENSIONS ".L2.global." MODES ".L2::cache_hint?", "9.7.9.25.5.4", refuse_mode},
    {"cp.async.bulk.commit_group", "9.7.9.25.6.1", [](Bind& b) { b.run(&commit_group); }},
    {"cp.async.bulk.wait_group.read", "9.7.9.25.6.2", bind_wait<true>},
    {"cp.async.bulk.wait_group", "9.7.9.25.6.2", bind_wait<false>},
};
const Register registered(rows);

}  // namespace
}  // namespace forwardpass::interpreter
