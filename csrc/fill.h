// The threaded phase: tokens move into the caller's buffers as the plan says.
#pragma once

#include "plan.h"

namespace bicc {

// Buffers of the whole step: each holds the micro-batches' arrays one after another, in the plan's order.
// Field by field they are the arrays of MicroBatch in megatron_bicc/packing/types.py.
struct Buffers {
  int32_t* tokens;            // [rows]
  int32_t* positions;         // [rows]
  int32_t* labels;            // [rows]
  int32_t* cu_seqlens;        // [seqlens]
  int32_t* cu_prefix;         // [sides + 1 a micro-batch]
  int32_t* cu_response_side;  // [sides + 1 a micro-batch]
  int32_t* cu_response;       // [segments + 1 a micro-batch]
  int32_t* rollout;           // [segments]
  int32_t* group;             // [segments]
  float* scale;               // [segments]
  int64_t* gather;            // [response rows]
  float* channels;            // [channels * response rows]
};

// Number of items of each buffer's kind, over one micro-batch or the whole step.
struct Extent {
  int64_t rows = 0;
  int64_t response_rows = 0;
  int64_t segments = 0;
  int64_t sides = 0;
  int64_t seqlens = 0;
  int64_t micro_batches = 0;
};
Extent extent_of(const Plan& plan);

// `channels` is [number of channels, response tokens of the batch]; each row is gathered like the labels.
// The result does not depend on `threads`.
void fill(const Plan& plan, Span<float> channels, int64_t threads, const Buffers& buffers);

}  // namespace bicc
