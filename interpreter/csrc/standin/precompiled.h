// The same for what is compiled against a CUDA toolkit: it has no AVX2, and a precompiled header is for one set of flags.
#include <cuda.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "standin.h"
