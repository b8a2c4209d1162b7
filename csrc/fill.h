// The threaded phase: tokens move into the caller's buffers as the plan says.
#pragma once

#include "copies.h"

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

// Writes all but the rows themselves: cumulative lengths, rollout, group and scale of every segment.
void fill_segments(const Plan& plan, const Buffers& buffers);

// Writes tokens, positions, labels, gather and channels. `channels` is [number of channels, response tokens of the
// batch]; each is gathered like the labels. The result does not depend on `threads`.
void fill_rows(const Plan& plan, Span<float> channels, int64_t threads, const Buffers& buffers);

}  // namespace bicc
