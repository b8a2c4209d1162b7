// Functions that the kernels call and that a test can compile for the host as well.
#pragma once

#ifdef __CUDACC__
#define BICC_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BICC_HOST_DEVICE inline
#endif
