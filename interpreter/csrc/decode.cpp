// From the syntax tree to code: where variables and registers live, and a handler for every statement.
#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <unordered_map>

#include "blocks.h"
#include "finding.h"
#include "machine.h"
#include "offsets.h"
#include "ptx_limits.h"
#include "table.h"
#include "undefined.h"

namespace gpuless {

void refuse(const Module& m, int line, const std::string& kernel, const std::string& why) {
  Finding f;
  f.kind = Kind::unsupported;
  f.message = why;
  f.ptx_line = line;
  f.instruction = m.line(line);
  f.mangled = kernel;
  f.kernel = demangled(kernel);
  throw f;
}

namespace {

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

int64_t place(int64_t& end, const ptx::Variable& v) {
  const int64_t offset = round_up(end, std::max(v.alignment, 1));
  end = offset + v.bytes;
  return offset;
}

void add_shared(Module& m, const ptx::Variable& v, std::map<std::string, int>& variables) {
  if (v.is_extern || v.bytes == 0) {
    m.extern_shared.insert(v.name);
    m.extern_alignment = std::max<int64_t>(m.extern_alignment, v.alignment);
  } else {
    variables[v.name] = static_cast<int>(m.shared.size());
    m.shared.push_back(&v);
  }
}

template <class F>
void each_symbol(const std::vector<Operand>& operands, F f) {
  for (const Operand& o : operands) {
    if (o.kind == Operand::Kind::symbol) f(o.name);
    each_symbol(o.parts, f);
  }
}

bool calls_by_address(const Code& code) {
  for (const Statement& s : code.source->body)
    if (s.opcode.starts_with("call") && s.operands[1].kind == Operand::Kind::reg) return true;
  return false;
}

// The static .shared variables of a kernel, as ptxas has them: those that it refers to, or a function that it may call.
// By an address any may be called.
void lay_out_shared(Module& m, Code& kernel) {
  kernel.shared_offset.assign(m.shared.size(), -1);
  std::set<const Code*> reached{&kernel};
  std::vector<const Code*> open{&kernel};
  const auto reach = [&](const Code& code) {
    if (!code.source->entry && reached.insert(&code).second) open.push_back(&code);
  };
  while (!open.empty()) {
    const Code& code = *open.back();
    open.pop_back();
    if (calls_by_address(code))
      for (const auto& [name, other] : m.functions) reach(other);
    for (const Statement& s : code.source->body) {
      each_symbol(s.operands, [&](const std::string& name) {
        if (const int shared = shared_variable(m, code, name); shared >= 0) kernel.shared_offset[shared] = 0;
        if (const auto f = m.functions.find(name); f != m.functions.end()) reach(f->second);
      });
    }
  }
  for (size_t k = 0; k < m.shared.size(); ++k)
    if (kernel.shared_offset[k] == 0) kernel.shared_offset[k] = place(kernel.shared_bytes, *m.shared[k]);
  kernel.shared_bytes = round_up(kernel.shared_bytes, std::max<int64_t>(m.extern_alignment, 16));
}

void place_global(Module& m, const ptx::Variable& v) {
  const int64_t alignment = std::max(v.alignment, 32);  // a sector: counts must not depend on where it lies
  auto* const zeros =
      static_cast<uint8_t*>(std::calloc(v.bytes + alignment, 1));  // pages that nobody touches cost nothing
  if (!zeros) throw std::bad_alloc();
  m.storage.emplace_back(zeros, std::free);
  const auto raw = reinterpret_cast<uint64_t>(m.storage.back().get());
  auto* address = reinterpret_cast<uint8_t*>(round_up(static_cast<int64_t>(raw), alignment));
  if (!v.initial.empty()) std::memcpy(address, v.initial.data(), v.initial.size());
  m.globals[v.name] = {v.name, address, v.bytes, v.space == ptx::Space::constant};
}

void resolve_references(Module& m, const ptx::Variable& v) {
  for (const auto& r : v.references) {
    uint64_t target;
    if (auto g = m.globals.find(r.symbol); g != m.globals.end()) {
      target = reinterpret_cast<uint64_t>(g->second.address);
    } else if (auto f = m.functions.find(r.symbol); f != m.functions.end()) {
      target = reinterpret_cast<uint64_t>(&f->second);
    } else {
      refuse(m, 0, "", "variable " + v.name + " holds the address of " + r.symbol + ", unknown");
    }
    target += static_cast<uint64_t>(r.addend);
    std::memcpy(m.globals[v.name].address + r.offset, &target, 8);
  }
}

// Registers and parameters; immediates follow as the statements ask for them.
void lay_out(Code& code) {
  const ptx::Function& f = *code.source;
  for (const auto& v : f.parameters) {
    code.param_offset[v.name] = place(code.param_bytes, v);
    code.parameters.push_back({code.param_offset[v.name], v.bytes});
  }
  code.own_param_bytes = code.param_bytes;
  for (const auto& v : f.returns) {
    code.param_offset[v.name] = place(code.param_bytes, v);
    code.returns.push_back({code.param_offset[v.name], v.bytes});
  }
  for (const auto& v : f.variables) {
    if (v.space == ptx::Space::param) code.param_offset[v.name] = place(code.param_bytes, v);
    if (v.space == ptx::Space::local) code.local_offset[v.name] = place(code.local_bytes, v);
  }
  code.param_bytes = round_up(code.param_bytes, 16);
  code.local_bytes = round_up(code.local_bytes, 16);

  code.image.assign(64, 0xff);  // kAlwaysTrue
  for (const Type t : f.registers) {
    code.offset_of.push_back(static_cast<Offset>(code.image.size()));
    code.image.resize(code.image.size() + frame_bytes(t), 0xff);  // poison: NaN, -1
  }
}

Visible visible_of(std::string_view opcode) {
  const auto begins = [&](std::initializer_list<std::string_view> words) {
    return std::any_of(words.begin(), words.end(), [&](std::string_view w) { return opcode.starts_with(w); });
  };
  const auto has = [&](std::initializer_list<std::string_view> words) {
    return std::any_of(words.begin(), words.end(), [&](auto w) { return opcode.find(w) != opcode.npos; });
  };
  if (begins({"atom.", "mbarrier.test_wait", "mbarrier.try_wait"})) return Visible::looks;
  if (begins({"ld."})) return has({".volatile", ".relaxed", ".acquire", ".cg", ".cv"}) ? Visible::looks : Visible::no;
  if (begins({"st."})) return has({".volatile", ".relaxed", ".release"}) ? Visible::yes : Visible::no;
  return begins({"bar.", "barrier.", "mbarrier.", "red.", "cp.async.mbarrier", "tcgen05.alloc", "tcgen05.dealloc"})
             ? Visible::yes
             : Visible::no;
}

// What follows from an opcode alone. A function has far fewer of them than instructions.
struct Spelling {
  const Row* row = nullptr;
  std::vector<std::string_view> slots;
  bool lanewise = false, aligned = false;
  Visible visible = Visible::no;
};

// An instruction that the table does not know, or whose operands it does not take. Programs have those where they never
// come, as in an arm for another architecture, and ptxas takes some: so it is an error where it runs.
Step run_refused(Warp& w, const Instruction& i, Mask) {
  w.fail(Kind::unsupported, *static_cast<const std::string*>(i.data));
}

void refuse_to_run(Code& code, uint32_t index, std::string why) {
  auto data = std::make_shared<std::string>(std::move(why));
  Instruction& i = code.instructions[index];
  i = Instruction();
  i.index = index;
  i.run = run_refused;
  i.data = data.get();
  code.data.push_back(data);
  code.refused.push_back(index);
}

void decode(Module& m, Code& code) {
  lay_out(code);
  const auto& body = code.source->body;
  code.instructions.resize(body.size() + 1);
  code.statements.reserve(body.size() + 1);
  std::unordered_map<std::string_view, Spelling> spellings;
  for (size_t k = 0; k <= body.size(); ++k) {
    static const Statement end = [] {
      Statement s;
      s.opcode = "ret";
      return s;
    }();
    const Statement& s = k < body.size() ? body[k] : end;
    Instruction& i = code.instructions[k];
    i.index = static_cast<uint32_t>(k);
    auto [entry, fresh] = spellings.try_emplace(s.opcode);
    Spelling& spelling = entry->second;
    if (fresh) {
      spelling.row = find_row(s.opcode, spelling.slots);
      spelling.lanewise = is_lanewise(s.opcode);
      spelling.visible = visible_of(s.opcode);
      spelling.aligned = s.opcode.find(".aligned") != std::string::npos;
    }
    if (spelling.lanewise) i.undefined = Undefined::lanewise;
    i.aligned = spelling.aligned;
    i.visible = spelling.visible;
    code.statements.push_back(&s);
    try {
      if (!spelling.row) refuse(m, s.line, code.name, "instruction " + s.opcode + " is not known to the interpreter");
      Bind b(m, code, s, i, spelling.slots);
      spelling.row->bind(b);
      if (!i.run) b.refuse("internal: the table has a row but no handler for " + s.opcode);
    } catch (const Finding& f) {
      refuse_to_run(code, i.index, f.message);
    }
    if (s.guard >= 0) {
      i.guard = code.offset_of[s.guard];
      i.guard_flip = s.guard_negated ? kAllLanes : 0;
    }
  }
  const uint64_t blocks = basic_blocks(code).size(), registers = code.offset_of.size();
  if (blocks * registers > ptx::kMostLive) {
    refuse(m, code.source->line, code.name,
           std::to_string(registers) + " registers in " + std::to_string(blocks) +
               " basic blocks: the product may be " + std::to_string(ptx::kMostLive));
  }
  code.order = converging_order(code);
  find_missing_wgmma_fences(code);
  find_offset_uses(code);
  share_registers(code);
  code.decoded = true;
}

// All or nothing: who asks again after a refusal gets the refusal again.
void decode_whole(Module& m, Code& code) {
  Code undecoded = code;
  try {
    decode(m, code);
  } catch (...) {
    code = std::move(undecoded);
    throw;
  }
}

}  // namespace

uint32_t frame_bytes(Type t) {
  return static_cast<uint32_t>(t == Type::pred ? 64 : std::max(2, ptx::size_of(t)) * kLanes);
}

int shared_variable(const Module& m, const Code& code, const std::string& name) {
  for (const auto* variables : {&code.shared_variables, &m.shared_variables})
    if (const auto v = variables->find(name); v != variables->end()) return v->second;
  return -1;
}

std::vector<uint32_t> branch_targets(const Instruction& i) {
  if (i.flow == Flow::branch) return {i.option};
  if (i.flow == Flow::table) return *static_cast<const std::vector<uint32_t>*>(i.data);
  return {};
}

std::string_view Module::line(int n) const {
  std::string_view rest = text;
  for (int k = 1; k < n; ++k) {
    const size_t end = rest.find('\n');
    if (end == std::string_view::npos) return {};
    rest.remove_prefix(end + 1);
  }
  rest = n > 0 ? rest.substr(0, rest.find('\n')) : std::string_view();
  rest.remove_prefix(std::min(rest.find_first_not_of(" \t"), rest.size()));
  return rest;
}

// Whether a write to global memory has a predicate. Where warps share elements, one of them stores them, by a
// predicate.
bool writes_by_predicate(std::string_view text) {
  while (!text.empty()) {
    std::string_view line = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(line.size() + 1, text.size()));
    line.remove_prefix(std::min(line.find_first_not_of(" \t"), line.size()));
    if (line.substr(0, 1) != "@" || line.find("global") == line.npos) continue;
    for (const char* verb : {" st.", " red.", " atom."})
      if (line.find(verb) != line.npos) return true;
  }
  return false;
}

std::unique_ptr<Module> load(std::string text) {
  static std::atomic<uint64_t> serial{0};
  auto m = std::make_unique<Module>();
  m->serial = ++serial;
  m->text = std::move(text);
  m->replicates =
      m->text.substr(0, 256).find("LLVM NVPTX Back-End") != std::string::npos && writes_by_predicate(m->text);
  try {
    m->source = ptx::parse(m->text);
  } catch (const ptx::SyntaxError& e) {
    refuse(*m, e.line, "", "the PTX does not parse: " + e.message);
  }
  m->arch = m->source.target;
  for (const auto& f : m->source.functions) {
    Code& code = m->functions[f.name];
    if (code.source && f.declared_only) continue;
    code.name = f.name;
    code.source = &f;
  }
  for (const auto& v : m->source.variables) {
    if (v.space == ptx::Space::shared) {
      add_shared(*m, v, m->shared_variables);
    } else if (!v.is_extern) {
      place_global(*m, v);
    }
  }
  for (const auto& v : m->source.variables) resolve_references(*m, v);
  for (auto& [name, code] : m->functions)
    for (const auto& v : code.source->variables)
      if (v.space == ptx::Space::shared) add_shared(*m, v, code.shared_variables);
  for (auto& [name, code] : m->functions)
    if (code.source->entry) lay_out_shared(*m, code);
  return m;
}

const Code* function(Module& m, const std::string& name) {
  const std::lock_guard lock(m.mutex);
  const auto entry = m.functions.find(name);
  if (entry == m.functions.end()) return nullptr;
  if (!entry->second.decoded) decode_whole(m, entry->second);
  // A function's address may be taken and called: so everything that has a body, if anything is called at all.
  bool again = entry->second.calls;
  while (again) {
    again = false;
    for (auto& [other, code] : m.functions) {
      if (code.decoded || code.source->declared_only || code.source->entry) continue;
      decode_whole(m, code);
      again = true;
    }
  }
  return &entry->second;
}

}  // namespace gpuless
