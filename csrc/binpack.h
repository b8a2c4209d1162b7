// Bin-packing of pieces by rows.
#pragma once

#include <cstdint>
#include <vector>

namespace bicc {

using Bin = std::vector<int64_t>;  // pieces, ascending

// Greedy completion: each bin starts with the largest piece left and, while anything fits, takes the piece or
// the pair of pieces that fills its gap best. Deterministic: ties go to the larger piece, then the lower index.
// No rows[i] may exceed `limit`.
std::vector<Bin> fill_bins(const std::vector<int64_t>& rows, int64_t limit);

// Returns the smallest limit, up to `capacity`, that a bisection finds to need at most `bins` bins; filling to
// it spreads the pieces evenly. At `capacity` the pieces must fit into `bins` bins.
int64_t even_limit(const std::vector<int64_t>& rows, int64_t capacity, int64_t bins);

}  // namespace bicc
