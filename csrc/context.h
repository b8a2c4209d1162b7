// The context of a side: which opposite rollouts it shows, and how much of each.
#pragma once

#include "batch.h"

namespace bicc {

// The tokens kept of one rollout: the first `head` and the last `tail` of its `length` tokens, which exclude a
// trailing end token.
struct Part {
  int64_t rollout;
  int64_t length;
  int64_t head;
  int64_t tail;
};

// Appends the parts of a context of at most `budget` tokens, headers included; each attempt has a header of
// `header` tokens. Returns the length of the context, answer header included; 0: no context.
int64_t choose_context(const Batch& batch, const Settings& settings, const std::vector<int64_t>& attempts,
                       int64_t header, int64_t budget, std::vector<Part>& parts);

}  // namespace bicc
