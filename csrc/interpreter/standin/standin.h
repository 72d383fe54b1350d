#pragma once
// cudart's names, forwarded to _interpreter.so. Linked into each image, hidden: never dynamic symbols, as a CUDA torch
// has the real ones in the global scope. What cudart has and these files have not is a link error that names it.
#include <cuda_runtime.h>

#include "interpreter/interpreter.h"

// The same function under the name that --default-stream=per-thread gives it.
#define ALSO(alias, name) asm(".globl " #alias "\n.hidden " #alias "\n.set " #alias ", " #name)

namespace forwardpass::standin {

// Keeps an error for cudaGetLastError and returns it. In a program (program.cpp) a kernel that failed has ended the
// context, as on a GPU: every later call returns its error. Python raises instead and goes on.
cudaError_t finish(int error);
extern bool errors_stick;

// Says on stderr what is not supported; cudaErrorNotSupported.
cudaError_t unsupported(const char* what);

cudaError_t launch(const void* host, const fpi_launch_config&, void** args);
// Grid, block, cluster and the rest of a cudaLaunchConfig_t.
cudaError_t read_config(const cudaLaunchConfig_t&, fpi_launch_config&);

}  // namespace forwardpass::standin
