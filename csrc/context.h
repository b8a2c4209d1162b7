// The context of a side: which opposite rollouts it shows, and how much of each.
#pragma once

#include "batch.h"

namespace bicc {

// Tokens kept of one rollout: of its first `length` (all but a trailing end-of-sequence token) the first `head`
// and the last `tail`.
struct Part {
  int64_t rollout;
  int64_t length;
  int64_t head;
  int64_t tail;
};

// Appends the parts of a context that may take `budget` tokens, headers included; all `attempts` carry a
// header of `header` tokens. Returns the context's tokens, answer header included; 0: no context.
int64_t choose_context(const Batch& batch, const Settings& settings, const std::vector<int64_t>& attempts,
                       int64_t header, int64_t budget, std::vector<Part>& parts);

}  // namespace bicc
