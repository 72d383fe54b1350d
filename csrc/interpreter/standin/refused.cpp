// Functions of cudart that do nothing here because nothing depends on them, and those that are refused when called, as
// a program may well link them and do without. Only the names are defined (with the compiler's asm labels): their
// arguments do not matter.
#include "standin.h"

using namespace forwardpass::standin;

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

// Code that is loaded at run time.
REFUSE(cudaLibraryLoadData)
REFUSE(cudaLibraryLoadFromFile)
REFUSE(cudaLibraryGetKernel)
REFUSE(cudaLibraryGetGlobal)
REFUSE(cudaLibraryUnload)
