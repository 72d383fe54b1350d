// For toolkits without cuBLAS's headers: the types that torch's headers name.
#pragma once
typedef struct gpuless_no_cublas* cublasHandle_t;
typedef enum { CUBLAS_STATUS_SUCCESS = 0 } cublasStatus_t;
