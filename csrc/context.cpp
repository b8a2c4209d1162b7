#include "context.h"

#include <algorithm>

namespace bicc {
namespace {

// Replaces wanted lengths by equal shares of `budget`. What a short attempt leaves goes to the longer ones; the
// remainder of the division goes to the first attempts that are longer, one token each.
void share_equally(std::vector<int64_t>& lengths, int64_t budget) {
  std::vector<int64_t> ascending = lengths;
  std::sort(ascending.begin(), ascending.end());
  int64_t level = 0;
  int64_t left = budget;
  for (size_t i = 0; i < ascending.size(); ++i) {
    const int64_t open = static_cast<int64_t>(ascending.size() - i);
    level = std::min(ascending[i], left / open);
    if (level < ascending[i]) break;
    left -= level;
  }
  int64_t spare = budget;
  for (const int64_t length : lengths) spare -= std::min(length, level);
  for (int64_t& length : lengths) {
    const bool extra = length > level && spare > 0;
    spare -= extra;
    length = std::min(length, level + extra);
  }
}

void fill_in_order(std::vector<int64_t>& lengths, int64_t header, int64_t budget) {
  size_t shown = 0;
  for (; shown < lengths.size() && header + 1 <= budget; ++shown) {
    lengths[shown] = std::min(lengths[shown], budget - header);
    budget -= header + lengths[shown];
  }
  lengths.resize(shown);
}

// Keeps the first attempts whose headers and one token each fit; later ones are left out.
void fill_equally(std::vector<int64_t>& lengths, int64_t header, int64_t budget) {
  const int64_t shown = std::min<int64_t>(lengths.size(), budget / (header + 1));
  lengths.resize(shown);
  share_equally(lengths, budget - shown * header);
}

int64_t kept_tail(int64_t kept, Keep keep) {
  switch (keep) {
    case Keep::kHead:
      return 0;
    case Keep::kTail:
      return kept;
    default:
      return kept / 2;
  }
}

// Length of a rollout inside a context: without a trailing end token.
int64_t attempt_length(const Batch& batch, const Settings& settings, int64_t rollout) {
  const int32_t last = batch.tokens[batch.offsets[rollout + 1] - 1];
  const auto& ends = settings.end_token_ids;
  const bool ended = std::find(ends.begin(), ends.end(), last) != ends.end();
  return batch.length(rollout) - ended;
}

}  // namespace

int64_t choose_context(const Batch& batch, const Settings& settings, const std::vector<int64_t>& attempts,
                       int64_t header, int64_t budget, std::vector<Part>& parts) {
  const int64_t answer = static_cast<int64_t>(settings.answer_header.size());
  if (budget < header + 1 + answer) return 0;
  std::vector<Part> shown;
  std::vector<int64_t> kept;
  shown.reserve(attempts.size());
  kept.reserve(attempts.size());
  for (const int64_t rollout : attempts) {
    const int64_t length = attempt_length(batch, settings, rollout);
    if (length == 0) continue;
    shown.push_back({rollout, length, 0, 0});
    kept.push_back(length);
  }
  if (shown.empty()) return 0;
  const bool equal = settings.truncation == Truncation::kEqual;
  (equal ? fill_equally : fill_in_order)(kept, header, budget - answer);
  int64_t total = answer;
  for (size_t i = 0; i < kept.size(); ++i) {
    shown[i].tail = kept_tail(kept[i], settings.keep);
    shown[i].head = kept[i] - shown[i].tail;
    parts.push_back(shown[i]);
    total += header + kept[i];
  }
  return total;
}

}  // namespace bicc
