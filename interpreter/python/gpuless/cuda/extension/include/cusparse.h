// For toolkits without cuSPARSE's headers: the types that torch's headers name.
#pragma once
typedef struct gpuless_no_cusparse* cusparseHandle_t;
typedef enum { CUSPARSE_STATUS_SUCCESS = 0 } cusparseStatus_t;
