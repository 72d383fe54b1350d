// Runs the instructions of CPU tiers that the tests' CPU lacks: AMX tiles of int8, and AVX-VNNI. Each of them traps,
// and the handler does what Intel's manual (Software Developer's Manual, volume 2) says it does. Preloaded
// (LD_PRELOAD), so that thread-local tiles need no allocation inside of a signal handler.
#include <signal.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
thread_local Config config;
thread_local uint8_t tile[8][16][64];

// In encoding order.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

[[noreturn]] void fail(const char* what, const uint8_t* code) {
  std::fprintf(stderr, "emulated CPU: %s at %02x %02x %02x %02x %02x %02x\n", what, code[0], code[1], code[2], code[3],
               code[4], code[5]);
  std::abort();
}

// An instruction with a VEX prefix of three bytes.
struct Instruction {
  int prefix, map, length_bit, opcode;  // prefix: 0 none, 1 66, 2 F3, 3 F2
  int reg, rm, source, mod, bytes;      // source: VEX.vvvv
  uint8_t* address;                     // of mod != 3; a tile's rows are `stride` apart
  int64_t stride;
};

Instruction decode(const uint8_t* code, const greg_t* registers) {
  if (code[0] != 0xc4) fail("no instruction that it knows", code);
  const int r = ~code[1] >> 7 & 1, x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1;
  Instruction i{};
  i.map = code[1] & 31, i.source = ~code[2] >> 3 & 15, i.length_bit = code[2] >> 2 & 1, i.prefix = code[2] & 3;
  i.opcode = code[3];
  const uint8_t modrm = code[4];
  i.mod = modrm >> 6, i.reg = (modrm >> 3 & 7) | r << 3, i.rm = (modrm & 7) | b << 3, i.bytes = 5;
  if (i.mod == 3) return i;
  const auto displacement = [&](int size) {
    int32_t value = 0;
    if (size == 1) value = static_cast<int8_t>(code[i.bytes]);
    if (size == 4) std::memcpy(&value, code + i.bytes, 4);
    i.bytes += size;
    return value;
  };
  const auto value = [&](int n) { return registers[kRegisters[n]]; };
  int64_t address = 0;
  if ((modrm & 7) == 4) {
    const uint8_t sib = code[i.bytes++];
    const int index = (sib >> 3 & 7) | x << 3, base = (sib & 7) | b << 3;
    if (index != 4) i.stride = value(index) << (sib >> 6);
    if (!((sib & 7) == 5 && i.mod == 0)) {
      address = value(base) + displacement(i.mod == 1 ? 1 : i.mod == 2 ? 4 : 0);
    } else {
      address = displacement(4);
    }
  } else if ((modrm & 7) == 5 && i.mod == 0) {
    address = displacement(4);
    address += registers[REG_RIP] + i.bytes;
  } else {
    address = value(i.rm) + displacement(i.mod == 1 ? 1 : i.mod == 2 ? 4 : 0);
  }
  i.address = reinterpret_cast<uint8_t*>(address);
  return i;
}

void clear_from(int t, int row) { std::memset(tile[t][row], 0, (16 - row) * 64); }

void configure(const uint8_t* from, const uint8_t* code) {
  std::memcpy(&config, from, sizeof(config));
  if (config.palette != 1 || config.start_row) fail("a tile configuration that faults", code);
  for (int t = 0; t < 16; ++t)
    if (t < 8 ? config.rows[t] > 16 || config.row_bytes[t] > 64 : config.rows[t] || config.row_bytes[t])
      fail("a tile configuration that faults", code);
  std::memset(tile, 0, sizeof(tile));
}

int of_byte(uint8_t byte, bool is_signed) { return is_signed ? int8_t(byte) : byte; }

void multiply_tiles(int to, int a, int b, bool a_is_signed, const uint8_t* code) {
  const int rows = config.rows[to], columns = config.row_bytes[to] / 4, depth = config.row_bytes[a] / 4;
  if (to == a || to == b || a == b || config.rows[a] != rows || config.row_bytes[b] != columns * 4 ||
      config.rows[b] != depth)
    fail("tiles whose shapes do not fit", code);
  for (int m = 0; m < rows; ++m)
    for (int n = 0; n < columns; ++n) {
      int32_t sum;
      std::memcpy(&sum, tile[to][m] + 4 * n, 4);
      for (int k = 0; k < depth; ++k)
        for (int j = 0; j < 4; ++j) sum += of_byte(tile[a][m][4 * k + j], a_is_signed) * int8_t(tile[b][k][4 * n + j]);
      std::memcpy(tile[to][m] + 4 * n, &sum, 4);
    }
  clear_from(to, rows);
}

// The lower and upper halves of the 16 vector registers, in the frame from which the kernel restores them.
struct Vectors {
  _libc_fpstate* low;
  uint8_t* high;

  explicit Vectors(ucontext_t* context) : low(context->uc_mcontext.fpregs) {
    constexpr int kHeader = 512, kHigh = 576;
    uint64_t present;
    auto area = reinterpret_cast<uint8_t*>(low);
    std::memcpy(&present, area + kHeader, 8);
    high = area + kHigh;
    if (!(present & 4)) {  // the upper halves are zero, and not restored
      std::memset(high, 0, 256);
      present |= 4;
      std::memcpy(area + kHeader, &present, 8);
    }
  }
  void get(int n, uint8_t* bytes) const {
    std::memcpy(bytes, &low->_xmm[n], 16);
    std::memcpy(bytes + 16, high + 16 * n, 16);
  }
  void set(int n, const uint8_t* bytes) {
    std::memcpy(&low->_xmm[n], bytes, 16);
    std::memcpy(high + 16 * n, bytes + 16, 16);
  }
};

void vpdpbusd(const Instruction& i, ucontext_t* context) {
  Vectors registers(context);
  const int bytes = i.length_bit ? 32 : 16;
  uint8_t sums[32], unsigned_bytes[32], signed_bytes[32];
  registers.get(i.reg, sums);
  registers.get(i.source, unsigned_bytes);
  if (i.mod == 3) {
    registers.get(i.rm, signed_bytes);
  } else {
    std::memcpy(signed_bytes, i.address + i.stride, bytes);
  }
  for (int lane = 0; lane < bytes; lane += 4) {
    int32_t sum;
    std::memcpy(&sum, sums + lane, 4);
    for (int j = 0; j < 4; ++j) sum += unsigned_bytes[lane + j] * int8_t(signed_bytes[lane + j]);
    std::memcpy(sums + lane, &sum, 4);
  }
  std::memset(sums + bytes, 0, 32 - bytes);
  registers.set(i.reg, sums);
}

void on_illegal_instruction(int, siginfo_t*, void* data) {
  auto context = static_cast<ucontext_t*>(data);
  greg_t* registers = context->uc_mcontext.gregs;
  auto code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const Instruction i = decode(code, registers);
  const int t = i.reg;
  switch (i.map << 12 | i.prefix << 8 | i.opcode) {
    case 0x2049:
      if (i.mod == 3) {
        std::memset(&config, 0, sizeof(config));  // tilerelease
      } else {
        configure(i.address + i.stride, code);  // ldtilecfg
      }
      break;
    case 0x2349:  // tilezero
      clear_from(t, 0);
      break;
    case 0x234b:  // tileloadd
      for (int row = 0; row < config.rows[t]; ++row) {
        std::memset(tile[t][row], 0, 64);
        std::memcpy(tile[t][row], i.address + row * i.stride, config.row_bytes[t]);
      }
      clear_from(t, config.rows[t]);
      break;
    case 0x224b:  // tilestored
      for (int row = 0; row < config.rows[t]; ++row)
        std::memcpy(i.address + row * i.stride, tile[t][row], config.row_bytes[t]);
      break;
    case 0x235e:  // tdpbssd
      multiply_tiles(t, i.rm, i.source, true, code);
      break;
    case 0x215e:  // tdpbusd
      multiply_tiles(t, i.rm, i.source, false, code);
      break;
    case 0x2150:
      vpdpbusd(i, context);
      break;
    default:
      fail("no instruction that it knows", code);
  }
  registers[REG_RIP] += i.bytes;
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

// csrc/cpu/tier.cpp asks for it. What the CPU has is left to it, as not all of it traps: on a CPU with AMX, in a
// process that has not asked for the tiles, ldtilecfg runs and the instructions on tiles trap, so that the handler
// would know no shapes. forwardpass asks for the tiles then, as it does without this library.
extern "C" bool forwardpass_emulates(const char* feature) {
  if (std::strcmp(feature, "avxvnni") == 0) return !__builtin_cpu_supports("avxvnni");
  return std::strcmp(feature, "amx-int8") == 0 && !__builtin_cpu_supports("amx-int8");
}
