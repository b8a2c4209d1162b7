// Shared-prefix attention: what happens between the two attention calls, and before their backward.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace bicc {

enum class Dtype { kFloat32, kFloat16, kBfloat16 };

// Row r of head h: element (r * heads + h) * dim of a contiguous [rows, heads, dim] array.
struct AttentionShape {
  int64_t rows;
  int64_t heads;
  int64_t dim;  // a multiple of 4
};

// Merges `other` into `out`, both [rows, heads, dim], and `lse_other` into `lse`, both float32 with the log-sum-exp
// of row r and head h at h * stride + r. In place, in float32 arithmetic.
void launch_merge(Dtype dtype, AttentionShape shape, void* out, float* lse, int64_t lse_stride, const void* other,
                  const float* lse_other, int64_t lse_other_stride, cudaStream_t stream);

// delta[h * rows + r] = sum over dim of out * grad, float32: the term D of the attention backward
// (FlashAttention-2, arXiv 2307.08691, algorithm 2), of the merged output.
void launch_pre_backward(Dtype dtype, AttentionShape shape, const void* out, const void* grad, float* delta,
                         cudaStream_t stream);

}  // namespace bicc
