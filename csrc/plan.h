// The serial phase: every decision of a packing, before any token is copied.
#pragma once

#include <memory>

#include "binpack.h"
#include "divide.h"
#include "sides.h"

namespace bicc {

// What one context rank holds of a micro-batch.
struct ContextShare {
  std::vector<Chunk> chunks;  // prefixes of all sides are segments 0 .. sides - 1, then come the responses
  int64_t rows = 0;           // padded to the alignment
  int64_t prefix_rows = 0;
  int64_t response_rows = 0;
};

// Sizes of one micro-batch's arrays.
struct MicroBatchSize {
  int64_t rows = 0;  // of all context ranks, each padded to the alignment
  int64_t prefix_rows = 0;
  int64_t response_rows = 0;
  int64_t sides = 0;
  int64_t segments = 0;
  int64_t padded() const { return rows > prefix_rows + response_rows; }
};

struct Plan {
  Batch batch;
  Settings settings;
  std::vector<int32_t> headers;  // tokens of the wrong, the right and the answer header, end to end
  Sides sides;
  Pieces pieces;
  std::vector<Bin> micro_batches;  // rank by rank, an equal number each
  std::vector<MicroBatchSize> sizes;
  std::vector<ContextShare> shares;  // [micro-batches * context ranks]
  std::vector<int64_t> rank_costs;   // [data-parallel ranks * context ranks]
  std::vector<int32_t> segments_of;  // [rollouts]: segments that train the rollout
  int64_t filled_bins = 0;           // micro-batches that are not padding only

  int64_t ranks() const { return static_cast<int64_t>(rank_costs.size()) / settings.context_ranks; }
  const ContextShare& share(int64_t micro_batch, int64_t context_rank) const {
    return shares[micro_batch * settings.context_ranks + context_rank];
  }
};

// Throws InputError for anything invalid in the batch or the settings.
Plan make_plan(Batch batch, Settings settings, int64_t dp_size);

}  // namespace bicc
