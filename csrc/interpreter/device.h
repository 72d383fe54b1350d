#pragma once
// The GPU that there is: what its driver would say about it, and the limits that launches are held to.
#include <cstdint>

#include "program.h"

namespace forwardpass::interpreter {

struct Device {
  const char* arch;  // "sm_80", "sm_89", "sm_90a"
  const char* name;
  int major, minor, multiprocessors;
  int64_t shared_per_block, shared_per_block_optin, shared_per_multiprocessor;  // bytes
  int registers_per_multiprocessor, threads_per_multiprocessor, blocks_per_multiprocessor;
  bool clusters;
};

const Device* current_device();                  // null: none is set
const Device* find_device(const char* arch);     // null: unknown
bool set_device(const char* arch);               // null: none

// CTAs of this kernel that one multiprocessor holds.
int resident_blocks(const Device&, const Code&, int threads, int64_t shared_bytes);

}  // namespace forwardpass::interpreter
