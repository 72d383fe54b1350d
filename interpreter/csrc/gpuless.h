#pragma once
// What an embedder of gpuless needs: a GPU, memory that kernels may touch, modules of PTX, launches, and what was
// found. One shared library per process (libgpuless.so). Functions that can fail return a cudaError_t;
// gpuless_finding() has the words.
//
//   gpuless_set_device("sm_90a");
//   gpuless_storage_enter();
//   gpuless_storage_add(x, bytes, "x", 0);
//   void* module = gpuless_module_load(ptx);
//   if (gpuless_module_launch(module, "k", grid, block, cluster, 0, parameters, size, 0)) puts(gpuless_finding());
//   gpuless_storage_leave();
#include <stdint.h>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// The version of this library, that of the Python package: what was linked against another may not fit.
const char* gpuless_version(void);

// Which GPU there is: "sm_80" (A100), "sm_89" (L40S), "sm_90a" (H100), "sm_100a" (B200), "sm_120" (RTX PRO
// 6000); "sm_90a/16": so many of its multiprocessors, as a MIG slice has. Null: none; launches then return
// cudaErrorNoDevice.
int gpuless_set_device(const char* arch);
const char* gpuless_device(void);

struct gpuless_options {
  uint64_t seed;
  int32_t checks, truncating, approximate, threads;
  uint64_t step_limit;  // warp instructions of one CTA; 0: the default
  uint64_t counters;    // not 0: counts what launches do, under this name
  int32_t timeline;     // records besides what gpuless_timeline_json spends time on
  int32_t sample;       // not 0: only so many clusters of a launch run, and count for all of them
  int32_t findings, isa;
  int64_t largest;  // not 0: bytes that a tensor may have, for which 32-bit offsets of smaller ones are judged
};
// gpuless_options::findings: the first is an error of its launch, or each is kept and the launch goes on where it can.
// isa: what becomes of those that break the letter of the ISA and no hardware: kept, an error as others are, or
// forgotten.
enum { gpuless_findings_raise, gpuless_findings_collect };
enum { gpuless_isa_report, gpuless_isa_ignore, gpuless_isa_raise };
// Starts the seed's schedules anew: the first launch after it is scheduled as the first of any process is.
void gpuless_set_options(const struct gpuless_options*);
void gpuless_get_options(struct gpuless_options*);

// Before each launch tries so many orders of its synchronisation, from the next launch on; 0: none. Or repeats the
// order that a finding's schedule names, in the launch that it names; "": none.
void gpuless_explore(uint64_t orders, const char* schedule);
// What is wrong with a schedule; null: nothing.
const char* gpuless_wrong_schedule(const char* schedule);
// What was explored since it was asked last: a sentence for each launch; or a list of {kernel, launch, orders, runs,
// complete, limit}. `launch`: its number since the options were set; `orders`: those that differ; `limit`: why there
// may be more.
const char* gpuless_explored_text(void);
const char* gpuless_explored_json(void);

// Launches may take so many seconds together from now on, and then end with cudaErrorLaunchTimeout. 0: no limit.
void gpuless_set_time_limit(double seconds);
// Rules of findings that are kept and no errors, a line each (ignore_rules.h), in place of those before. Null, or what
// is wrong with them, and then nothing has changed.
const char* gpuless_ignore(const char* rules);

// Storage that kernels may touch. Scopes nest per process: leaving one forgets what was added inside it.
void gpuless_storage_enter(void);
void gpuless_storage_add(const void* begin, int64_t bytes, const char* name, int read_only);
void gpuless_storage_leave(void);

// PTX modules (Triton, tests). Null on failure. `kernel` null: the only entry.
void* gpuless_module_load(const char* ptx);
void gpuless_module_unload(void* module);
const char* gpuless_module_json(void* module);  // {arch, entries: [{name, shared_bytes, registers, parameters: [..]}]}
int gpuless_module_launch(void* module, const char* kernel, const unsigned grid[3], const unsigned block[3],
                          const unsigned cluster[3], int64_t dynamic_shared, const void* parameters,
                          int64_t parameter_bytes, int programmatic);

// The last finding of this thread as text and as JSON, empty if there was none since gpuless_finding_clear().
const char* gpuless_finding(void);
const char* gpuless_finding_json(void);
void gpuless_finding_clear(void);
// Those behind which launches went on since it was asked last, or that ended one and were kept, each once, as a list.
const char* gpuless_findings_json(void);

// Called with each finding, once a launch. `error`: the cudaError_t that it becomes; 0 where it is kept.
struct gpuless_finding_record {
  const char *text, *summary;  // a paragraph; a line: kind, place and kernel
  uint64_t count;
  int error, ignored, isa;  // ignored: by a rule; isa: breaks no hardware
  int refused;              // a limit of the interpreter (kind unsupported), no fault of the kernel
};
void gpuless_on_finding(void (*)(const struct gpuless_finding_record*));

// What was asked for and not done, such as a call that is refused: the verdict of a run with such is "incomplete". It
// is written to the file of the environment's GPULESS_LOG, which has every finding as it comes (finding_log.h). How
// often that was in this process; launches that ran out of time count too.
void gpuless_log_incomplete(const char* why);
int gpuless_times_incomplete(void);

// Counters since the last reset: warp instructions, nanoseconds and multiply-accumulates within mma and wgmma,
// launches.
struct gpuless_counters {
  uint64_t launches, warp_instructions, matrix_ns, matrix_macs;
};
void gpuless_counters_read(struct gpuless_counters*);
void gpuless_counters_reset(void);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
