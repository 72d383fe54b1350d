#pragma once
// The C API of the interpreter, one shared library per process (_interpreter.so): the stand-in for cudart, Triton's
// driver and Python's ctypes meet here. Functions that can fail return a cudaError_t; fpi_finding() has the words.
#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// Which GPU there is: "sm_80" (A100), "sm_89" (L40S), "sm_90a" (H100), "sm_100a" (B200), "sm_120" (RTX PRO
// 6000); "sm_90a/16": so many of its multiprocessors, as a MIG slice has. Null: none; launches then return
// cudaErrorNoDevice.
int fpi_set_device(const char* arch);
const char* fpi_device(void);

// What its driver would say about it, and the limits that launches are held to. Bytes, kHz, CTAs and threads.
struct fpi_device_properties {
  const char *arch, *name;
  int32_t major, minor, multiprocessors;
  int64_t shared_per_block, shared_per_block_optin, shared_per_multiprocessor, shared_reserved_per_block;
  int32_t registers_per_block, registers_per_multiprocessor, threads_per_block, threads_per_multiprocessor;
  int32_t blocks_per_multiprocessor, clusters;  // clusters: launches with them, and programmatic dependent launches
  int64_t memory, l2_cache, persisting_l2_cache;
  int32_t clock, memory_clock, memory_bus_bits;
};
const struct fpi_device_properties* fpi_device_get(void);  // null: none

struct fpi_options {
  uint64_t seed;
  int32_t checks, truncating, approximate, threads;
  uint64_t step_limit;  // warp instructions of one CTA; 0: the default
  uint64_t counters;    // not 0: counts what launches do, under this name
  int32_t timeline;     // records besides what fpi_timeline_json spends time on
  int32_t sample;       // not 0: only so many clusters of a launch run, and count for all of them
  int32_t findings, isa;
};
// fpi_options::findings: the first is an error of its launch, or each is kept and the launch goes on where it can. isa:
// what becomes of those that break the letter of the ISA and no hardware: kept, an error as others are, or forgotten.
enum { fpi_findings_raise, fpi_findings_collect };
enum { fpi_isa_report, fpi_isa_ignore, fpi_isa_raise };
// Starts the seed's schedules anew: the first launch after it is scheduled as the first of any process is.
void fpi_set_options(const struct fpi_options*);
void fpi_get_options(struct fpi_options*);

// Launches may take so many seconds together from now on, and then end with cudaErrorLaunchTimeout. 0: no limit.
void fpi_set_time_limit(double seconds);
// Rules of findings that are kept and no errors, a line each (ignore_rules.h), in place of those before. Null, or what
// is wrong with them, and then nothing has changed.
const char* fpi_ignore(const char* rules);

// Storage that kernels may touch. Scopes nest per process: leaving one forgets what was added inside it.
void fpi_storage_enter(void);
void fpi_storage_add(const void* begin, int64_t bytes, const char* name, int read_only);
void fpi_storage_remove(const void* begin);
void fpi_storage_leave(void);
int fpi_storage_find(const void* begin, int64_t bytes);                     // 1: within one of them
int fpi_storage_region(const void* address, void** begin, int64_t* bytes);  // 1: within this one

// Device memory, poisoned and registered; null: the device has no more. What there is around a pointer, or zero bytes.
enum { fpi_memory_device, fpi_memory_host, fpi_memory_managed };
void* fpi_allocate(int64_t bytes, int kind);
int fpi_release(void* begin);  // 0: it is none of these
int64_t fpi_allocation(const void* pointer, void** begin, int* kind);
int64_t fpi_memory_free(void);
int64_t fpi_memory_peak(int reset);  // the most bytes in use so far, or since the last reset

// Device memory as a DLManagedTensor of bytes on CUDA's device 0, and the whole of such memory again as the CPU's; its
// deleter has to be called. Null: the device has no more; no memory of the first begins there.
void* fpi_dlpack_allocate(int64_t bytes);
void* fpi_dlpack_host_view(void* data, int64_t bytes);

// PTX modules (Triton, tests). Null on failure. `kernel` null: the only entry.
void* fpi_module_load(const char* ptx);
void fpi_module_unload(void* module);
const char* fpi_module_json(void* module);  // {arch, entries: [{name, shared_bytes, registers, parameters: [..]}]}
int fpi_module_launch(void* module, const char* kernel, const unsigned grid[3], const unsigned block[3],
                      const unsigned cluster[3], int64_t dynamic_shared, const void* parameters,
                      int64_t parameter_bytes, int programmatic);

// Fat binaries, as nvcc's host code registers them (standin/). A kernel is known by its host stub's address.
void* fpi_image_register(const void* wrapper);
void fpi_image_unregister(void* image);
void fpi_kernel_register(void* image, const void* host, const char* name);
void fpi_variable_register(void* image, const void* host, const char* name);
int fpi_variable(const void* host, void** address, int64_t* bytes);

// Code that is loaded at run time: PTX text, or a fat binary, which may have a wrapper. Kernels and variables of any
// image by their names become ones with a host address, which the functions above and below then take.
int fpi_image_load(const void* code, void** image);
int fpi_image_kernel(void* image, const char* name, const void** host);
int fpi_image_variable(void* image, const char* name, const void** host);

struct fpi_launch_config {
  unsigned grid[3], block[3], cluster[3];
  int64_t dynamic_shared;
  int programmatic, cooperative;
};
int fpi_launch(const void* host, const struct fpi_launch_config*, void** args);

// Streams, by their handles, that are captured into graphs; null and 1 are the legacy one, 2 is the thread's own. Modes
// and what is returned are cudart's.
int fpi_capture_begin(void* stream, int mode, int blocking);  // blocking: made without cudaStreamNonBlocking
int fpi_capture_end(void* stream, void** graph);
int fpi_capture_status(void* stream, int* status);
int fpi_capture_mode(int mode);  // of this thread, cudaThreadExchangeStreamCaptureMode; returns the one before
int fpi_capturing(void);         // 0: no stream is captured, and nothing here has to be asked
struct fpi_work {
  int (*run)(void* data);  // returns a cudaError_t
  void (*forget)(void* data);
  void* data;
};
// Work that is put into a stream. *kept: the graph will do it, and else whoever asks. Forgets it when nobody needs it.
int fpi_capture_keep(void* stream, const struct fpi_work*, int* captured);
// Whether some capture forbids a call, which ends that capture: one that allocates, frees or may wait for the device
// ("unsafe"), one that waits for a stream or for the device, a stream's waiting for what is outside of its capture.
enum { fpi_unsafe, fpi_waits_for_stream, fpi_waits_for_device, fpi_waits_for_event };
int fpi_capture_refuses(int what, void* stream);
void* fpi_graph_copy(const void* graph);
void fpi_graph_release(void* graph);
int fpi_graph_launch(const void* graph);

// To time host code alone: while on, this thread's fpi_launch runs nothing and returns success. Its next fpi_set_device
// ends that, so that no kernel of a device set later is lost. Returns how many launches were dropped while it was on.
int64_t fpi_drop_launches(int on);

// Called before each launch, in its thread, with what repeats it. Null: no longer.
struct fpi_launch_record {
  const char *ptx, *kernel;
  struct fpi_launch_config config;
  const void* parameters;
  int64_t parameter_bytes;
};
void fpi_on_launch(void (*)(const struct fpi_launch_record*));

struct fpi_kernel_properties {
  const char* name;
  int64_t static_shared, local, constant, max_dynamic_shared;
  int32_t max_threads, registers, parameters, cluster[3], nonportable_clusters;  // registers: assumed, PTX has none
};
int fpi_kernel(const void* host, struct fpi_kernel_properties*);
int fpi_kernel_parameter(const void* host, int index, int64_t* offset, int64_t* bytes);
int fpi_kernel_allow_shared(const void* host, int64_t dynamic_bytes);
int fpi_kernel_allow_nonportable_clusters(const void* host, int allow);
int fpi_occupancy(const void* host, int threads, int64_t dynamic_shared, int* blocks);  // of one multiprocessor
// The largest cluster that fits, and how many of the config's size run at once.
int fpi_cluster_occupancy(const void* host, const struct fpi_launch_config*, int* largest, int* clusters);

// cuTensorMapEncodeTiled with its limits, for the 128 bytes that stand in for a CUtensorMap here. A CUresult; the
// reason for any but 0 is fpi_tensor_map_error(), of this thread. strides_bytes has rank - 1 entries.
int fpi_tensor_map_encode_tiled(void* map, int data_type, uint32_t rank, void* address, const uint64_t* dims,
                                const uint64_t* strides_bytes, const uint32_t* box, const uint32_t* element_strides,
                                int interleave, int swizzle, int l2_promotion, int oob_fill);
const char* fpi_tensor_map_error(void);

// Why the last call of this thread that was refused with this cudaError_t was: what was asked for and what the limit
// is. Empty where the code says it all, and once it was asked.
const char* fpi_take_refusal(int error);
void fpi_refuse(int error, const char* why);

// The last finding of this thread as text and as JSON, empty if there was none since fpi_finding_clear().
const char* fpi_finding(void);
const char* fpi_finding_json(void);
void fpi_finding_clear(void);
// Those behind which launches went on since it was asked last, or that ended one and were kept, each once, as a list.
const char* fpi_findings_json(void);

// Called with each finding, once a launch. `error`: the cudaError_t that it becomes; 0 where it is kept.
struct fpi_finding_record {
  const char *text, *summary;  // a paragraph; a line: kind, place and kernel
  uint64_t count;
  int error, ignored, isa;  // ignored: by a rule; isa: breaks no hardware
};
void fpi_on_finding(void (*)(const struct fpi_finding_record*));

// Counters since the last reset: warp instructions, nanoseconds and multiply-accumulates within mma and wgmma,
// launches.
struct fpi_counters {
  uint64_t launches, warp_instructions, matrix_ns, matrix_macs;
};
void fpi_counters_read(struct fpi_counters*);
void fpi_counters_reset(void);

// What has been counted under a name, a record for each kernel and shape of launch with what each instruction did:
// [{kernel, arch, multiprocessors, resident, grid, block, cluster, shared_bytes, launches, footprint_read,
// footprint_written, instructions: [{opcode, class, file, line, inner_file, inner_line, ptx_line, ...}]}]. file and
// line are the kernel's own, inner_ those of the function that was inlined there. The environment's
// FORWARDPASS_INTERPRET_COUNTERS=FILE counts every launch of a process, and writes all that to the file at exit.
const char* fpi_profile_json(uint64_t name);
void fpi_profile_forget(uint64_t name);

// The modelled time of each kernel and shape of launch under a name (fpi_options::timeline), whose kernel's name has
// `kernel` in it; "" and a finding where that fails. `machine` has a rate or latency a line, "name<tab>value", as
// python/forwardpass/interpreter/latencies.py writes them; `resident`: clusters of a multiprocessor, 0: as assumed.
// [{kernel, arch, grid, block, cluster, launches, cycles, busy, instructions: [{opcode, file, line, ..., issued,
// waited: {reason: cycles}}], tracks, names, spans: [[track, name, begin, end]]}]. The first launch of each shape
// counts.
// The environment's FORWARDPASS_INTERPRET_TIMELINE=FOLDER records every launch of a process, and writes all that to
// FOLDER/timeline.json at exit; the machines are in FOLDER/sm_80.txt and so on.
const char* fpi_timeline_json(uint64_t name, const char* kernel, const char* machine, int resident);
void fpi_timeline_forget(uint64_t name);

// Every row of the instruction table as JSON: [{"pattern":…,"section":…}].
const char* fpi_rows_json(void);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
