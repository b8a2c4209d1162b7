// A plan as a list of token runs to copy, which the CPU fill and the CUDA kernel both execute.
#pragma once

#include <vector>

#include "copy.h"
#include "plan.h"

namespace bicc {

// Where a micro-batch's arrays start in the buffers, or how many items they hold.
struct Extent {
  int64_t rows = 0;
  int64_t response_rows = 0;
  int64_t segments = 0;
  int64_t sides = 0;
  int64_t seqlens = 0;
  int64_t micro_batches = 0;
};

// Micro-batches [first, last) of a plan: those of one rank, or all.
struct Range {
  int64_t first;
  int64_t last;
};

// Returns the start of each micro-batch of the range, relative to its first; last, the extent of the range.
std::vector<Extent> starts_of(const Plan& plan, Range range);

// Appends the copies of micro-batch `index`, which starts at `start`. Their order does not matter.
void append_copies(const Plan& plan, int64_t index, const Extent& start, std::vector<Copy>& copies);

}  // namespace bicc
