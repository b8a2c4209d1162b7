// Gives the rows of a micro-batch to the ranks of a context-parallel group.
#pragma once

#include <cstdint>
#include <vector>

namespace bicc {

// A prefix or a response.
struct Segment {
  int64_t rows;
  int64_t prefix_rows;  // rows that all of its rows attend to, besides its own; 0 for a prefix
};

// Rows [start, start + length) of a segment.
struct Chunk {
  int64_t segment;
  int64_t start;
  int64_t length;
};

// What one context rank holds of a micro-batch.
struct Share {
  std::vector<Chunk> chunks;  // by segment, then by start; none is empty
  int64_t rows = 0;           // without padding
  int64_t cost = 0;           // token_cost * rows + attention pairs
};

// Returns the share of each of `ranks` ranks, at most `capacity` rows each; all segments together must have at most
// ranks * capacity. In order of decreasing cost, a segment that costs much, compared with a rank's mean, is cut in 2 *
// ranks chunks, of which rank r takes the r-th from either end: early rows have few keys and late rows many, so the
// two cost about the same on every rank. Any other segment goes whole to the rank of least cost that has room for it,
// and is cut where none has. Deterministic: ties go to the lower segment and the lower rank.
std::vector<Share> divide(const std::vector<Segment>& segments, int64_t ranks, int64_t capacity, int64_t token_cost);

}  // namespace bicc
