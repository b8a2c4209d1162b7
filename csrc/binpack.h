// Bin-packing of pieces by rows.
#pragma once

#include <cstdint>
#include <vector>

namespace bicc {

using Bin = std::vector<int64_t>;  // pieces, ascending

// Greedy completion: each bin starts with the largest piece left and takes, as long as something fits, the
// piece or the pair of pieces that fills its gap best. Deterministic: larger first, then lower index.
// No rows[i] may exceed `limit`.
std::vector<Bin> fill_bins(const std::vector<int64_t>& rows, int64_t limit);

// The smallest limit (up to `capacity`) that a bisection finds to need no more than `bins` bins: spreads the
// pieces evenly over them. `bins` must be enough for `capacity`.
int64_t even_limit(const std::vector<int64_t>& rows, int64_t capacity, int64_t bins);

}  // namespace bicc
