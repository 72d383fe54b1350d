// ldmatrix, stmatrix and movmatrix, PTX ISA 9.7.14.5.15 to 9.7.14.5.17.
//
// A register of the warp is a fragment (matrix.h): 8 rows of 16 bytes. Lanes 8 n to 8 n + 7 have the addresses of
// matrix n's rows.
#include <cstring>

#include "rows/addresses.h"
#include "rows/matrix_rows.h"
#include "undefined.h"

namespace gpuless {
namespace {

struct Rows {
  int matrices;
  bool transposed;
  AddressOperand place;
  LaneSet holders[8];  // of what each row of a matrix has
};

// The whole warp loads, and not whom an element of a row goes to: the ISA has it load collectively.
constexpr LaneSet kEverybody[8] = {{kAllLanes, false}, {kAllLanes, false}, {kAllLanes, false}, {kAllLanes, false},
                                   {kAllLanes, false}, {kAllLanes, false}, {kAllLanes, false}, {kAllLanes, false}};

// Where the rows of every matrix are, after all checks. Lane l gives an address on behalf of the lanes
// on_behalf[l % 8].
void find_rows(Warp& w, const Instruction& i, Use use, const LaneSet on_behalf[8], uint8_t* host[kLanes]) {
  const Rows& how = *static_cast<const Rows*>(i.data);
  const Mask lanes = how.matrices == 4 ? kAllLanes : (Mask{1} << how.matrices * 8) - 1;
  uint64_t address[kLanes];
  how.place.addresses(w, i, address);
  if (how.place.space == ptx::Space::none) {
    each_lane(lanes, [&](int l) {
      if ((address[l] & kWindowMask) != kSharedWindow) {
        w.fail_at(Kind::illegal, "ldmatrix and stmatrix access shared memory, and this generic address is elsewhere", l,
                  address[l]);
      }
      address[l] -= kSharedWindow;
    });
  }
  access(w, ptx::Space::shared, address, 16, use, lanes, host, {}, on_behalf);
}

// The lanes that hold something of these rows: four for each, or transposed one in four.
Mask lanes_of_rows(Mask rows, bool transposed) {
  Mask lanes = 0;
  for (int r = 0; r < 8; ++r)
    if (rows >> r & 1) lanes |= transposed ? 0x11111111u << r / 2 : 0xfu << r * 4;
  return lanes;
}

Step ldmatrix(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const Rows& how = *static_cast<const Rows*>(i.data);
  uint8_t* host[kLanes];
  find_rows(w, i, Use::load, kEverybody, host);
  const Mask unwritten = std::exchange(w.unwritten, 0);
  for (int n = 0; n < how.matrices; ++n) {
    if (i.operand[n] == kSink) continue;
    alignas(64) uint32_t rows[kLanes];
    for (int r = 0; r < 8; ++r) std::memcpy(rows + r * 4, host[n * 8 + r], 16);
    if (how.transposed) {
      transpose(rows, w.operand<uint32_t>(i, n));
    } else {
      std::memcpy(w.operand<uint32_t>(i, n), rows, sizeof rows);
    }
    if (unwritten) set_undefined(w, i.operand[n], kAllLanes, lanes_of_rows(unwritten >> n * 8 & 0xff, how.transposed));
  }
  return Step::next;
}

Step stmatrix(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const Rows& how = *static_cast<const Rows*>(i.data);
  uint8_t* host[kLanes];
  find_rows(w, i, Use::write, how.holders, host);
  for (int n = 0; n < how.matrices; ++n) {
    alignas(64) uint32_t turned[kLanes];
    const uint32_t* rows = w.operand<uint32_t>(i, 1 + n);
    if (how.transposed) {
      transpose(rows, turned);
      rows = turned;
    }
    for (int r = 0; r < 8; ++r) std::memcpy(host[n * 8 + r], rows + r * 4, 16);
  }
  w.cta->shadow.settle();
  return Step::next;
}

Step movmatrix(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  uint32_t turned[kLanes];
  transpose(w.operand<uint32_t>(i, 1), turned);
  std::memcpy(w.operand<uint32_t>(i, 0), turned, sizeof turned);
  return Step::next;
}

Rows& bind_rows(Bind& b) {
  expect_operands(b, 2);
  // ptxas takes the shape before or after .num and .trans; CUTLASS writes it after.
  if (b.slot(3).empty() == b.slot(6).empty()) b.refuse(b.statement.opcode + " needs .m8n8 once");
  Rows& how = b.data<Rows>();
  how.matrices = b.slot(4)[1] - '0';
  how.transposed = b.has("trans");
  for (int r = 0; r < 8; ++r) how.holders[r] = {lanes_of_rows(Mask{1} << r, how.transposed), true};
  return how;
}

void bind_ldmatrix(Bind& b) {
  Rows& how = bind_rows(b);
  for (const Operand& o : registers_of(b, 0, how.matrices)) b.destination(o, Type::b32);
  how.place.bind(b, b.operand(1));
  b.run(&ldmatrix);
}

void bind_stmatrix(Bind& b) {
  require_capability(b, 90);
  Rows& how = bind_rows(b);
  how.place.bind(b, b.operand(0));
  for (const Operand& o : registers_of(b, 1, how.matrices)) b.source(o, Type::b32);
  b.run(&stmatrix);
}

void bind_movmatrix(Bind& b) {
  expect_operands(b, 2);
  b.destination(0, Type::b32);
  b.source(1, Type::b32);
  b.run(&movmatrix);
}

void refuse_narrow(Bind& b) {
  b.refuse(b.statement.opcode +
           ": matrices of 8-bit elements and less need sm_100, which the interpreter does not know");
}

// Slots 3 and 6 are the shape's two places, 4 is .num.
const Row rows[] = {
    {"ldmatrix.sync.aligned.m8n8?.x1|x2|x4.trans?.m8n8?.shared|shared::cta?.b16", "9.7.14.5.15", bind_ldmatrix},
    {"ldmatrix.sync.aligned.m8n16|m16n16.x1|x2|x4.trans?.shared|shared::cta?.b8x16?.b6x16_p32|b4x16_p64|b8",
     "9.7.14.5.15", refuse_narrow},
    {"stmatrix.sync.aligned.m8n8?.x1|x2|x4.trans?.m8n8?.shared|shared::cta?.b16", "9.7.14.5.16", bind_stmatrix},
    {"stmatrix.sync.aligned.m16n8.x1|x2|x4.trans.shared|shared::cta?.b8", "9.7.14.5.16", refuse_narrow},
    {"movmatrix.sync.aligned.m8n8.trans.b16", "9.7.14.5.17", bind_movmatrix},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
