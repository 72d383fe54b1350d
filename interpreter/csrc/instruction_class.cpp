#include "instruction_class.h"

#include <algorithm>
#include <cctype>
#include <vector>

namespace gpuless {
namespace {

// By section of the PTX ISA and all that it contains, and a modifier of the opcode where the section holds several
// classes ("shared" is ".shared::cta" too). The first that fits counts.
struct Entry {
  std::string_view section, modifier;
  const char* name;
};
constexpr Entry kTable[] = {
    {"9.7.1", "", "integer"},
    {"9.7.2", "", "integer"},
    {"9.7.3", "approx", "special function"},
    {"9.7.3", "full", "special function"},
    {"9.7.3", "f64", "float64"},
    {"9.7.3", "", "float"},
    {"9.7.4", "approx", "special function"},
    {"9.7.4", "", "half"},
    {"9.7.5", "", "float"},
    {"9.7.6", "", "compare"},
    {"9.7.7", "", "compare"},
    {"9.7.8", "", "logic"},
    {"9.7.9.3", "", "move"},
    {"9.7.9.4", "", "move"},
    {"9.7.9.6", "", "shuffle and vote"},
    {"9.7.9.7", "", "logic"},  // prmt
    {"9.7.9.8", "shared", "shared load"},
    {"9.7.9.8", "global", "global load"},
    {"9.7.9.8", "local", "local load"},
    {"9.7.9.8", "param", "constant load"},
    {"9.7.9.8", "const", "constant load"},
    {"9.7.9.8", "", "generic load"},
    {"9.7.9.9", "", "global load"},
    {"9.7.9.10", "", "global load"},
    {"9.7.9.11", "shared", "shared store"},
    {"9.7.9.11", "global", "global store"},
    {"9.7.9.11", "local", "local store"},
    {"9.7.9.11", "param", "move"},  // of a call
    {"9.7.9.11", "", "generic store"},
    {"9.7.9.12", "", "TMA"},  // st.async: to another CTA, as bulk copies are
    {"9.7.9.15", "", "cache hint"},
    {"9.7.9.16", "", "cache hint"},
    {"9.7.9.17", "", "cache hint"},
    {"9.7.9.18", "", "cache hint"},
    {"9.7.9.19", "", "compare"},
    {"9.7.9.20", "", "move"},  // cvta
    {"9.7.9.21", "", "conversion"},
    {"9.7.9.22", "", "conversion"},
    {"9.7.9.23", "", "integer"},  // mapa
    {"9.7.9.24", "", "integer"},
    {"9.7.9.25.3", "", "async copy"},
    {"9.7.9.25", "", "TMA"},
    {"9.7.9.26", "", "TMA"},
    {"9.7.12", "", "control"},
    {"9.7.13.1", "", "barrier"},
    {"9.7.13.2", "", "barrier"},
    {"9.7.13.3", "", "barrier"},
    {"9.7.13.4", "", "fence"},
    {"9.7.13.5", "", "atomic"},
    {"9.7.13.6", "", "atomic"},
    {"9.7.13.13", "", "control"},  // griddepcontrol; elect, which costs as little
    {"9.7.13.15", "", "mbarrier"},
    {"9.7.13.16", "", "TMA"},
    {"9.7.13.17", "", "control"},  // clusterlaunchcontrol
    {"9.7.13.18", "", "control"},
    {"9.7.13", "", "shuffle and vote"},       // vote, match, activemask, redux
    {"9.7.14.5.17", "", "shuffle and vote"},  // movmatrix
    {"9.7.14.5.15", "", "ldmatrix"},
    {"9.7.14.5.16", "", "stmatrix"},
    {"9.7.14.4.3", "shared", "shared load"},
    {"9.7.14.4.3", "global", "global load"},
    {"9.7.14.4.3", "", "generic load"},
    {"9.7.14.4.4", "shared", "shared store"},
    {"9.7.14.4.4", "global", "global store"},
    {"9.7.14.4.4", "", "generic store"},
    {"9.7.14", "", "mma"},
    {"9.7.15.7", "", "wgmma wait"},  // its fence and groups
    {"9.7.15", "", "wgmma"},
    {"9.7.16.8", "", "tensor memory"},  // its loads, stores and their waits
    {"9.7.16.10", "", "tcgen05.mma"},
    {"9.7.16", "", "tcgen05"},
    {"9.7.19", "", "control"},
};

std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> parts;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('.', begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

bool within(std::string_view section, std::string_view outer) {
  return section.substr(0, outer.size()) == outer && (section.size() == outer.size() || section[outer.size()] == '.');
}

// The dimensions in "m64n128k16".
bool parse_shape(std::string_view text, uint64_t out[3]) {
  size_t position = 0;
  for (int d = 0; d < 3; ++d) {
    if (position >= text.size() || text[position] != "mnk"[d]) return false;
    out[d] = 0;
    for (++position; position < text.size() && std::isdigit(static_cast<unsigned char>(text[position])); ++position) {
      out[d] = out[d] * 10 + static_cast<uint64_t>(text[position] - '0');
    }
    if (!out[d]) return false;
  }
  return position == text.size();
}

// What a product is multiplied as where its opcode says so.
constexpr std::pair<std::string_view, const char*> kKinds[] = {
    {"kind::f16", "f16"},       {"kind::tf32", "tf32"}, {"kind::i8", "s8"},         {"kind::f8f6f4", "e4m3"},
    {"kind::mxf8f6f4", "e4m3"}, {"kind::mxf4", "e2m1"}, {"kind::mxf4nvf4", "e2m1"},
};

}  // namespace

const char* class_of(std::string_view section, std::string_view opcode) {
  const auto parts = split(opcode);
  for (const Entry& e : kTable) {
    if (!within(section, e.section)) continue;
    bool fits = e.modifier.empty();
    for (const auto part : parts) fits |= part.substr(0, part.find("::")) == e.modifier;
    if (fits) return e.name;
  }
  return "other";
}

MatrixWork matrix_work(const Statement& s) {
  MatrixWork work;
  const auto parts = split(s.opcode);
  const bool wgmma = s.opcode.rfind("wgmma.mma_async.", 0) == 0;
  for (const auto part : parts) {
    for (const auto& [kind, type] : kKinds)
      if (part == kind) work.type = type;
  }
  const bool wmma = s.opcode.rfind("wmma.mma.", 0) == 0;
  if (!wgmma && !wmma && parts[0] != "mma") return work;
  uint64_t shape[3];
  size_t shape_part = 0;
  while (shape_part < parts.size() && !parse_shape(parts[shape_part], shape)) ++shape_part;
  std::vector<std::string_view> types;  // after the shape: D, A, B and of mma C
  for (size_t k = shape_part + 1; k < parts.size(); ++k)
    if (ptx::type_of(parts[k]) != ptx::Type::none) types.push_back(parts[k]);
  if (work.type.empty()) {
    if (types.size() < 3 && !wmma) return work;
    work.type = types.size() < 3 ? "f16" : types[1];  // wmma names D and C alone where A and B are f16
  }
  const bool sparse = parts[1].substr(0, 2) == "sp";  // half of A's elements are not there
  work.macs = shape[0] * shape[1] * shape[2] / (wgmma ? 4 : sparse ? 2 : 1);
  if (!wgmma) return work;
  constexpr uint64_t kDepthBytes = 32;  // K of every type
  const bool a_in_registers = s.operands[1].kind == Operand::Kind::vector;
  work.shared_bytes = (shape[1] + (a_in_registers ? 0 : shape[0])) * kDepthBytes / 4;
  return work;
}

}  // namespace gpuless
