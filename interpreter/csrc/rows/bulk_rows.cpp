// The spellings of bulk copies: cp.async.bulk, cp.reduce.async.bulk and their tensor forms (ISA 9.7.9.25.4
// to 9.7.9.25.6).
#include "bulk.h"
#include "matrix_rows.h"

namespace gpuless {
namespace {

void bind_place(Bind& b, Place& place, const Operand& o, bool generic = false, bool cluster = false) {
  place.operand = b.instruction.sources;
  place.displacement = b.address(o, &place.wide);
  place.generic = generic;
  place.cluster = cluster;
}

// [map, {coordinates}]
void bind_map(Bind& b, BulkForm& form, const Operand& o) {
  form.tensor = true;
  for (const char* dim : {"1d", "2d", "3d", "4d", "5d"}) {
    if (b.has(dim)) form.rank = dim[0] - '0';
  }
  if (b.has("tile::gather4") || b.has("tile::scatter4")) form.boxes = 4;
  if (o.kind != Operand::Kind::address || o.parts.size() != 2) b.refuse("expected [tensor map, {coordinates}]");
  bind_place(b, form.global, o, true);
  const Operand& coordinates = o.parts[1];
  const bool list = coordinates.kind == Operand::Kind::vector;
  const int count = coordinates_of(form);
  if ((list ? static_cast<int>(coordinates.parts.size()) : 1) != count) {
    b.refuse("expected " + std::to_string(count) + " coordinates");
  }
  form.coordinates = b.instruction.sources;
  for (int d = 0; d < count; ++d) b.source(list ? coordinates.parts[d] : coordinates, Type::b32);
}

// The cache policy comes last and has no effect on what is copied.
void bind_policy(Bind& b, int operands, const char* expected) {
  const int policy = b.has("L2::cache_hint") ? 1 : 0;
  if (b.operands() != operands + policy) {
    b.refuse(std::string("expected ") + expected + " and with .L2::cache_hint a cache-policy");
  }
  if (policy) b.source(operands, Type::b64);
  b.run(&bulk_transfer);
}

// The mask of a multicast comes before the policy.
int bind_mask(Bind& b, BulkForm& form, int next) {
  if (!b.has("multicast::cluster")) return next;
  if (next < b.operands()) {
    form.mask = b.instruction.sources;
    b.source(next, Type::b16);
  }
  return next + 1;
}

void bind_load(Bind& b) {
  auto& form = b.data<BulkForm>();
  const bool cluster = b.has("shared::cluster");
  bind_place(b, form.shared, b.operand(0), false, cluster);
  bind_place(b, form.global, b.operand(1));
  form.size = b.instruction.sources;
  b.source(2, Type::b32);
  bind_place(b, form.mbarrier, b.operand(3), false, cluster);
  bind_policy(b, bind_mask(b, form, 4), "[dst], [src], size, [mbarrier], with .multicast::cluster a mask of CTAs");
}

// By the operation and type that the opcode ends in.
void bind_reduction(Bind& b, BulkForm& form) {
  for (const char* operation : {"add", "min", "max", "inc", "dec", "and", "or", "xor"}) {
    if (b.has(operation)) form.reduce = reduction(operation, b.type(b.slots() - 1));
  }
}

void bind_distribute(Bind& b) {
  auto& form = b.data<BulkForm>();
  form.direction = Direction::distribute;
  bind_reduction(b, form);
  bind_place(b, form.to, b.operand(0), false, true);
  bind_place(b, form.shared, b.operand(1));
  form.size = b.instruction.sources;
  b.source(2, Type::b32);
  bind_place(b, form.mbarrier, b.operand(3), false, true);
  bind_policy(b, 4, "[dst], [src], size, [mbarrier]");
}

void bind_store(Bind& b) {
  auto& form = b.data<BulkForm>();
  form.direction = Direction::store;
  bind_reduction(b, form);
  bind_place(b, form.global, b.operand(0));
  bind_place(b, form.shared, b.operand(1));
  form.size = b.instruction.sources;
  b.source(2, Type::b32);
  bind_policy(b, 3, "[dst], [src], size");
}

void bind_prefetch(Bind& b) {
  auto& form = b.data<BulkForm>();
  form.direction = Direction::prefetch;
  bind_place(b, form.global, b.operand(0));
  form.size = b.instruction.sources;
  b.source(1, Type::b32);
  bind_policy(b, 2, "[src], size");
}

// im2col: {offsets} behind the mbarrier.
int bind_offsets(Bind& b, BulkForm& form, int next) {
  if (!b.has("im2col")) return next;
  if (form.rank < 3) b.refuse("im2col is for tensors of 3 to 5 dimensions");
  const Operand& offsets = b.operand(next);
  if (offsets.kind != Operand::Kind::vector || static_cast<int>(offsets.parts.size()) != form.rank - 2) {
    b.refuse("expected " + std::to_string(form.rank - 2) + " im2col offsets behind the mbarrier");
  }
  form.offsets = b.instruction.sources;
  for (const Operand& offset : offsets.parts) b.source(offset, Type::b16);
  return next + 1;
}

void bind_tensor_load(Bind& b) {
  auto& form = b.data<BulkForm>();
  const bool cluster = b.has("shared::cluster");
  bind_place(b, form.shared, b.operand(0), false, cluster);
  bind_map(b, form, b.operand(1));
  form.pair = b.has("cta_group::2");
  if (form.pair || b.has("cta_group::1") || form.boxes > 1) require_capability(b, 100);
  if (form.boxes > 1 && cluster) require_targets(b, {100});
  bind_place(b, form.mbarrier, b.operand(2), false, cluster);
  bind_policy(b, bind_mask(b, form, bind_offsets(b, form, 3)),
              "[dst], [tensor map, {coordinates}], [mbarrier], with .im2col {offsets}, with .multicast::cluster a mask "
              "of CTAs");
}

void bind_tensor_store(Bind& b) {
  auto& form = b.data<BulkForm>();
  form.direction = Direction::store;
  for (const std::string_view operation : {"add", "min", "max", "inc", "dec", "and", "or", "xor"}) {
    if (b.has(operation)) form.operation = operation;
  }
  bind_map(b, form, b.operand(0));
  if (form.boxes > 1) require_targets(b, {100});
  bind_place(b, form.shared, b.operand(1));
  bind_policy(b, 2, "[tensor map, {coordinates}], [src]");
}

void bind_tensor_prefetch(Bind& b) {
  auto& form = b.data<BulkForm>();
  form.direction = Direction::prefetch;
  bind_map(b, form, b.operand(0));
  if (form.boxes > 1) require_targets(b, {100});
  bind_policy(b, 1, "[tensor map, {coordinates}]");
}

template <bool read>
void bind_wait(Bind& b) {
  const int64_t n = b.operands() == 1 ? b.constant(b.operand(0)) : -1;
  if (n < 0) b.refuse("expected the number of groups that may stay under way");
  b.instruction.immediate = static_cast<uint64_t>(n);
  b.run(&bulk_wait_group<read>);
}

void refuse_mode(Bind& b) { b.refuse("of the im2col modes only loads in .im2col are supported"); }

#define DIMENSIONS "1d|2d|3d|4d|5d"
#define GROUP "cta_group::1|cta_group::2"
#define MBARRIER "mbarrier::complete_tx::bytes"
#define OTHER_MODES "im2col::w|im2col::w::128|im2col_no_offs"
#define MODES "im2col|" OTHER_MODES
#define OPERATIONS "add|min|max|inc|dec|and|or|xor"
#define REDUCE_GLOBAL "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint?."
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
    {"cp.async.bulk.shared::cluster.global." MBARRIER ".multicast::cluster.L2::cache_hint?", "9.7.9.25.4.1", bind_load},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.tile?." MBARRIER ".multicast::cluster.L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster|shared::cta.global.tile?." MBARRIER
     ".multicast::cluster?." GROUP ".L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor." DIMENSIONS "." GROUP ".shared::cluster.global.tile?." MBARRIER
     ".multicast::cluster?.L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    // The mode comes behind the spaces in the ISA, before them from Triton; ptxas takes both.
    {"cp.async.bulk.tensor.2d.shared::cluster|shared::cta.global.tile::gather4." MBARRIER ".L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor.2d.tile::gather4.shared::cluster|shared::cta.global." MBARRIER ".L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor.2d.shared::cluster.global.tile::gather4." MBARRIER ".multicast::cluster." GROUP
     "?.L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor.2d.shared::cluster|shared::cta.global.tile::gather4." MBARRIER "." GROUP ".L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group.L2::cache_hint?", "9.7.9.25.5.2",
     bind_tensor_store},
    {"cp.async.bulk.tensor.2d.tile::scatter4.global.shared::cta.bulk_group.L2::cache_hint?", "9.7.9.25.5.2",
     bind_tensor_store},
    {"cp.async.bulk.prefetch.tensor.2d.L2.global.tile::gather4.L2::cache_hint?", "9.7.9.25.5.4", bind_tensor_prefetch},
    {"cp.async.bulk.shared::cluster.shared::cta." MBARRIER, "9.7.9.25.4.1", bind_distribute},
    {"cp.reduce.async.bulk.shared::cluster.shared::cta." MBARRIER ".and|or|xor.b32", "9.7.9.25.4.2", bind_distribute},
    {"cp.reduce.async.bulk.shared::cluster.shared::cta." MBARRIER ".add.u32|s32|u64", "9.7.9.25.4.2", bind_distribute},
    {"cp.reduce.async.bulk.shared::cluster.shared::cta." MBARRIER ".min|max.u32|s32", "9.7.9.25.4.2", bind_distribute},
    {"cp.reduce.async.bulk.shared::cluster.shared::cta." MBARRIER ".inc|dec.u32", "9.7.9.25.4.2", bind_distribute},
    {REDUCE_GLOBAL "and|or|xor.b32|b64", "9.7.9.25.4.2", bind_store},
    {REDUCE_GLOBAL "add.u32|s32|u64|f32|f64", "9.7.9.25.4.2", bind_store},
    {REDUCE_GLOBAL "add.noftz.f16|bf16", "9.7.9.25.4.2", bind_store},
    {REDUCE_GLOBAL "min|max.u32|s32|u64|s64|f16|bf16", "9.7.9.25.4.2", bind_store},
    {REDUCE_GLOBAL "inc|dec.u32", "9.7.9.25.4.2", bind_store},
    {"cp.reduce.async.bulk.tensor." DIMENSIONS ".global.shared::cta." OPERATIONS ".tile?.bulk_group.L2::cache_hint?",
     "9.7.9.25.5.3", bind_tensor_store},
    {"cp.reduce.async.bulk.tensor." DIMENSIONS ".global.shared::cta." OPERATIONS
     ".im2col_no_offs.bulk_group.L2::cache_hint?",
     "9.7.9.25.5.3", refuse_mode},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global.im2col." MBARRIER
     ".multicast::cluster.L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster|shared::cta.global.im2col." MBARRIER ".L2::cache_hint?",
     "9.7.9.25.5.2", bind_tensor_load},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster.global." OTHER_MODES "." MBARRIER
     ".multicast::cluster.L2::cache_hint?",
     "9.7.9.25.5.2", refuse_mode},
    {"cp.async.bulk.tensor." DIMENSIONS ".shared::cluster|shared::cta.global." OTHER_MODES "." MBARRIER
     ".L2::cache_hint?",
     "9.7.9.25.5.2", refuse_mode},
    {"cp.async.bulk.tensor." DIMENSIONS ".global.shared::cta." MODES ".bulk_group.L2::cache_hint?", "9.7.9.25.5.2",
     refuse_mode},
    {"cp.async.bulk.prefetch.tensor." DIMENSIONS ".L2.global." MODES ".L2::cache_hint?", "9.7.9.25.5.4", refuse_mode},
    {"cp.async.bulk.commit_group", "9.7.9.25.6.1", [](Bind& b) { b.run(&bulk_commit_group); }},
    {"cp.async.bulk.wait_group.read", "9.7.9.25.6.2", bind_wait<true>},
    {"cp.async.bulk.wait_group", "9.7.9.25.6.2", bind_wait<false>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
