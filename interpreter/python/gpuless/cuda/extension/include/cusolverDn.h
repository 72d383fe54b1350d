// For toolkits without cuSOLVER's headers: the types that torch's headers name.
#pragma once
#include "cusolver_common.h"
typedef struct gpuless_no_cusolver* cusolverDnHandle_t;
