#pragma once
// What launches did and what time they would take: counters by source line, the timeline, the table of instructions.
#include "cudart.h"

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// What has been counted under a name, a record for each kernel and shape of launch with what each instruction did:
// [{kernel, arch, multiprocessors, resident, grid, block, cluster, shared_bytes, launches, footprint_read,
// footprint_written, instructions: [{opcode, class, file, line, inner_file, inner_line, ptx_line, ...}]}]. file and
// line are the kernel's own, inner_ those of the function that was inlined there. The environment's
// GPULESS_COUNTERS=FILE counts every launch of a process, and writes all that to the file at exit.
const char* gpuless_profile_json(uint64_t name);
void gpuless_profile_forget(uint64_t name);

// Every instruction of the kernels that were counted under a name, and of the functions that they called, with whether
// it was executed: [{kernel, function, module, instructions: [{opcode, file, line, ..., ptx_line, guarded, active,
// passed}]}]. active: times with a lane at least; passed: times that lanes of it went by, as the guard was off. The
// environment's GPULESS_COVERAGE=FILE counts every launch of a process, and writes that of all names to the file at
// exit.
const char* gpuless_coverage_json(uint64_t name);

// The modelled time of each kernel and shape of launch under a name (gpuless_options::timeline), whose kernel's name
// has `kernel` in it; "" and a finding where that fails. `machine` has a rate or latency a line, "name<tab>value", as
// python/gpuless/latencies.py writes them; `resident`: clusters of a multiprocessor, 0: as assumed.
// [{kernel, arch, grid, block, cluster, launches, cycles, busy, instructions: [{opcode, file, line, ..., issued,
// waited: {reason: cycles}}], tracks, names, spans: [[track, name, begin, end]]}]. The first launch of each shape
// counts.
// The environment's GPULESS_TIMELINE=FOLDER records every launch of a process, and writes all that to
// FOLDER/timeline.json at exit; the machines are in FOLDER/sm_80.txt and so on.
const char* gpuless_timeline_json(uint64_t name, const char* kernel, const char* machine, int resident);
void gpuless_timeline_forget(uint64_t name);

// Every row of the instruction table as JSON: [{"pattern":…,"section":…}].
const char* gpuless_rows_json(void);

// Called before each launch, in its thread, with what repeats it. Null: no longer.
struct gpuless_launch_record {
  const char *ptx, *kernel;
  struct gpuless_launch_config config;
  const void* parameters;
  int64_t parameter_bytes;
};
void gpuless_on_launch(void (*)(const struct gpuless_launch_record*));

// To time host code alone: while on, this thread's gpuless_launch runs nothing and returns success. Its next
// gpuless_set_device ends that, so that no kernel of a device set later is lost. Returns how many launches were dropped
// while it was on.
int64_t gpuless_drop_launches(int on);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
