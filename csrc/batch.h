// Scored groups as flat arrays, and the settings of a packing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace bicc {

template <class T>
struct Span {
  const T* data = nullptr;
  int64_t size = 0;
  const T& operator[](int64_t i) const { return data[i]; }
};

// Tokens are borrowed from the caller. Offsets and rewards are copied: Python may change its arrays
// while the GIL is released, and such a change must not cause a read out of bounds.
struct Batch {
  Span<int32_t> prompt_tokens;
  Span<int32_t> tokens;
  std::vector<int64_t> prompt_offsets;  // [groups + 1]
  std::vector<int64_t> offsets;         // [rollouts + 1]
  std::vector<int64_t> group_offsets;   // [groups + 1], into the rollouts
  std::vector<float> rewards;           // [rollouts]

  int64_t groups() const { return static_cast<int64_t>(group_offsets.size()) - 1; }
  int64_t rollouts() const { return static_cast<int64_t>(rewards.size()); }
  int64_t prompt_length(int64_t group) const { return prompt_offsets[group + 1] - prompt_offsets[group]; }
  int64_t length(int64_t rollout) const { return offsets[rollout + 1] - offsets[rollout]; }
};

enum class Layout { kPlain, kBilateral };
enum class Source { kPartition, kPair };
enum class Truncation { kEqual, kInOrder };
enum class Keep { kHead, kTail, kBothEnds };
enum class Overlong { kError, kDrop };

// PackingSettings of megatron_bicc/packing/types.py, field for field.
struct Settings {
  Layout layout;
  int64_t max_sequence_tokens;
  int64_t max_tokens_per_microbatch;
  int64_t vocab_size;
  float reward_threshold;
  double context_ratio;
  Source context_source;
  Truncation truncation;
  Keep keep;
  std::vector<int64_t> wrong_header;
  std::vector<int64_t> right_header;
  std::vector<int64_t> answer_header;
  std::vector<int64_t> end_token_ids;
  Overlong overlong;
  int64_t alignment;
  int64_t token_cost;
  int64_t context_ranks;

  // Most rows of a micro-batch on one context rank whose padded length is within the limit.
  int64_t rank_capacity() const { return max_tokens_per_microbatch / alignment * alignment; }
  // Most rows of a micro-batch.
  int64_t capacity() const { return context_ranks * rank_capacity(); }
};

}  // namespace bicc
