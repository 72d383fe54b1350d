#pragma once
// The GPU that there is: its properties (cudart.h), and what fits into one of its multiprocessors.
#include <string>

#include "profile.h"
#include "program.h"

namespace gpuless {

using Device = gpuless_device_properties;

const Device* current_device();               // null: none is set
const Device* find_device(const char* arch);  // null: unknown
bool set_device(const char* arch);            // null: none
bool drops_launch();                          // gpuless_drop_launches is on in this thread; counts this launch

constexpr int kThreadsPerBlock = 1024;
unsigned max_threads(const ptx::Function&);  // of a block: .maxntid, .reqntid or the device's

// Registers of a thread. PTX does not say how many ptxas will give, so this is an assumption: as many as .maxnreg or
// .minnctapersm allow, 64 where neither is given, and never more than a block of the kernel's largest size can have.
int assumed_registers(const Device&, const ptx::Function&);

// CTAs of a kernel that one multiprocessor holds, by threads, registers and shared memory (the reserved part on top).
int resident_blocks(const Device&, int registers, int threads, int64_t shared_bytes);
int resident_blocks(const Device&, const Code&, int threads, int64_t shared_bytes);

// What a refusal says where a kernel and its dynamic shared memory do not fit.
std::string shared_words(const Device&, const Code&, int64_t dynamic_shared);

// Clusters of `size` CTAs that run at once: all CTAs of a cluster are in one GPC.
int resident_clusters(const Device&, int blocks_per_multiprocessor, int size);
constexpr int kPortableCluster = 8, kLargestCluster = 16;

}  // namespace gpuless
