// Tensor maps in memory, and the instructions that change and publish them (ISA 9.7.9.26, 9.7.13.16).
#include "../tensor_map.h"

#include "../table.h"
#include "async.h"
#include "bulk.h"

namespace gpuless {

TensorMap read_tensor_map(Warp& w, uint64_t address, int rank, bool im2col, int lane) {
  if (address & kWindowMask) {
    w.fail_at(Kind::illegal, "a tensor map must lie in the param, const or global space, not in shared or local memory",
              lane, address);
  }
  const auto& parameters = w.cta->launch->parameters;
  const uint64_t offset = address - reinterpret_cast<uint64_t>(parameters.data());
  const uint8_t* bytes;
  uint64_t within = address;  // what must be aligned: the parameters begin anywhere in host memory
  if (offset < parameters.size() && parameters.size() - offset >= sizeof(TensorMap)) {
    bytes = parameters.data() + offset;
    within = offset;
  } else {
    bytes = access_global(w, address, sizeof(TensorMap), Use::read, lane);
  }
  if (within % 64) w.fail_at(Kind::misaligned, "a tensor map must be aligned to 64 bytes", lane, address);
  TensorMap map;
  std::memcpy(&map, bytes, sizeof map);
  if (map.magic != TensorMap::kMagic) {
    w.fail_at(Kind::illegal, "there is no tensor map here: cuTensorMapEncodeTiled or tensormap.replace makes one", lane,
              address);
  }
  if (const std::string problem = map.problem(); !problem.empty()) {
    w.fail_at(Kind::illegal, "the tensor map is not valid: " + problem, lane, address);
  }
  if (map.im2col != im2col) {
    w.fail_at(Kind::illegal,
              std::string("the tensor map is ") + (map.im2col ? "of im2col mode" : "tiled") + ", the instruction " +
                  (im2col ? "of im2col mode" : "tiled"),
              lane, address);
  }
  if (map.rank != rank) {
    w.fail_at(Kind::illegal,
              "the tensor map has rank " + std::to_string(map.rank) + ", the instruction " + std::to_string(rank), lane,
              address);
  }
  if (map.swizzle && map.row_bytes() < map.swizzle_bytes()) {
    w.fail_at(Kind::unsupported,
              "boxes narrower than their swizzle are not supported: box rows of " + std::to_string(map.row_bytes()) +
                  " bytes, swizzle of " + std::to_string(map.swizzle_bytes()) + "; choose the swizzle that fits",
              lane, address);
  }
  return map;
}

void check_narrow(Warp& w, const TensorMap& map, int32_t innermost, bool store, int lane) {
  if (map.element_bits() >= 8) return;
  if (innermost % 16) {
    w.fail(Kind::illegal,
           "the innermost coordinate of elements of 4 or 6 bits must be a multiple of 16, not " +
               std::to_string(innermost),
           lane);
  }
  if (store && map.padded()) w.fail(Kind::illegal, "a tensor map whose elements are padded is for loads alone", lane);
}

namespace {

enum class Field : uint8_t {
  global_address,
  rank,
  box_dim,
  global_dim,
  global_stride,
  element_stride,
  elemtype,
  interleave_layout,
  swizzle_mode,
  fill_mode,
};
constexpr std::string_view kFields[] = {"global_address", "rank",           "box_dim",  "global_dim",
                                        "global_stride",  "element_stride", "elemtype", "interleave_layout",
                                        "swizzle_mode",   "fill_mode"};

struct Form {
  Place map, source;
  Field field = Field::rank;
  int ordinal = 0;
  bool shared = false, wide = false;  // the map, by the opcode; the value
};

// .elemtype's numbers as CUtensorMapDataType's: f32.ftz and f64, bf16 and the packed ones stand elsewhere there.
constexpr uint8_t kElementTypes[] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12, 14, 13, 15};

void replace_field(Warp& w, const Form& form, TensorMap& map, uint64_t value, int lane) {
  const auto checked_value = [&](uint64_t limit) {
    if (value > limit) {
      w.fail(Kind::illegal,
             "tensormap.replace: " + std::string(kFields[static_cast<int>(form.field)]) + " is at most " +
                 std::to_string(limit) + ", not " + std::to_string(value),
             lane);
    }
    return value;
  };
  switch (form.field) {
    case Field::global_address:
      map.address = value;
      break;
    case Field::rank:
      map.rank = static_cast<uint8_t>(checked_value(4) + 1);
      break;
    case Field::box_dim:
      map.box[form.ordinal] = static_cast<uint32_t>(value);
      break;
    case Field::global_dim:
      map.dims[form.ordinal] = value;
      break;
    case Field::global_stride:
      map.strides[form.ordinal] = value;
      break;
    case Field::element_stride:
      map.steps[form.ordinal] = static_cast<uint16_t>(checked_value(8));
      break;
    case Field::elemtype:
      map.type = kElementTypes[checked_value(15)];
      break;
    case Field::interleave_layout:
      map.interleave = static_cast<uint8_t>(checked_value(2));
      break;
    case Field::swizzle_mode:
      map.swizzle = static_cast<uint8_t>(checked_value(3));
      break;
    case Field::fill_mode:
      map.fill = static_cast<uint8_t>(checked_value(1));
      break;
  }
}

Step replace(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Form*>(i.data);
  uint64_t address[kLanes];
  form.map.read(w, i, address);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    uint8_t* bytes;
    if (form.shared || (form.map.generic && (address[l] & kWindowMask) == kSharedWindow)) {
      const uint32_t offset = shared_offset(w, form.map, address[l], sizeof(TensorMap), 64, l, "a tensor map");
      if (checked(*w.cta)) {
        w.cta->shadow.read(w.actor(), offset, sizeof(TensorMap));
        w.cta->shadow.write(w.actor(), offset, sizeof(TensorMap));
      }
      bytes = w.cta->shared.data() + offset;
    } else {
      if (address[l] % 64) w.fail_at(Kind::misaligned, "a tensor map must be aligned to 64 bytes", l, address[l]);
      check_map_unused(w, address[l], l);
      bytes = access_global(w, address[l], sizeof(TensorMap), Use::write, l);
    }
    TensorMap map;
    std::memcpy(&map, bytes, sizeof map);
    map.magic = TensorMap::kMagic;  // kernels build a map from zeros, field by field
    replace_field(w, form, map, form.wide ? w.operand<uint64_t>(i, 1)[l] : w.operand<uint32_t>(i, 1)[l], l);
    std::memcpy(bytes, &map, sizeof map);
  }
  return Step::next;
}

// From shared to global memory, then a release fence of the tensormap proxy.
Step copy(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Form*>(i.data);
  uint64_t to[kLanes], from[kLanes];
  form.map.read(w, i, to);
  form.source.read(w, i, from);
  const int l = __builtin_ctz(mask);  // .aligned: every lane says the same
  const uint32_t source = shared_offset(w, form.source, from[l], sizeof(TensorMap), 64, l, "a tensor map");
  if (to[l] % 64) w.fail_at(Kind::misaligned, "a tensor map must be aligned to 64 bytes", l, to[l]);
  if (checked(*w.cta)) w.cta->shadow.read(w.actor(), source, sizeof(TensorMap));
  check_map_unused(w, to[l], l);
  std::memcpy(access_global(w, to[l], sizeof(TensorMap), Use::write, l), w.cta->shared.data() + source,
              sizeof(TensorMap));
  return Step::next;
}

// [map], {ordinal,} value
void bind_replace(Bind& b) {
  auto& form = b.data<Form>();
  for (size_t k = 0; k < sizeof kFields / sizeof *kFields; ++k) {
    if (b.has(kFields[k])) form.field = static_cast<Field>(k);
  }
  const bool of_dimension = form.field >= Field::box_dim && form.field <= Field::element_stride;
  form.wide = form.field == Field::global_address || form.field == Field::global_stride;
  if (b.has("b64") != form.wide) b.refuse("the type of the new value does not fit the field");
  if (b.operands() != (of_dimension ? 3 : 2))
    b.refuse("expected [map], the ordinal of a dimension's field, and a value");
  form.shared = b.has("shared::cta");
  form.map.generic = !form.shared && !b.has("global");
  form.map.displacement = b.address(b.operand(0), &form.map.wide);
  if (of_dimension) {
    const int64_t ordinal = b.constant(b.operand(1));
    if (ordinal < 0 || ordinal >= TensorMap::kMaxRank - (form.field == Field::global_stride)) {
      b.refuse("there is no dimension of this ordinal");
    }
    form.ordinal = static_cast<int>(ordinal);
  }
  b.source(b.operands() - 1, form.wide ? Type::b64 : Type::b32);
  b.run(&replace);
}

void bind_copy(Bind& b) {
  if (b.operands() != 3 || b.constant(b.operand(2)) != 128) b.refuse("expected [dst], [src], 128");
  auto& form = b.data<Form>();
  form.map.displacement = b.address(b.operand(0), &form.map.wide);
  form.source.operand = 1;
  form.source.displacement = b.address(b.operand(1), &form.source.wide);
  b.collective();
  b.run(&copy);
}

const Row rows[] = {
    {"tensormap.replace.tile.global_address|rank|box_dim|global_dim|global_stride|element_stride|elemtype|"
     "interleave_layout|swizzle_mode|fill_mode.global|shared::cta?.b1024.b32|b64",
     "9.7.9.26", bind_replace},
    {"tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.cta|cluster|gpu|sys.sync.aligned",
     "9.7.13.16", bind_copy},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
