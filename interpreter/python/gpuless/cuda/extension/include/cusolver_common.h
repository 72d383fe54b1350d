// For toolkits without cuSOLVER's headers: the types that torch's headers name.
#pragma once
typedef enum { CUSOLVER_STATUS_SUCCESS = 0 } cusolverStatus_t;
