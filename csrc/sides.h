// Turns groups into sides (a prefix and the responses that attend to it), and sides into pieces that fit a
// micro-batch.
#pragma once

#include "batch.h"
#include "context.h"

namespace bicc {

// Which rollouts a side's context shows; it decides their header.
enum class Shown { kNothing, kWrong, kRight };

struct Side {
  int64_t group;
  Shown shown;
  int64_t prefix_tokens;  // prompt, context and answer header
  int64_t context_tokens;
  int64_t first_part, last_part;          // [first, last) into Sides::parts
  int64_t first_response, last_response;  // [first, last) into Sides::responses
};

struct Sides {
  std::vector<Side> sides;
  std::vector<Part> parts;
  std::vector<int64_t> responses;  // rollouts
  int64_t skipped_groups = 0;      // without contrast
  int64_t dropped = 0;             // overlong response segments
};

// A side, or a share of its responses with the prefix repeated.
struct Piece {
  int64_t side;
  int64_t first_response, last_response;  // [first, last) into Pieces::responses
  int64_t rows;
  int64_t cost;  // token_cost * rows + attention pairs
};

struct Pieces {
  std::vector<Piece> pieces;
  std::vector<int64_t> responses;  // rollouts, in batch order within a piece
};

// Omits sides without a response left. Throws InputError for an overlong response unless settings drop it.
Sides make_sides(const Batch& batch, const Settings& settings);

// Splits sides of more than settings.capacity() rows between responses, first fit by decreasing length.
Pieces split_sides(const Batch& batch, const Settings& settings, const Sides& sides);

}  // namespace bicc
