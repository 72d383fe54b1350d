// The order that ptxas would give instructions: what takes long goes early, as far as its operands and memory allow.
// PTX has the order of the source, and a warp issues in order.
#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "blocks.h"
#include "timeline_ops.h"

namespace gpuless {
namespace {

// How far an instruction may overtake others: registers are few, and ptxas does not fill them with what is not needed
// yet.
constexpr size_t kWindow = 64;

// What a result is expected to take, in cycles; the machine's own figures are in latencies.py.
int expected_latency(const Op& op, const Line& line) {
  if (op.kind == Op::Kind::free) return 0;
  if (op.kind == Op::Kind::mma) return 32;
  if (op.kind == Op::Kind::memory)
    return std::strstr(line.name, "global") || std::strstr(line.name, "generic") ? 300 : 30;
  if (op.kind == Op::Kind::alu && (op.pipe == Pipe::special || op.pipe == Pipe::shuffle)) return 20;
  return 4;
}

// Nothing goes past these.
bool is_wall(const Op& op) {
  switch (op.kind) {
    case Op::Kind::free:
    case Op::Kind::alu:
    case Op::Kind::memory:
    case Op::Kind::mma:
    case Op::Kind::wgmma:
    case Op::Kind::wgmma_commit:
    case Op::Kind::copy:
    case Op::Kind::copy_commit:
    case Op::Kind::bulk:
    case Op::Kind::bulk_commit:
      return false;
    default:
      return true;
  }
}

struct Node {
  std::vector<int> next;
  int before = 0;  // nodes that it waits for
  int latency = 0;
  int urgency = 0;  // cycles from here to the end of what depends on it
  int earliest = 0;
};

class Segment {
 public:
  Segment(const Code& code, const Op* ops, const Line* lines, int begin, int end) : code_(code), begin_(begin) {
    nodes_.resize(static_cast<size_t>(end - begin));
    for (int k = begin; k < end; ++k) {
      node(k).latency = expected_latency(ops[k], lines[k]);
      registers(k);
      memory(k, ops[k], lines[k]);
    }
    for (size_t k = nodes_.size(); k--;) {
      nodes_[k].urgency = nodes_[k].latency;
      for (const int n : nodes_[k].next)
        nodes_[k].urgency = std::max(nodes_[k].urgency, nodes_[k].latency + nodes_[static_cast<size_t>(n)].urgency);
    }
  }

  void order(Op* ops) {
    std::vector<size_t> left(nodes_.size());
    for (size_t k = 0; k < left.size(); ++k) left[k] = k;
    int now = 0;
    for (uint32_t rank = 0; !left.empty(); ++rank) {
      size_t best = left.size();
      for (size_t k = 0; k < std::min(kWindow, left.size()); ++k) {
        const Node& n = nodes_[left[k]];
        if (n.before) continue;
        if (best == left.size() || better(n, nodes_[left[best]], now)) best = k;
      }
      Node& n = nodes_[left[best]];
      Op& op = ops[static_cast<size_t>(begin_) + left[best]];
      op.rank = rank;
      now = std::max(now, n.earliest);
      for (const int next : n.next) {
        Node& other = nodes_[static_cast<size_t>(next)];
        --other.before;
        other.earliest = std::max(other.earliest, now + n.latency);
      }
      if (op.kind != Op::Kind::free) now += op.slots;
      left.erase(left.begin() + static_cast<std::ptrdiff_t>(best));
    }
  }

 private:
  Node& node(int k) { return nodes_[static_cast<size_t>(k - begin_)]; }
  static bool better(const Node& a, const Node& b, int now) {
    const bool a_ready = a.earliest <= now, b_ready = b.earliest <= now;
    if (a_ready != b_ready) return a_ready;
    if (!a_ready && a.earliest != b.earliest) return a.earliest < b.earliest;
    return a.urgency > b.urgency;
  }
  void after(int k, int earlier) {
    if (earlier < begin_ || earlier == k) return;
    node(earlier).next.push_back(k - begin_);
    ++node(k).before;
  }

  void registers(int k) {
    const Statement& s = *code_.statements[static_cast<size_t>(k)];
    const Instruction& i = code_.instructions[static_cast<size_t>(k)];
    const auto read = [&](int id) {
      const auto writer = writer_.find(id);
      if (writer != writer_.end()) after(k, writer->second);
      readers_[id].push_back(k);
    };
    const auto write = [&](int id) {
      for (const int reader : readers_[id]) after(k, reader);
      readers_[id].clear();
      const auto writer = writer_.find(id);
      if (writer != writer_.end()) after(k, writer->second);
      writer_[id] = k;
    };
    if (s.guard >= 0) read(s.guard);
    const bool writes = writes_first_operand(s, i), reads_too = i.updates || i.asynchronous || s.guard >= 0;
    for (size_t o = writes && !reads_too; o < s.operands.size(); ++o) each_register(s.operands[o], read);
    if (writes) each_register(s.operands[0], write);
  }

  // A load stays behind the stores before it, and a store behind loads, in the spaces that they may share; what is
  // asynchronous keeps its order.
  void memory(int k, const Op& op, const Line& line) {
    if (op.kind != Op::Kind::memory) {
      if (op.kind == Op::Kind::free || op.kind == Op::Kind::alu || op.kind == Op::Kind::mma) return;
      after(k, asynchronous_);
      asynchronous_ = k;
      return;
    }
    const bool shared = std::strstr(line.name, "shared") || std::strstr(line.name, "matrix");
    const bool global = std::strstr(line.name, "global"), anywhere = !shared && !global;
    const bool stores =
        std::strstr(line.name, "store") || std::strstr(line.name, "stmatrix") || std::strstr(line.name, "atomic");
    for (int space = 0; space < 2; ++space) {
      if (!anywhere && (space == 0) != shared) continue;
      after(k, stored_[space]);
      if (!stores) {
        loaded_[space].push_back(k);
        continue;
      }
      for (const int load : loaded_[space]) after(k, load);
      loaded_[space].clear();
      stored_[space] = k;
    }
  }

  const Code& code_;
  const int begin_;
  std::vector<Node> nodes_;
  std::unordered_map<int, int> writer_;
  std::unordered_map<int, std::vector<int>> readers_;
  int stored_[2] = {-1, -1}, asynchronous_ = -1;
  std::vector<int> loaded_[2];
};

}  // namespace

void schedule(const Code& code, const Line* lines, Op* ops, uint32_t first_segment) {
  uint32_t segment = first_segment;
  for (const BasicBlock& block : basic_blocks(code)) {
    int begin = block.begin;
    for (int k = block.begin; k < block.end; ++k) {
      if (is_wall(ops[k])) {
        Segment(code, ops, lines, begin, k).order(ops);
        begin = k + 1;
      }
      if (k > block.begin && (is_wall(ops[k]) || is_wall(ops[k - 1]))) ++segment;
      ops[k].segment = segment;
    }
    Segment(code, ops, lines, begin, block.end).order(ops);
    ++segment;
  }
}

void Ops::arrange(std::vector<TraceEvent>& events) const {
  for (size_t k = 0; k + 1 < events.size(); ++k) events[k].jumps = events[k + 1].op != events[k].op + 1;
  for (size_t begin = 0, end; begin < events.size(); begin = end) {
    for (end = begin + 1; end < events.size() && events[end].op == events[end - 1].op + 1 &&
                          ops[events[end].op].segment == ops[events[begin].op].segment;) {
      ++end;
    }
    std::sort(events.begin() + static_cast<std::ptrdiff_t>(begin), events.begin() + static_cast<std::ptrdiff_t>(end),
              [&](const TraceEvent& a, const TraceEvent& b) { return ops[a.op].rank < ops[b.op].rank; });
  }
}

}  // namespace gpuless
