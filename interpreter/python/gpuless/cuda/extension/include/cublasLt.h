// For toolkits without cuBLAS's headers: the types that torch's headers name.
#pragma once
#include "cublas_v2.h"
typedef struct gpuless_no_cublaslt* cublasLtHandle_t;
