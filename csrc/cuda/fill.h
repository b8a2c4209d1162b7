// The fill on a GPU: one launch for all of a plan's copies.
#pragma once

#include <cuda_runtime.h>

#include "copy_token.h"

namespace bicc {

// All pointers are device memory. Does not synchronise; throws std::runtime_error if the launch fails.
void launch_fill(const Copy* copies, int64_t count, const FillArrays& arrays, cudaStream_t stream);

}  // namespace bicc
