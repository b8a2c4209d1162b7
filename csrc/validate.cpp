#include "validate.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.h"

namespace bicc {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

void check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value < low || value > high) {
    fail(name, " is ", value, "; it must be in [", low, ", ", high, "]");
  }
}

void check_ids(const char* name, const std::vector<int64_t>& ids, int64_t vocab_size) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (ids[i] < 0 || ids[i] >= vocab_size) {
      fail("PackingSettings.", name, "[", i, "] is token ", ids[i], ", outside the vocabulary of ", vocab_size);
    }
  }
}

// item(i) names the item between offsets i and i + 1: "group 3" or "group 3, rollout 17".
template <class Name>
void check_offsets(const char* array, const std::vector<int64_t>& offsets, int64_t end, const char* indexed, Name item) {
  if (offsets.front() != 0) {
    fail("RolloutBatch.", array, "[0] is ", offsets.front(), " (", item(0), "); offsets must start at 0");
  }
  for (size_t i = 1; i < offsets.size(); ++i) {
    if (offsets[i] == offsets[i - 1]) {
      fail(item(i - 1), " is empty: RolloutBatch.", array, "[", i - 1, "] and [", i, "] are both ", offsets[i]);
    }
    if (offsets[i] < offsets[i - 1] || offsets[i] > end) {
      fail("RolloutBatch.", array, "[", i, "] is ", offsets[i], " after ", offsets[i - 1], " (", item(i - 1),
           "); offsets must increase, up to the ", end, " ", indexed);
    }
  }
  if (offsets.back() != end) {
    fail("RolloutBatch.", array, " ends at ", offsets.back(), " (", item(offsets.size() - 2), ") but there are ", end,
         " ", indexed);
  }
}

bool all_in_vocabulary(Span<int32_t> tokens, int64_t vocab_size) {
  // No early exit, so that the loop vectorises; a negative id becomes a large unsigned number.
  uint32_t largest = 0;
  for (int64_t i = 0; i < tokens.size; ++i) largest = std::max(largest, static_cast<uint32_t>(tokens[i]));
  return tokens.size == 0 || largest < static_cast<uint64_t>(vocab_size);
}

template <class Name>
void check_tokens(const char* array, Span<int32_t> tokens, const std::vector<int64_t>& offsets, int64_t vocab_size,
                  Name item) {
  if (all_in_vocabulary(tokens, vocab_size)) return;
  for (int64_t i = 0; i < tokens.size; ++i) {
    if (tokens[i] >= 0 && tokens[i] < vocab_size) continue;
    const int64_t owner = std::upper_bound(offsets.begin(), offsets.end(), i) - offsets.begin() - 1;
    fail("RolloutBatch.", array, "[", i, "] is token ", tokens[i], " (", item(owner), ", token ", i - offsets[owner],
         "), outside the vocabulary of ", vocab_size);
  }
}

void check_size(const char* array, size_t size, int64_t items, const char* counted) {
  if (static_cast<int64_t>(size) != items + 1) {
    fail("RolloutBatch.", array, " holds ", size, " offsets; ", items, " ", counted, " need ", items + 1);
  }
}

void check_groups(const Batch& batch) {
  const auto group_name = [](int64_t group) { return "group " + std::to_string(group); };
  if (batch.groups() < 1) fail("the batch has no groups: RolloutBatch.group_offsets_B must hold at least two offsets");
  check_range("the number of rollouts", batch.rollouts(), 1, kInt32Max);
  check_offsets("group_offsets_B", batch.group_offsets, batch.rollouts(), "rollouts", group_name);
  for (int64_t g = 0; g < batch.groups(); ++g) {
    if (batch.group_offsets[g + 1] - batch.group_offsets[g] == 1) {
      fail("group ", g, " has one rollout (rollout ", batch.group_offsets[g], "); a group needs at least two");
    }
  }
  check_size("prompt_offsets_B", batch.prompt_offsets.size(), batch.groups(), "groups");
  check_offsets("prompt_offsets_B", batch.prompt_offsets, batch.prompt_tokens.size, "prompt tokens", group_name);
}

void check_rewards(const Batch& batch) {
  for (int64_t r = 0; r < batch.rollouts(); ++r) {
    if (!std::isfinite(batch.rewards[r])) {
      fail("RolloutBatch.rewards_R[", r, "] is ", batch.rewards[r], " (", rollout_name(batch, r), "); it must be finite");
    }
  }
}

}  // namespace

std::string rollout_name(const Batch& batch, int64_t rollout) {
  const auto& starts = batch.group_offsets;
  const int64_t group = std::upper_bound(starts.begin(), starts.end(), rollout) - starts.begin() - 1;
  return "group " + std::to_string(group) + ", rollout " + std::to_string(rollout);
}

void validate(const Settings& settings, int64_t dp_size) {
  check_range("dp_size", dp_size, 1, 1 << 16);
  check_range("PackingSettings.max_sequence_tokens", settings.max_sequence_tokens, 1, kInt32Max);
  check_range("PackingSettings.max_tokens_per_microbatch", settings.max_tokens_per_microbatch, 1, kInt32Max);
  check_range("PackingSettings.vocab_size", settings.vocab_size, 1, kInt32Max);
  check_range("PackingSettings.alignment", settings.alignment, 1,
              std::min<int64_t>(settings.max_tokens_per_microbatch, 1 << 16));
  check_range("PackingSettings.token_cost", settings.token_cost, 0, 1 << 24);
  // the boundaries of a micro-batch are int32; the data-parallel ranks' limit holds for all ranks together
  check_range("PackingSettings.context_ranks", settings.context_ranks, 1,
              std::min<int64_t>(kInt32Max / settings.max_tokens_per_microbatch, (1 << 16) / dp_size));
  if (!(settings.context_ratio >= 0 && settings.context_ratio <= 1)) {
    fail("PackingSettings.context_ratio is ", settings.context_ratio, "; it must be in [0, 1]");
  }
  if (!std::isfinite(settings.reward_threshold)) fail("PackingSettings.reward_threshold must be finite");
  check_ids("wrong_header", settings.wrong_header, settings.vocab_size);
  check_ids("right_header", settings.right_header, settings.vocab_size);
  check_ids("answer_header", settings.answer_header, settings.vocab_size);
  check_ids("end_token_ids", settings.end_token_ids, settings.vocab_size);
}

void validate(const Batch& batch, const Settings& settings) {
  const auto group_name = [](int64_t group) { return "group " + std::to_string(group); };
  const auto name = [&](int64_t rollout) { return rollout_name(batch, rollout); };
  check_groups(batch);
  check_size("offsets_R", batch.offsets.size(), batch.rollouts(), "rollouts");
  check_offsets("offsets_R", batch.offsets, batch.tokens.size, "response tokens", name);
  check_rewards(batch);
  check_tokens("prompt_tokens", batch.prompt_tokens, batch.prompt_offsets, settings.vocab_size, group_name);
  check_tokens("tokens", batch.tokens, batch.offsets, settings.vocab_size, name);
}

}  // namespace bicc
