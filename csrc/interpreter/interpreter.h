#pragma once
// The C API of the interpreter, one shared library per process (_interpreter.so): the stand-in for cudart, Triton's driver
// and Python's ctypes meet here. Functions that can fail return a cudaError_t; fpi_finding() has the words.
#include <cstddef>
#include <cstdint>

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// Which GPU there is: "sm_80" (A100), "sm_89" (L40S), "sm_90a" (H100). Null: none; launches then return cudaErrorNoDevice.
int fpi_set_device(const char* arch);
const char* fpi_device(void);

struct fpi_options {
  uint64_t seed;
  int32_t checks, truncating, approximate, threads;
  uint64_t step_limit;  // warp instructions of one CTA; 0: the default
};
void fpi_set_options(const struct fpi_options*);
void fpi_get_options(struct fpi_options*);

// Storage that kernels may touch. Scopes nest per process: leaving one forgets what was added inside it.
void fpi_storage_enter(void);
void fpi_storage_add(const void* begin, int64_t bytes, const char* name, int read_only);
void fpi_storage_remove(const void* begin);
void fpi_storage_leave(void);

// PTX modules (Triton, tests). Null on failure. `kernel` null: the only entry.
void* fpi_module_load(const char* ptx);
void fpi_module_unload(void* module);
const char* fpi_module_json(void* module);  // {arch, shared_bytes, entries: [{name, parameters: [{offset, size}]}]}
int fpi_module_launch(void* module, const char* kernel, const unsigned grid[3], const unsigned block[3],
                      const unsigned cluster[3], int64_t dynamic_shared, const void* parameters, int64_t parameter_bytes,
                      int programmatic);

// Fat binaries, as nvcc's host code registers them (standin.cpp). A kernel is known by its host stub's address.
void* fpi_image_register(const void* fat_binary);
void fpi_image_unregister(void* image);
void fpi_kernel_register(void* image, const void* host, const char* name);
void fpi_variable_register(void* image, void* host, const char* name, int64_t bytes, int constant);
struct fpi_launch_config {
  unsigned grid[3], block[3], cluster[3];
  int64_t dynamic_shared;
  int programmatic;
};
int fpi_launch(const void* host, const struct fpi_launch_config*, void** args);

// cuTensorMapEncodeTiled with its limits, for the 128 bytes that stand in for a CUtensorMap here. A CUresult; the reason
// for any but 0 is fpi_tensor_map_error(), of this thread. strides_bytes has rank - 1 entries.
int fpi_tensor_map_encode_tiled(void* map, int data_type, uint32_t rank, void* address, const uint64_t* dims,
                                const uint64_t* strides_bytes, const uint32_t* box, const uint32_t* element_strides,
                                int interleave, int swizzle, int l2_promotion, int oob_fill);
const char* fpi_tensor_map_error(void);

// The last finding of this thread as text and as JSON, empty if there was none since fpi_finding_clear().
const char* fpi_finding(void);
const char* fpi_finding_json(void);
void fpi_finding_clear(void);

// Counters since the last reset: warp instructions, nanoseconds and multiply-accumulates within mma and wgmma, launches.
struct fpi_counters {
  uint64_t launches, warp_instructions, matrix_ns, matrix_macs;
};
void fpi_counters_read(struct fpi_counters*);
void fpi_counters_reset(void);

// Every row of the instruction table as JSON: [{"pattern":…,"section":…}].
const char* fpi_rows_json(void);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
