#include "blocks.h"

#include "decode.h"
#include "rows/mov.h"

namespace gpuless {

std::vector<BasicBlock> basic_blocks(const Code& function) {
  const auto& code = function.instructions;
  std::vector<char> leader(code.size() + 1, 0);
  leader[0] = 1;
  for (size_t k = 0; k < code.size(); ++k) {
    if (code[k].flow == Flow::next) continue;
    leader[k + 1] = 1;
    for (const uint32_t t : branch_targets(code[k])) leader[t] = 1;
  }
  std::vector<BasicBlock> blocks;
  std::vector<int> block_of(code.size());
  for (int k = 0; k < static_cast<int>(code.size()); ++k) {
    if (leader[k]) blocks.push_back({k, 0, {}});
    block_of[k] = static_cast<int>(blocks.size()) - 1;
    blocks.back().end = k + 1;
  }
  for (BasicBlock& b : blocks) {
    const Instruction& last = code[b.end - 1];
    for (const uint32_t t : branch_targets(last)) b.next.push_back(block_of[t]);
    const bool goes_on = last.flow == Flow::next || last.guard != kAlwaysTrue;
    if (goes_on && b.end < static_cast<int>(code.size())) b.next.push_back(block_of[b.end]);
  }
  return blocks;
}

std::vector<uint32_t> converging_order(const Code& function) {
  const auto blocks = basic_blocks(function);
  const int exit = static_cast<int>(blocks.size());
  std::vector<std::vector<int>> before(blocks.size() + 1);
  for (int b = 0; b < exit; ++b) {
    for (const int next : blocks[b].next) before[next].push_back(b);
    if (function.instructions[blocks[b].end - 1].flow == Flow::end) before[exit].push_back(b);
  }
  // Depth first from the exit, against the flow: what has a block on its every way to the exit is left before it is.
  std::vector<uint32_t> order(function.instructions.size());
  uint32_t place = 0;
  std::vector<char> seen(blocks.size() + 1, 0);
  std::vector<std::pair<int, size_t>> path;  // a block, and how many of those before it have been seen to
  const auto search = [&](int from) {
    if (seen[from]) return;
    seen[from] = 1;
    path.push_back({from, 0});
    while (!path.empty()) {
      auto& [b, done] = path.back();
      if (done < before[b].size()) {
        const int next = before[b][done++];
        if (!seen[next]) {
          seen[next] = 1;
          path.push_back({next, 0});
        }
        continue;
      }
      if (b != exit)
        for (int k = blocks[b].begin; k < blocks[b].end; ++k) order[k] = place++;
      path.pop_back();
    }
  };
  search(exit);
  for (int b = 0; b < exit; ++b) search(b);  // that never end
  return order;
}

std::vector<char> asynchronous_registers(const Code& code, const Registers& registers) {
  std::vector<char> marks(code.offset_of.size(), 0);
  for (bool again = true; again;) {
    again = false;
    for (const Instruction& i : code.instructions) {
      bool any = i.asynchronous;
      if (is_move(i)) registers.visit(i, [&](int id, bool) { any |= marks[id] != 0; });
      if (!any) continue;
      registers.visit(i, [&](int id, bool) {
        again |= !marks[id];
        marks[id] = 1;
      });
    }
  }
  return marks;
}

}  // namespace gpuless
