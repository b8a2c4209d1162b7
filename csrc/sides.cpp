#include "sides.h"

#include <algorithm>

#include "error.h"
#include "validate.h"

namespace bicc {
namespace {

using Rollouts = std::vector<int64_t>;

class SideMaker {
 public:
  SideMaker(const Batch& batch, const Settings& settings) : batch_(batch), settings_(settings) {}

  Sides make() {
    for (int64_t group = 0; group < batch_.groups(); ++group) add_group(group);
    return std::move(out_);
  }

 private:
  void add_group(int64_t group) {
    Rollouts all, right, wrong;
    const int64_t size = batch_.group_offsets[group + 1] - batch_.group_offsets[group];
    for (Rollouts* rollouts : {&all, &right, &wrong}) rollouts->reserve(size);
    for (int64_t r = batch_.group_offsets[group]; r < batch_.group_offsets[group + 1]; ++r) {
      all.push_back(r);
      (batch_.rewards[r] > settings_.reward_threshold ? right : wrong).push_back(r);
    }
    const bool contrast = !right.empty() && !wrong.empty();
    const bool bilateral = settings_.layout == Layout::kBilateral;
    if (!contrast && bilateral) {
      ++out_.skipped_groups;
    } else if (bilateral) {
      add_bilateral(group, right, wrong, Shown::kWrong);
      add_bilateral(group, wrong, right, Shown::kRight);
    } else {
      add_side(group, all, {}, Shown::kNothing);
    }
  }

  void add_bilateral(int64_t group, const Rollouts& trained, const Rollouts& opposite, Shown shown) {
    if (settings_.context_source == Source::kPartition) return add_side(group, trained, opposite, shown);
    for (const int64_t rollout : opposite) add_side(group, trained, {rollout}, shown);
  }

  void add_side(int64_t group, const Rollouts& trained, const Rollouts& attempts, Shown shown) {
    const int64_t prompt = batch_.prompt_length(group);
    const Rollouts responses = without_overlong(trained, prompt);
    if (responses.empty()) return;
    int64_t longest = 0;
    for (const int64_t r : responses) longest = std::max(longest, batch_.length(r));
    Side side{group, shown, prompt, 0, count(out_.parts), 0, count(out_.responses), 0};
    side.context_tokens = add_context(attempts, shown, longest_sequence() - prompt - longest);
    side.prefix_tokens += side.context_tokens;
    side.last_part = count(out_.parts);
    out_.responses.insert(out_.responses.end(), responses.begin(), responses.end());
    side.last_response = count(out_.responses);
    out_.sides.push_back(side);
  }

  int64_t add_context(const Rollouts& attempts, Shown shown, int64_t room) {
    const int64_t share = static_cast<int64_t>(settings_.context_ratio * settings_.max_sequence_tokens);
    const auto& header = shown == Shown::kWrong ? settings_.wrong_header : settings_.right_header;
    return choose_context(batch_, settings_, attempts, header.size(), std::min(share, room), out_.parts);
  }

  // In tokens, prefix and response together: one more than their rows, because of the one-token shift.
  int64_t longest_sequence() const { return std::min(settings_.max_sequence_tokens, settings_.capacity() + 1); }

  Rollouts without_overlong(const Rollouts& rollouts, int64_t prompt) {
    Rollouts fitting;
    fitting.reserve(rollouts.size());
    for (const int64_t r : rollouts) {
      if (prompt + batch_.length(r) <= longest_sequence()) {
        fitting.push_back(r);
      } else if (settings_.overlong == Overlong::kDrop) {
        ++out_.dropped;
      } else {
        fail_overlong(r, prompt);
      }
    }
    return fitting;
  }

  [[noreturn]] void fail_overlong(int64_t rollout, int64_t prompt) const {
    const bool sequence = prompt + batch_.length(rollout) > settings_.max_sequence_tokens;
    const std::string ranks =
        settings_.context_ranks > 1 ? " on each of " + std::to_string(settings_.context_ranks) + " context ranks" : "";
    fail(rollout_name(batch_, rollout), ": a prompt of ", prompt, " and a response of ", batch_.length(rollout),
         " tokens exceed ", sequence ? "max_sequence_tokens " : "max_tokens_per_microbatch ",
         sequence ? settings_.max_sequence_tokens : settings_.max_tokens_per_microbatch, sequence ? "" : ranks,
         "; raise it, or set overlong to drop");
  }

  template <class T>
  static int64_t count(const std::vector<T>& items) {
    return static_cast<int64_t>(items.size());
  }

  const Batch& batch_;
  const Settings& settings_;
  Sides out_;
};

int64_t triangle(int64_t n) { return n * (n + 1) / 2; }

Piece make_piece(const Batch& batch, const Settings& settings, const Side& side, const Rollouts& responses) {
  const int64_t prefix = side.prefix_tokens - 1;
  Piece piece{0, 0, 0, prefix, triangle(prefix)};
  for (const int64_t r : responses) {
    const int64_t length = batch.length(r);
    piece.rows += length;
    piece.cost += triangle(length) + length * prefix;
  }
  piece.cost += settings.token_cost * piece.rows;
  return piece;
}

// Splits `responses` into shares of at most `room` tokens: first fit by decreasing length.
std::vector<Rollouts> split(const Batch& batch, Rollouts responses, int64_t room) {
  int64_t total = 0;
  for (const int64_t r : responses) total += batch.length(r);
  if (total <= room) return {std::move(responses)};
  std::stable_sort(responses.begin(), responses.end(),
                   [&](int64_t a, int64_t b) { return batch.length(a) > batch.length(b); });
  std::vector<Rollouts> shares;
  std::vector<int64_t> left;
  for (const int64_t r : responses) {
    const int64_t length = batch.length(r);
    const size_t place = std::find_if(left.begin(), left.end(), [&](int64_t x) { return length <= x; }) - left.begin();
    if (place == shares.size()) {
      shares.emplace_back();
      left.push_back(room);
    }
    shares[place].push_back(r);
    left[place] -= length;
  }
  for (Rollouts& share : shares) std::sort(share.begin(), share.end());
  return shares;
}

}  // namespace

Sides make_sides(const Batch& batch, const Settings& settings) { return SideMaker(batch, settings).make(); }

Pieces split_sides(const Batch& batch, const Settings& settings, const Sides& sides) {
  Pieces out;
  for (size_t s = 0; s < sides.sides.size(); ++s) {
    const Side& side = sides.sides[s];
    const Rollouts responses(sides.responses.begin() + side.first_response,
                             sides.responses.begin() + side.last_response);
    for (const Rollouts& share : split(batch, responses, settings.capacity() - (side.prefix_tokens - 1))) {
      Piece piece = make_piece(batch, settings, side, share);
      piece.side = static_cast<int64_t>(s);
      piece.first_response = static_cast<int64_t>(out.responses.size());
      out.responses.insert(out.responses.end(), share.begin(), share.end());
      piece.last_response = static_cast<int64_t>(out.responses.size());
      out.pieces.push_back(piece);
    }
  }
  return out;
}

}  // namespace bicc
