// cp.async.bulk, cp.reduce.async.bulk and their tensor forms, tile modes and im2col (ISA 9.7.9.25.4, 9.7.9.25.5):
// transfers in the async proxy, to and from global memory and to other CTAs. To the race check those that one mbarrier
// is told of are a series, and the stores of a thread, whose groups it waits for in order.
#include "bulk.h"

#include <algorithm>

#include "../mbarrier.h"
#include "../tensor_map.h"
#include "../timeline_trace.h"

namespace gpuless {
namespace {

// One transfer of one thread, to one CTA.
struct Transfer : Pending {
  Direction direction = Direction::load;
  bool tensor = false;
  uint32_t shared = 0, bytes = 0;
  uint8_t* global = nullptr;  // of one that is not a tensor's
  Cta* target = nullptr;      // load, distribute: whose shared memory
  Cta* signalled = nullptr;   // and whose mbarrier: the target's, or that of its pair of CTAs
  uint32_t to = 0;            // distribute: where in it
  Reduce reduce = nullptr;    // store, distribute: in place of a copy
  uint64_t map_address = 0;
  TensorMap map;
  int32_t coordinates[TensorMap::kMaxRank];
  uint16_t offsets[TensorMap::kMaxRank - 2];  // im2col
  int boxes = 1;  // gather4, scatter4: 4 of one row each, whose numbers are the coordinates from 1 on
  int series = 0;
  Clock issued = 0;       // its time: from when on it reads the shared memory of a store
  uint32_t mbarrier = 0;  // load, distribute
  bool has_read = false;
  std::vector<uint8_t> data;  // store, distribute: what it has read, as rows of the box

  // f(shared offset before swizzling, begin, end, global address), the range as one row where there is no tensor.
  template <class F>
  void each_row(F f) const {
    if (!tensor) return f(0u, 0u, bytes, reinterpret_cast<uint64_t>(global));
    if (map.im2col) return map.each_pixel(coordinates, offsets, f);
    if (boxes == 1) return map.each_row(coordinates, f);
    for (int k = 0; k < boxes; ++k) {
      const int32_t row[] = {coordinates[0], coordinates[1 + k]};
      map.each_row(row, [&](uint32_t, uint32_t begin, uint32_t end, uint64_t address) {
        f(k * row_bytes(), begin, end, address);
      });
    }
  }
  uint32_t row_bytes() const { return tensor ? map.row_bytes() : bytes; }
  uint32_t transaction_bytes() const { return tensor ? boxes * map.transaction_bytes() : bytes; }

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

  // The bytes have arrived at their CTA, which is told by its mbarrier.
  template <class F>
  void arrive(Cta& cta, F write) {
    const Actor actor = completing(*this, series);
    if (target != &cta) target->visited(actor);
    write(target->shared.data());
    // A reduction has counted as an atomic since it was issued: others may reduce the same elements.
    if (checked(cta) && !reduce) target->shadow.land(actor, direction == Direction::load ? shared : to, bytes);
    MBarrier& b = mbarrier_at(*signalled, mbarrier);
    b.gathering.join(learnt(series, actor.now));
    b.complete_transactions(*signalled, transaction_bytes());
  }

  void load(uint8_t* memory) const {
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
    if (direction == Direction::load) return arrive(cta, [&](uint8_t* memory) { load(memory); });
    read(cta);
    if (direction == Direction::distribute) {
      return arrive(cta, [&](uint8_t* memory) { put(memory + to, data.data(), bytes); });
    }
    each_row([&](uint32_t offset, uint32_t begin, uint32_t end, uint64_t address) {
      put(reinterpret_cast<uint8_t*>(address), data.data() + offset + begin, end - begin);
    });
    data = {};
  }
  Use writes() const { return reduce ? Use::atomic : Use::write; }
  void put(uint8_t* memory, const uint8_t* from, uint32_t n) const {
    reduce ? reduce(memory, from, n) : static_cast<void>(std::memcpy(memory, from, n));
  }
};

}  // namespace

// Bulk async-groups (ISA 9.7.9.25.6): the stores of each thread that it has not waited for.
struct Bulk {
  struct Entry {
    int lane;
    uint64_t group;
    std::shared_ptr<Transfer> store;
    bool waited = false;  // for its reads at least
  };
  uint64_t committed[kLanes] = {};
  std::vector<Entry> entries;
  int series[kLanes];
  Bulk() { std::fill(std::begin(series), std::end(series), -1); }
};

namespace {

Bulk& state_of(Warp& w) {
  if (!w.bulk) w.bulk = std::make_shared<Bulk>();
  return *w.bulk;
}

constexpr uint32_t kBulkAlignment = 16, kTensorAlignment = 128;

// The global memory that it touches must be there.
void check_global(Warp& w, Transfer& t, Use use, int lane, bool under_way = false) {
  if (!t.tensor) {
    if (t.bytes) t.global = access_global(w, reinterpret_cast<uint64_t>(t.global), t.bytes, use, lane, under_way);
    return;
  }
  uint64_t first = 0, last = 0;  // rows that follow each other are one range
  const auto check = [&] {
    if (first != last) access_global(w, first, last - first, use, lane, under_way);
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

// The operation as it begins. Of what the lanes of its warp have done it knows what the issuing lane knows.
Actor issue(Warp& w, Transfer& t, int lane) {
  Actor actor = w.cta->cluster->issued(w, t.series, Proxy::async);
  t.issued = actor.now;
  actor.lanes = w.lanes();
  actor.lanes.set = {Mask{1} << lane, false};
  return actor;
}

// Its bytes are on their way to the target.
void send(Warp& w, const Transfer& t, uint32_t to, const Actor& actor) {
  Cta& target = *t.target;
  // The copy itself signals the mbarrier, and whoever waits there learns of the copy; nobody needs to learn of the
  // thread that issued it. (With CUTLASS's multicasts a receiving CTA exits once its consumers have their data.)
  const MBarrier& mbarrier = use_mbarrier(w, *t.signalled, t.mbarrier, false);
  if (w.trace) w.trace->signal(Signal::Kind::copy, *t.signalled, mbarrier, 0, t.transaction_bytes());
  if (&target != w.cta) target.visited(actor);
  if (!checked(target)) return;
  if (t.reduce) return target.shadow.atomic(actor, to, t.bytes);
  target.shadow.take_off(actor, to, t.bytes);
  std::memset(target.shared.data() + to, kPoison, t.bytes);
}

// It reads the CTA's shared memory, until it is waited for.
void take(Warp& w, const Transfer& t, const Actor& actor) {
  if (!checked(*w.cta)) return;
  t.each_row([&](uint32_t offset, uint32_t begin, uint32_t end, uint64_t) {
    t.pieces(offset, begin, end, [&](uint32_t from, uint32_t, uint32_t n) { w.cta->shadow.read(actor, from, n); });
  });
}

void count(Warp& w, const Transfer& t) {
  w.count->bulk_shared += t.bytes;
  if (t.direction == Direction::distribute) return;
  const bool load = t.direction == Direction::load;
  t.each_row(
      [&](uint32_t, uint32_t begin, uint32_t end, uint64_t address) { count_bulk(w, address, end - begin, load); });
}

Reduce tensor_reduction(Warp& w, std::string_view operation, const TensorMap& map, int lane) {
  const Reduce r = reduction_of_elements(operation, map.type);
  if (!r) {
    w.fail(Kind::illegal, "there is no ." + std::string(operation) + " of the tensor map's element type", lane);
  }
  return r;
}

// The offsets of an im2col copy, which share 16 bits.
void read_offsets(Warp& w, const Instruction& i, const BulkForm& form, Transfer& t, int lane) {
  const unsigned most = form.rank == 3 ? 0xffff : form.rank == 4 ? 0xff : 0x1f;
  for (int d = 0; d < form.rank - 2; ++d) {
    t.offsets[d] = w.operand<uint16_t>(i, form.offsets + d)[lane];
    if (t.offsets[d] > most) {
      w.fail(Kind::illegal,
             "an im2col offset is at most " + std::to_string(most) + " for rank " + std::to_string(form.rank) +
                 ", not " + std::to_string(t.offsets[d]),
             lane);
    }
  }
}

// What the lane's instruction transfers, but for where to.
Transfer described(Warp& w, const Instruction& i, const BulkForm& form, uint64_t global, int l) {
  Transfer t;
  t.instruction = &i;
  t.code = w.frame->code;
  t.warp = w.id;
  t.direction = form.direction;
  t.reduce = form.reduce;
  if (form.tensor) {
    t.tensor = true;
    t.map_address = global;
    t.map = read_tensor_map(w, global, form.rank, form.offsets >= 0, l);
    for (int d = 0; d < coordinates_of(form); ++d) t.coordinates[d] = w.operand<int32_t>(i, form.coordinates + d)[l];
    if (t.map.im2col) read_offsets(w, i, form, t, l);
    t.boxes = form.boxes;
    if (t.boxes > 1 && t.map.box[1] != 1) {
      w.fail(Kind::illegal,
             "gather4 and scatter4 take single rows: boxDim[1] of the tensor map must be 1, and it is " +
                 std::to_string(t.map.box[1]),
             l);
    }
    t.bytes = t.boxes * t.map.box_bytes();
    check_narrow(w, t.map, t.coordinates[0], form.direction == Direction::store, l);
    if (!form.operation.empty()) t.reduce = tensor_reduction(w, form.operation, t.map, l);
    return t;
  }
  t.bytes = w.operand<uint32_t>(i, form.size)[l];
  if (t.bytes % 16) {
    w.fail(Kind::illegal, "the size must be a multiple of 16 bytes, not " + std::to_string(t.bytes), l);
  }
  if (form.direction == Direction::distribute) return t;
  if (global % kBulkAlignment) {
    w.fail_at(Kind::misaligned, "the global address of a bulk copy must be aligned to 16 bytes", l, global);
  }
  t.global = reinterpret_cast<uint8_t*>(global);
  return t;
}

// The CTAs that a load goes to: the one that has the destination, or those that a multicast names.
std::vector<Cta*> targets(Warp& w, const Instruction& i, const BulkForm& form, Cta& addressed, int lane) {
  if (form.mask < 0) return {&addressed};
  const auto& ctas = w.cta->cluster->ctas;
  const unsigned mask = w.operand<uint16_t>(i, form.mask)[lane];
  std::vector<Cta*> named;
  for (unsigned rank = 0; rank < 16; ++rank) {
    if (!(mask >> rank & 1)) continue;
    if (rank >= ctas.size()) break;
    named.push_back(ctas[rank].get());
  }
  if (mask == 0 || mask >> ctas.size()) {
    w.fail(Kind::illegal,
           "the multicast's mask is " + hexadecimal(mask) + ": it must name CTAs of the cluster, which has " +
               std::to_string(ctas.size()),
           lane);
  }
  return named;
}

// What a store names is the same in both lanes.
bool same_store(const Warp& w, const Instruction& i, const BulkForm& form, int a, int b) {
  if (!form.tensor) return w.operand<uint32_t>(i, form.size)[a] == w.operand<uint32_t>(i, form.size)[b];
  for (int d = 0; d < coordinates_of(form); ++d) {
    const auto* coordinate = w.operand<int32_t>(i, form.coordinates + d);
    if (coordinate[a] != coordinate[b]) return false;
  }
  return true;
}

}  // namespace

Step bulk_transfer(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const BulkForm*>(i.data);
  uint64_t shared[kLanes], global[kLanes], mbarrier[kLanes], to[kLanes];
  const bool sends = form.direction == Direction::load || form.direction == Direction::distribute;
  if (form.direction != Direction::distribute) form.global.read(w, i, global);
  if (form.direction != Direction::prefetch) form.shared.read(w, i, shared);
  if (form.direction == Direction::distribute) form.to.read(w, i, to);
  if (sends) form.mbarrier.read(w, i, mbarrier);
  const int first = __builtin_ctz(mask);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    Transfer t = described(w, i, form, form.direction == Direction::distribute ? 0 : global[l], l);
    if (form.direction == Direction::prefetch) {
      check_global(w, t, Use::read, l);
      continue;
    }
    const SharedRange here =
        shared_at(w, form.shared, shared[l], t.bytes, form.tensor ? kTensorAlignment : kBulkAlignment, l,
                  "the shared memory of a bulk copy");
    t.shared = here.offset;
    // A store by every lane of a warp, as CUTLASS's epilogues have it, is one in SASS: ptxas 13.0 makes the UTMASTG of
    // it that it makes of one lane's.
    const bool again = l != first && !sends && !t.reduce && global[l] == global[first] && shared[l] == shared[first] &&
                       same_store(w, i, form, l, first);
    if (w.count && !again) count(w, t);
    if (!sends) {
      auto store = std::make_shared<Transfer>(std::move(t));
      Bulk& bulk = state_of(w);
      int& series = bulk.series[again ? first : l];
      w.cta->cluster->begin_series(series);
      store->series = series;
      check_global(w, *store, store->writes(), l, true);
      take(w, *store, issue(w, *store, l));
      bulk.entries.push_back({l, bulk.committed[l], store, false});
      w.cta->add(std::move(store));
      continue;
    }
    const SharedRange there = form.direction == Direction::load ? here
                                                                : shared_at(w, form.to, to[l], t.bytes, kBulkAlignment,
                                                                            l, "the destination of a bulk copy");
    const SharedRange barrier = shared_at(w, form.mbarrier, mbarrier[l], 8, 8, l, "an mbarrier");
    const int odd = barrier.cta->rank & 1;  // of a pair
    if (!form.pair && form.mask < 0 && barrier.cta != there.cta) {
      w.fail_at(Kind::illegal, "the mbarrier must lie in the shared memory of the CTA that has the destination", l,
                mbarrier[l]);
    }
    t.to = there.offset;
    t.mbarrier = barrier.offset;
    for (Cta* target : targets(w, i, form, *there.cta, l)) {
      auto one = std::make_shared<Transfer>(t);
      one->target = target;
      one->signalled = form.pair ? w.cta->cluster->ctas.at((target->rank & ~1) | odd).get() : target;
      if (form.direction == Direction::load) check_global(w, *one, Use::read, l);
      one->series = one->signalled->arrivals_at(one->mbarrier);
      const Actor actor = issue(w, *one, l);
      send(w, *one, there.offset, actor);
      if (form.direction == Direction::distribute) take(w, *one, actor);
      w.cta->add(std::move(one));
    }
  }
  return Step::next;
}

Step bulk_commit_group(Warp& w, const Instruction&, Mask mask) {
  Bulk& bulk = state_of(w);
  for (Mask rest = mask; rest; rest &= rest - 1) ++bulk.committed[__builtin_ctz(rest)];
  return Step::next;
}

// Waits for all groups of each lane but the last few: for their reads alone, or until they are complete.
template <bool read>
Step bulk_wait_group(Warp& w, const Instruction& i, Mask mask) {
  if (!w.bulk) return Step::next;
  auto& entries = w.bulk->entries;
  const auto over = [&](Bulk::Entry& e) {
    if (!(mask >> e.lane & 1) || e.group + i.immediate >= w.bulk->committed[e.lane]) return false;
    if (read && e.waited) return false;
    e.waited = true;
    if (read) {
      e.store->read(*w.cta);
    } else {
      w.cta->cluster->complete(*e.store);
      check_global(w, *e.store, e.store->writes(), e.lane);
    }
    w.knowledge.join(learnt(e.store->series, e.store->issued));
    return !read;  // one that is only read may be waited for again
  };
  entries.erase(std::remove_if(entries.begin(), entries.end(), over), entries.end());
  return Step::next;
}
template Step bulk_wait_group<false>(Warp&, const Instruction&, Mask);
template Step bulk_wait_group<true>(Warp&, const Instruction&, Mask);

// A GPU reads the map some time before the copy is complete; a store that has read its shared memory has read it.
void check_map_unused(const Warp& w, uint64_t map, int lane) {
  const Cta& cta = *w.cta;
  if (!checked(cta)) return;
  for (const auto& pending : cta.cluster->pending) {
    const auto* t = dynamic_cast<const Transfer*>(pending.get());
    if (!t || !t->tensor || t->done || t->has_read) continue;
    if (map + sizeof(TensorMap) <= t->map_address || t->map_address + sizeof(TensorMap) <= map) continue;
    const uint32_t line = t->code->statements[t->instruction->index]->line;
    if (cta.cluster->again(Kind::in_flight, line)) return;
    Finding f = finding_at(Kind::in_flight,
                           "a tensor map is changed while the copy issued at " +
                               source_place(*cta.launch->module, line) + " may still read it: wait for the copy first",
                           map);
    f.lane = lane;
    cta.place_other(f, line);
    cta.cluster->report(std::move(f));
    return;
  }
}

void check_bulk_at_end(const Cta& cta) {
  if (!checked(cta)) return;
  for (const Warp& w : cta.warps) {
    if (!w.bulk) continue;
    for (const Bulk::Entry& e : w.bulk->entries) {
      if (e.waited) continue;
      Finding f;
      f.kind = Kind::in_flight;
      f.breaks = Breaks::isa;
      f.message =
          "the block ends while this bulk store may still read its shared memory: no wait_group of the thread covers "
          "it; shared memory seems to live as long on today's GPUs";
      f.warp = w.id;
      f.lane = e.lane;
      cta.place(f, *e.store->code, e.store->instruction->index);
      cta.cluster->report(std::move(f));
    }
  }
}

}  // namespace gpuless
