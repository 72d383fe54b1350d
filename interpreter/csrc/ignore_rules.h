#pragma once
// Findings that a project knows of and lives with. A rule a line: kind, place, kernel; "*" stands for any of them:
//
//   race softmax.cu:120 softmax_forward4  # both write the same value
//   uninitialised * *gemm*                # rows beyond the matrix
//
// A place is a file, or file:line, of either access; its directories need not be named. Without line information it is
// ptx:line. A kernel is part of its name, demangled or not. "*" and "?" within a word stand for any characters, for
// one.
#include <string>
#include <string_view>
#include <vector>

#include "finding.h"

namespace gpuless {

class IgnoreRules {
 public:
  // Throws std::invalid_argument, which says what is wrong with which line.
  explicit IgnoreRules(std::string_view text);
  int match(const Finding&) const;  // the first rule that does, from 0 on; -1: none

 private:
  struct Rule {
    std::string kind, place, kernel;
  };
  std::vector<Rule> rules_;
};

}  // namespace gpuless
