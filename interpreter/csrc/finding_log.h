#pragma once
// GPULESS_LOG=FILE: every finding is a line of JSON in that file, written when it is first seen, so that a process that
// is killed loses none. The same file has what was refused or ran out of time, and at exit a line with the totals:
//
//   {"event": "finding", "pid": 7, "kind": "race", ...}    the fields of Finding::json()
//   {"event": "incomplete", "pid": 7, "why": "..."}        something was asked for and not done
//   {"event": "explored", "pid": 7, "orders": 6, ...}      the fields of ExploredLaunch::json()
//   {"event": "end", "pid": 7, "launches": 3, "warp_instructions": 1234, "counts": [2, 1]}
//
// counts: how often each finding of the process came, in order. Each line is one write() to a file opened for
// appending: several processes may share it.
#include <cstdint>
#include <string>

#include "finding.h"

namespace gpuless {

// A finding that is seen. Its line is written the first time; `times` is added to its count.
void log_finding(const Finding&, uint64_t times);
// What was asked for and not done: a limit that ran out, a call that is refused.
void log_incomplete(const std::string& why);
// The JSON of a launch whose orders were explored.
void log_explored(const std::string& json);
// How often log_incomplete was called in this process, with or without a file.
int times_incomplete();

}  // namespace gpuless
