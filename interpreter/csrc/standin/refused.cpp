// Functions of cudart and of the driver that do nothing here because nothing depends on them, and those that are
// refused when called, as a program may well link them and do without. Only the names are defined (with the compiler's
// asm labels): their arguments do not matter, and 0 and 801 are success and "not supported" of both.
#include "standin.h"

using namespace gpuless::standin;

#define ACCEPT(name)                        \
  cudaError_t accepted_##name() asm(#name); \
  cudaError_t accepted_##name() { return finish(cudaSuccess); }
#define REFUSE(name)                       \
  cudaError_t refused_##name() asm(#name); \
  cudaError_t refused_##name() { return unsupported(#name); }

// Caches, placement, profiling.
ACCEPT(cudaDeviceSetCacheConfig)
ACCEPT(cudaDeviceSetSharedMemConfig)
ACCEPT(cudaFuncSetCacheConfig)
ACCEPT(cudaFuncSetSharedMemConfig)
ACCEPT(cudaCtxResetPersistingL2Cache)
ACCEPT(cudaMemAdvise)
ACCEPT(cudaMemPrefetchAsync)
ACCEPT(cudaMemPrefetchAsync_ptsz)
ACCEPT(cudaProfilerStart)
ACCEPT(cudaProfilerStop)
ACCEPT(cudaSetDeviceFlags)
ACCEPT(cudaStreamAttachMemAsync)
ACCEPT(cudaStreamSetAttribute)

// Ranges and marks for profilers, of the nvToolsExt before nvtx3.
ACCEPT(nvtxMarkA)
ACCEPT(nvtxRangePushA)
ACCEPT(nvtxRangePushEx)
ACCEPT(nvtxRangePop)

// Textures, surfaces and arrays; the description of a texel is a value.
extern "C" cudaChannelFormatDesc cudaCreateChannelDesc(int x, int y, int z, int w, cudaChannelFormatKind kind) {
  return {x, y, z, w, kind};
}
REFUSE(cudaCreateTextureObject)
REFUSE(cudaDestroyTextureObject)
REFUSE(cudaGetTextureObjectResourceDesc)
REFUSE(cudaGetTextureObjectTextureDesc)
REFUSE(cudaCreateSurfaceObject)
REFUSE(cudaDestroySurfaceObject)
REFUSE(cudaGetChannelDesc)
REFUSE(cudaMallocArray)
REFUSE(cudaMalloc3DArray)
REFUSE(cudaMallocMipmappedArray)
REFUSE(cudaFreeArray)
REFUSE(cudaFreeMipmappedArray)
REFUSE(cudaMemcpyToArray)
REFUSE(cudaMemcpyFromArray)
REFUSE(cudaMemcpy2DToArray)
REFUSE(cudaMemcpy2DToArrayAsync)
REFUSE(cudaMemcpy2DFromArray)
REFUSE(cudaMemcpy2DFromArrayAsync)
REFUSE(cudaMalloc3D)
REFUSE(cudaMemcpy3D)
REFUSE(cudaMemcpy3DAsync)
REFUSE(cudaMemset3D)
REFUSE(cudaMemset3DAsync)

// Graphs other than by capture, and capture with --default-stream=per-thread.
REFUSE(cudaStreamBeginCapture_ptsz)
REFUSE(cudaStreamEndCapture_ptsz)
REFUSE(cudaGraphCreate)
REFUSE(cudaGraphLaunch_ptsz)
REFUSE(cudaGraphExecUpdate)
REFUSE(cudaGraphGetNodes)
REFUSE(cudaGraphAddKernelNode)
REFUSE(cudaGraphAddMemcpyNode)
REFUSE(cudaGraphAddMemsetNode)
REFUSE(cudaGraphAddHostNode)
REFUSE(cudaGraphAddEmptyNode)
REFUSE(cudaGraphAddDependencies)

// Other devices and processes, memory pools.
REFUSE(cudaDeviceEnablePeerAccess)
REFUSE(cudaDeviceDisablePeerAccess)
REFUSE(cudaMemcpyPeer)
REFUSE(cudaMemcpyPeerAsync)
REFUSE(cudaIpcGetMemHandle)
REFUSE(cudaIpcOpenMemHandle)
REFUSE(cudaIpcCloseMemHandle)
REFUSE(cudaIpcGetEventHandle)
REFUSE(cudaIpcOpenEventHandle)
REFUSE(cudaImportExternalMemory)
REFUSE(cudaImportExternalSemaphore)
REFUSE(cudaDeviceGetDefaultMemPool)
REFUSE(cudaDeviceGetMemPool)
REFUSE(cudaDeviceSetMemPool)
REFUSE(cudaMemPoolCreate)
REFUSE(cudaMemPoolDestroy)
REFUSE(cudaMemPoolSetAttribute)
REFUSE(cudaMemPoolGetAttribute)
REFUSE(cudaMemPoolTrimTo)
REFUSE(cudaMallocFromPoolAsync)

// Code that is loaded at run time: the driver's cuModuleLoadData is there.
REFUSE(cudaLibraryLoadData)
REFUSE(cudaLibraryLoadFromFile)
REFUSE(cudaLibraryGetKernel)
REFUSE(cudaLibraryGetGlobal)
REFUSE(cudaLibraryUnload)

// The driver's.
ACCEPT(cuCtxResetPersistingL2Cache)
ACCEPT(cuCtxSetCacheConfig)
ACCEPT(cuCtxSetFlags)
ACCEPT(cuDevicePrimaryCtxSetFlags_v2)
ACCEPT(cuFuncSetCacheConfig)
ACCEPT(cuMemAdvise_v2)
ACCEPT(cuMemPrefetchAsync_v2)
ACCEPT(cuProfilerStart)
ACCEPT(cuProfilerStop)
ACCEPT(cuStreamSetAttribute)

// With addresses of 32 bits, before CUDA 3.2. TileLang looks for these names.
REFUSE(cuModuleGetGlobal)
REFUSE(cuMemsetD32)

REFUSE(cuTensorMapEncodeIm2colWide)
REFUSE(cuTensorMapReplaceAddress)
REFUSE(cuArrayCreate_v2)
REFUSE(cuArrayDestroy)
REFUSE(cuTexObjectCreate)
REFUSE(cuTexObjectDestroy)
REFUSE(cuSurfObjectCreate)
REFUSE(cuSurfObjectDestroy)
REFUSE(cuMemcpy3D_v2)
REFUSE(cuMemcpy3DAsync_v2)
REFUSE(cuStreamWaitValue32_v2)
REFUSE(cuStreamWaitValue64_v2)
REFUSE(cuStreamWriteValue32_v2)
REFUSE(cuStreamWriteValue64_v2)
REFUSE(cuGraphAddKernelNode_v2)
REFUSE(cuGraphCreate)
REFUSE(cuCtxEnablePeerAccess)
REFUSE(cuCtxDisablePeerAccess)
REFUSE(cuMemcpyPeer)
REFUSE(cuMemcpyPeerAsync)
REFUSE(cuIpcGetMemHandle)
REFUSE(cuIpcOpenMemHandle_v2)
REFUSE(cuIpcCloseMemHandle)
REFUSE(cuMulticastCreate)
REFUSE(cuMemAddressReserve)
REFUSE(cuMemAddressFree)
REFUSE(cuMemCreate)
REFUSE(cuMemRelease)
REFUSE(cuMemMap)
REFUSE(cuMemUnmap)
REFUSE(cuMemSetAccess)
REFUSE(cuMemGetAllocationGranularity)
REFUSE(cuDeviceGetDefaultMemPool)
REFUSE(cuMemPoolCreate)
REFUSE(cuMemAllocFromPoolAsync)
