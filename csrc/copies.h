// A plan as a list of token runs to copy, which the CPU fill and the CUDA kernel both execute.
#pragma once

#include <vector>

#include "copy.h"
#include "plan.h"

namespace bicc {

// Where a micro-batch's rows start in the buffers, or how many there are.
struct RowExtent {
  int64_t rows = 0;
  int64_t response_rows = 0;
};

// Micro-batches [first, last) of a plan, those of one data-parallel rank, as one context rank holds them.
struct RankRange {
  int64_t first;
  int64_t last;
  int64_t context_rank;
};

// Returns the start of each micro-batch of the range, relative to its first; last, the extent of the range.
std::vector<RowExtent> starts_of(const Plan& plan, const RankRange& range);

// Appends the copies of one context rank's rows of micro-batch `index`, which start at `start`. Their order does not
// matter.
void append_copies(const Plan& plan, int64_t index, int64_t context_rank, const RowExtent& start,
                   std::vector<Copy>& copies);

}  // namespace bicc
