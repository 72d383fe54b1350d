// Control flow, PTX ISA 9.7.12: bra, brx.idx, call, ret, exit.
#include <cstring>

#include "../lanes.h"
#include "../system_calls.h"
#include "../table.h"

namespace gpuless {
namespace {

Step bra(Warp& w, const Instruction& i, Mask mask) {
  w.branch(mask, i.option);
  return Step::jumped;
}

// Lanes with different indices go to different targets.
Step brx(Warp& w, const Instruction& i, Mask mask) {
  const auto& targets = *static_cast<const std::vector<uint32_t>*>(i.data);
  const auto* index = w.operand<uint32_t>(i, 0);
  for (Mask rest = mask; rest;) {
    const int lane = __builtin_ctz(rest);
    const uint32_t n = index[lane];
    if (n >= targets.size()) {
      w.fail(Kind::illegal,
             "brx.idx with index " + std::to_string(n) + " into " + std::to_string(targets.size()) + " targets", lane);
    }
    Mask same = 0;
    for (Mask r = rest; r; r &= r - 1)
      if (index[__builtin_ctz(r)] == n) same |= Mask{1} << __builtin_ctz(r);
    rest &= ~same;
    if (!rest) {  // the last group takes the running strand along, with the lanes that fall through
      w.branch(same, targets[n]);
    } else {
      Strand& s = w.strand();
      s.mask &= ~same;
      w.strands.push_back({s.frame, targets[n], same});
    }
  }
  return Step::jumped;
}

Step ret(Warp& w, const Instruction&, Mask mask) {
  w.return_values(mask);
  w.leave(mask, false);
  return Step::jumped;
}

Step exit(Warp& w, const Instruction&, Mask mask) {
  w.leave(mask, true);
  return Step::jumped;
}

struct Call {
  const Code* target = nullptr;  // null: indirect, operand 0 holds its address
  SystemCall system = nullptr;
  std::vector<Code::Parameter> arguments, results;  // the caller's .param variables
};

Step call(Warp& w, const Instruction& i, Mask mask) {
  const Call& c = *static_cast<const Call*>(i.data);
  Frame* const caller = w.frame;
  if (c.system) {
    for (Mask rest = mask; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      uint8_t* area = caller->parameters.get() + lane * caller->code->param_bytes;
      uint64_t arguments[8] = {};
      for (size_t k = 0; k < c.arguments.size(); ++k) {
        std::memcpy(&arguments[k], area + c.arguments[k].offset, std::min<int64_t>(8, c.arguments[k].bytes));
      }
      const uint64_t result = c.system(w, lane, arguments);
      if (!c.results.empty()) std::memcpy(area + c.results[0].offset, &result, c.results[0].bytes);
    }
    return Step::next;
  }
  const Code* target = c.target;
  if (!target) {
    const auto* address = w.operand<uint64_t>(i, 0);
    const uint64_t first = address[__builtin_ctz(mask)];
    for (Mask rest = mask; rest; rest &= rest - 1) {
      if (address[__builtin_ctz(rest)] != first) {  // the others stay at the call and come back to it
        mask &= ~(Mask{1} << __builtin_ctz(rest));
      }
    }
    for (const auto& [name, code] : w.cta->launch->module->functions)
      if (reinterpret_cast<uint64_t>(&code) == first && code.decoded && !code.source->entry) target = &code;
    if (!target) w.fail(Kind::illegal, "call through a pointer that is no function", __builtin_ctz(mask));
  }
  if (target->parameters.size() != c.arguments.size() || target->returns.size() < c.results.size()) {
    w.fail(Kind::illegal, target->name + " is called with other parameters than it has");
  }
  Frame* f = w.enter(*target, caller, &i, mask);
  f->results = c.results;
  for (size_t k = 0; k < c.arguments.size(); ++k) {
    for (Mask rest = mask; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      std::memcpy(f->parameters.get() + lane * target->param_bytes + target->parameters[k].offset,
                  caller->parameters.get() + lane * caller->code->param_bytes + c.arguments[k].offset,
                  std::min(c.arguments[k].bytes, target->parameters[k].bytes));
    }
  }
  Strand& s = w.strand();
  const Mask others = s.mask & ~mask;
  const uint32_t here = s.pc;
  s.frame = f;
  s.pc = 0;
  s.mask = mask;
  if (others) {
    const Mask calls_too = others & (w.predicate(i.guard) ^ i.guard_flip);
    if (calls_too) w.strands.push_back({caller, here, calls_too});
    if (others & ~calls_too) w.strands.push_back({caller, here + 1, others & ~calls_too});
  }
  return Step::jumped;
}

uint32_t label(Bind& b, const Operand& o) {
  if (o.kind != Operand::Kind::symbol || o.id < 0) b.refuse("the target must be a label");
  return static_cast<uint32_t>(o.id);
}

std::vector<Code::Parameter> param_variables(Bind& b, const Operand& list) {
  std::vector<Code::Parameter> parameters;
  for (const Operand& o : list.parts) {
    const auto entry = b.code.param_offset.find(o.name);
    if (o.kind != Operand::Kind::symbol || entry == b.code.param_offset.end()) {
      b.refuse("a call's arguments and results must be .param variables");
    }
    int64_t bytes = 0;
    for (const auto* variables : {&b.code.source->variables, &b.code.source->parameters, &b.code.source->returns})
      for (const auto& v : *variables)
        if (v.name == o.name) bytes = v.bytes;
    parameters.push_back({entry->second, bytes});
  }
  return parameters;
}

void bind_call(Bind& b) {
  Call& c = b.data<Call>();
  c.results = param_variables(b, b.operand(0));
  c.arguments = param_variables(b, b.operand(2));
  const Operand& target = b.operand(1);
  b.code.calls = true;
  b.run(call);
  if (target.kind == Operand::Kind::reg) return b.source(target, Type::b64);
  const auto f = b.module.functions.find(target.name);
  if (f == b.module.functions.end()) b.refuse("function " + target.name + " is not declared");
  if (f->second.source->entry) b.refuse("a kernel cannot be called: " + target.name);
  c.target = &f->second;
  if (f->second.source->declared_only) {
    size_t arguments = 0;
    c.system = system_call(target.name, &arguments);
    if (!c.system) b.refuse("function " + target.name + " has no body here, and the interpreter does not provide it");
    if (c.arguments.size() != arguments || c.results.size() > 1 || (c.results.size() == 1 && c.results[0].bytes > 8))
      b.refuse("function " + target.name + " is called with other parameters than it has");
  }
}

const Row rows[] = {
    {"bra.uni?", "9.7.12.3",
     [](Bind& b) {
       b.instruction.option = label(b, b.operand(0));
       b.instruction.flow = Flow::branch;
       b.run(bra);
     }},
    {"brx.idx.uni?", "9.7.12.4",
     [](Bind& b) {
       b.source(0, Type::u32);
       auto& targets = b.data<std::vector<uint32_t>>();
       for (const Operand& o : b.operand(1).parts) targets.push_back(label(b, o));
       b.instruction.flow = Flow::table;
       b.run(brx);
     }},
    {"call.uni?", "9.7.12.5", bind_call},
    {"ret.uni?", "9.7.12.6",
     [](Bind& b) {
       b.instruction.flow = Flow::end;
       b.run(ret);
     }},
    {"exit", "9.7.12.7",
     [](Bind& b) {
       b.instruction.flow = Flow::end;
       b.run(exit);
     }},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
