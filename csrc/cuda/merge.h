// Shared-prefix attention: what happens between and after its attention calls.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <utility>

#include "launch.h"

namespace bicc {

struct AttentionShape {
  int64_t rows;
  int64_t heads;
  int64_t dim;
};

using Strides = std::pair<int64_t, int64_t>;

// Attention of the rows to one set of keys. Strides are in elements, of rows and of heads; the channels of a head
// are contiguous.
struct AttentionPart {
  uintptr_t out;  // [rows, heads, dim]
  Strides out_strides;
  float* lse;  // log-sum-exp [rows, heads]; -inf where a row has no keys
  Strides lse_strides;
};

// Merges `other` into `part`, in place, in float32 arithmetic: then `part` is the attention to both sets of keys. A
// third set is merged by another call, since the merge of two parts is a part.
void launch_merge(Dtype dtype, AttentionShape shape, const AttentionPart& part, const AttentionPart& other,
                  cudaStream_t stream);

// to[r, i] += from[r, i] for rows r and i < width; strides of rows in elements.
struct RowSum {
  uintptr_t to;
  int64_t to_stride;
  uintptr_t from;
  int64_t from_stride;
  int64_t rows;
  int64_t width;
};

// Adds the gradients of q, k and v of one call to those of another, in one launch, each sum rounded once.
void launch_add_gradients(Dtype dtype, const RowSum& q, const RowSum& k, const RowSum& v, cudaStream_t stream);

}  // namespace bicc
