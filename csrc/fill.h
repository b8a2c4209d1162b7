// The threaded phase: copies tokens into the caller's buffers according to the plan.
#pragma once

#include "copies.h"

namespace bicc {

// Buffers hold the arrays of consecutive micro-batches one after another, in the plan's order. Field by field they
// are the arrays of MicroBatchLayout and MicroBatch in megatron_bicc/packing/types.py.
struct SegmentBuffers {
  int32_t* cu_seqlens;        // [seqlens]
  int32_t* cu_prefix;         // [sides + 1 per micro-batch]
  int32_t* cu_response_side;  // [sides + 1 per micro-batch]
  int32_t* cu_response;       // [segments + 1 per micro-batch]
  int32_t* rollout;           // [segments]
  int32_t* group;             // [segments]
  float* scale;               // [segments]
  int32_t* chunk_segment;     // [chunks of all context ranks], as are both below
  int32_t* chunk_start;
  int32_t* chunk_length;
};

// Items of the buffers above.
struct SegmentExtent {
  int64_t segments = 0;
  int64_t sides = 0;
  int64_t seqlens = 0;
  int64_t chunks = 0;
  int64_t micro_batches = 0;
};
SegmentExtent extent_of_segments(const Plan& plan);

struct RowBuffers {
  int32_t* tokens;     // [rows]
  int32_t* positions;  // [rows]
  int32_t* labels;     // [rows]
  int64_t* gather;     // [response rows]
};

// Writes the layout of all ranks' micro-batches: cumulative lengths; rollout, group and scale of every segment; the
// chunks of every context rank.
void fill_segments(const Plan& plan, const SegmentBuffers& buffers);

// Writes the rows of the range's micro-batches: tokens, positions, labels and gather. The result does not depend on
// `threads`.
void fill_rows(const Plan& plan, const RankRange& range, int64_t threads, const RowBuffers& buffers);

}  // namespace bicc
