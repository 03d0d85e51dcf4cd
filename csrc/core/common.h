// Marks what host and device code share.
#pragma once

#if defined(__CUDACC__)
#define LMINF_HD __host__ __device__ __forceinline__
#else
#define LMINF_HD inline
#endif
