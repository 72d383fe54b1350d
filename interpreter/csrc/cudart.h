#pragma once
// The side of what stands in for CUDA: cudart's and the driver's names (standin/), torch's cuda device (Python).
// Private: it changes with them.
#include "gpuless.h"

#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

// What its driver would say about it, and the limits that launches are held to. Bytes, kHz, CTAs and threads.
struct gpuless_device_properties {
  const char *arch, *name;
  int32_t major, minor, multiprocessors;
  int64_t shared_per_block, shared_per_block_optin, shared_per_multiprocessor, shared_reserved_per_block;
  int32_t registers_per_block, registers_per_multiprocessor, threads_per_block, threads_per_multiprocessor;
  int32_t blocks_per_multiprocessor, clusters;  // clusters: launches with them, and programmatic dependent launches
  int64_t memory, l2_cache, persisting_l2_cache;
  int32_t clock, memory_clock, memory_bus_bits;
};
const struct gpuless_device_properties* gpuless_device_get(void);  // null: none

// What of that storage there is around an address.
void gpuless_storage_remove(const void* begin);
int gpuless_storage_find(const void* begin, int64_t bytes);                     // 1: within one of them
int gpuless_storage_region(const void* address, void** begin, int64_t* bytes);  // 1: within this one

// Device memory, poisoned and registered; null: the device has no more. What there is around a pointer, or zero bytes.
enum { gpuless_memory_device, gpuless_memory_host, gpuless_memory_managed };
void* gpuless_allocate(int64_t bytes, int kind);
int gpuless_release(void* begin);  // 0: it is none of these
// memset, a cudaError_t. Pages of a large allocation that become 0 or poison give their memory back.
int gpuless_fill(void* to, int value, int64_t bytes);
int64_t gpuless_allocation(const void* pointer, void** begin, int* kind);
int64_t gpuless_memory_free(void);
int64_t gpuless_memory_peak(int reset);  // the most bytes in use so far, or since the last reset

// Device memory as a DLManagedTensor of bytes on CUDA's device 0, and the whole of such memory again as the CPU's; its
// deleter has to be called. Null: the device has no more; no memory of the first begins there.
void* gpuless_dlpack_allocate(int64_t bytes);
void* gpuless_dlpack_host_view(void* data, int64_t bytes);

// Fat binaries, as nvcc's host code registers them (standin/). A kernel is known by its host stub's address.
void* gpuless_image_register(const void* wrapper);
void gpuless_image_unregister(void* image);
void gpuless_kernel_register(void* image, const void* host, const char* name);
void gpuless_variable_register(void* image, const void* host, const char* name);
int gpuless_variable(const void* host, void** address, int64_t* bytes);

// Code that is loaded at run time: PTX text, or a fat binary, which may have a wrapper. Kernels and variables of any
// image by their names become ones with a host address, which the functions above and below then take.
int gpuless_image_load(const void* code, void** image);
int gpuless_image_kernel(void* image, const char* name, const void** host);
int gpuless_image_variable(void* image, const char* name, const void** host);

struct gpuless_launch_config {
  unsigned grid[3], block[3], cluster[3];
  int64_t dynamic_shared;
  int programmatic, cooperative;
};
int gpuless_launch(const void* host, const struct gpuless_launch_config*, void** args);

// Streams, by their handles, that are captured into graphs; null and 1 are the legacy one, 2 is the thread's own. Modes
// and what is returned are cudart's.
int gpuless_capture_begin(void* stream, int mode, int blocking);  // blocking: made without cudaStreamNonBlocking
int gpuless_capture_end(void* stream, void** graph);
int gpuless_capture_status(void* stream, int* status);
int gpuless_capture_mode(int mode);  // of this thread, cudaThreadExchangeStreamCaptureMode; returns the one before
int gpuless_capturing(void);         // 0: no stream is captured, and nothing here has to be asked
struct gpuless_work {
  int (*run)(void* data);  // returns a cudaError_t
  void (*forget)(void* data);
  void* data;
};
// Work that is put into a stream. *kept: the graph will do it, and else whoever asks. Forgets it when nobody needs it.
int gpuless_capture_keep(void* stream, const struct gpuless_work*, int* captured);
// Whether some capture forbids a call, which ends that capture: one that allocates, frees or may wait for the device
// ("unsafe"), one that waits for a stream or for the device, a stream's waiting for what is outside of its capture.
enum { gpuless_unsafe, gpuless_waits_for_stream, gpuless_waits_for_device, gpuless_waits_for_event };
int gpuless_capture_refuses(int what, void* stream);
void* gpuless_graph_copy(const void* graph);
void gpuless_graph_release(void* graph);
int gpuless_graph_launch(const void* graph);

struct gpuless_kernel_properties {
  const char* name;
  int64_t static_shared, local, constant, max_dynamic_shared;
  int32_t max_threads, registers, parameters, cluster[3], nonportable_clusters;  // registers: assumed, PTX has none
};
int gpuless_kernel(const void* host, struct gpuless_kernel_properties*);
int gpuless_kernel_parameter(const void* host, int index, int64_t* offset, int64_t* bytes);
int gpuless_kernel_allow_shared(const void* host, int64_t dynamic_bytes);
int gpuless_kernel_allow_nonportable_clusters(const void* host, int allow);
int gpuless_occupancy(const void* host, int threads, int64_t dynamic_shared, int* blocks);  // of one multiprocessor
// The largest cluster that fits, and how many of the config's size run at once.
int gpuless_cluster_occupancy(const void* host, const struct gpuless_launch_config*, int* largest, int* clusters);

// cuTensorMapEncodeTiled with its limits, for the 128 bytes that stand in for a CUtensorMap here. A CUresult; the
// reason for any but 0 is gpuless_tensor_map_error(), of this thread. strides_bytes has rank - 1 entries.
int gpuless_tensor_map_encode_tiled(void* map, int data_type, uint32_t rank, void* address, const uint64_t* dims,
                                    const uint64_t* strides_bytes, const uint32_t* box, const uint32_t* element_strides,
                                    int interleave, int swizzle, int l2_promotion, int oob_fill);
// The same of cuTensorMapEncodeIm2col; the corners have rank - 2 entries, the innermost dimension first.
int gpuless_tensor_map_encode_im2col(void* map, int data_type, uint32_t rank, void* address, const uint64_t* dims,
                                     const uint64_t* strides_bytes, const int* lower, const int* upper,
                                     uint32_t channels, uint32_t pixels, const uint32_t* element_strides,
                                     int interleave, int swizzle, int l2_promotion, int oob_fill);
const char* gpuless_tensor_map_error(void);

// Why the last call of this thread that was refused with this cudaError_t was: what was asked for and what the limit
// is. Empty where the code says it all, and once it was asked.
const char* gpuless_take_refusal(int error);
void gpuless_refuse(int error, const char* why);

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop
