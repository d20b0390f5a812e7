// The one type of CUDA that the rooms' interfaces name.
#pragma once
#ifdef MOE_FIBERS
using cudaStream_t = void*;
#else
#include <cuda_runtime_api.h>
#endif
