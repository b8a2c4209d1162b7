#include "copies.h"

#include <algorithm>

namespace bicc {
namespace {

// Tokens that lie one after another in their source.
struct Run {
  CopySource source;
  int64_t offset;
  int64_t length;
};

int64_t size_of(const std::vector<int64_t>& header) { return static_cast<int64_t>(header.size()); }

// Calls visit(run) for the tokens of a side's prefix, in order; no run is empty.
template <class Visit>
void for_runs(const Plan& plan, const Side& side, const Visit& visit) {
  const Settings& settings = plan.settings;
  const auto add = [&](CopySource source, int64_t offset, int64_t length) {
    if (length > 0) visit(Run{source, offset, length});
  };
  add(kFromPrompts, plan.batch.prompt_offsets[side.group], plan.batch.prompt_length(side.group));
  if (side.context_tokens == 0) return;
  const bool wrong = side.shown == Shown::kWrong;
  const int64_t header = size_of(wrong ? settings.wrong_header : settings.right_header);
  for (int64_t p = side.first_part; p < side.last_part; ++p) {
    const Part& part = plan.sides.parts[p];
    const int64_t first = plan.batch.offsets[part.rollout];
    add(kFromHeaders, wrong ? 0 : size_of(settings.wrong_header), header);
    add(kFromResponses, first, part.head);
    add(kFromResponses, first + part.length - part.tail, part.tail);
  }
  add(kFromHeaders, size_of(settings.wrong_header) + size_of(settings.right_header), size_of(settings.answer_header));
}

// The last token of a side's prefix.
int32_t last_token(const Plan& plan, const Side& side) {
  Run last{};
  for_runs(plan, side, [&](const Run& run) { last = run; });
  const int64_t place = last.offset + last.length - 1;
  if (last.source == kFromPrompts) return plan.batch.prompt_tokens[place];
  if (last.source == kFromResponses) return plan.batch.tokens[place];
  return plan.headers[place];
}

// Appends the copies of a context rank's rows of one micro-batch, in the order of the rows.
class Copier {
 public:
  Copier(const Plan& plan, int64_t index, const RowExtent& start, std::vector<Copy>& copies)
      : plan_(plan), copies_(copies), row_(start.rows), gathered_(start.response_rows) {
    sides_.reserve(plan.sizes[index].sides);
    responses_.reserve(plan.sizes[index].segments);
    for (const int64_t p : plan.micro_batches[index]) {
      const Piece& piece = plan.pieces.pieces[p];
      const Side& side = plan.sides.sides[piece.side];
      sides_.push_back(&side);
      const int32_t first_input = last_token(plan, side);
      for (int64_t r = piece.first_response; r < piece.last_response; ++r) {
        responses_.push_back({plan.pieces.responses[r], side.prefix_tokens, first_input});
      }
    }
  }

  void add(const ContextShare& share) {
    const int64_t end = row_ + share.rows, sides = static_cast<int64_t>(sides_.size());
    for (const Chunk& chunk : share.chunks) {
      chunk.segment < sides ? add_prefix(*sides_[chunk.segment], chunk) : add_response(chunk.segment - sides, chunk);
      row_ += chunk.length;
    }
    const int64_t rows = end - row_;
    if (rows > 0) copies_.push_back({kPadding, 0, rows, rows, row_, 0, row_, 0, -1, -1, -1, -1, 0});
  }

 private:
  struct Response {
    int64_t rollout;
    int64_t position;     // of the first token
    int32_t first_input;  // the last token of the prefix
  };

  // Token t of a prefix is the input of row t and the label of row t - 1, where these are in the chunk. So the last
  // token of a prefix is no input of its rows: it is the first input of every response.
  void add_prefix(const Side& side, const Chunk& chunk) {
    const int64_t last = chunk.start + chunk.length;  // the last token that is needed, as a label
    int64_t done = 0;
    for_runs(plan_, side, [&](const Run& run) {
      const int64_t from = std::max(done, chunk.start), to = std::min(done + run.length, last + 1);
      if (from < to) {
        const int64_t skip = from == chunk.start, row = row_ + from - chunk.start;
        copies_.push_back({run.source, run.offset + from - done, to - from, std::min(to, last) - from, row, from,
                           row - 1 + skip, skip, -1, -1, -1, -1, 0});
      }
      done += run.length;
    });
  }

  // The first input is the token before the chunk, one row before the copied inputs.
  void add_response(int64_t segment, const Chunk& chunk) {
    const Response& response = responses_[segment];
    const int64_t first = plan_.batch.offsets[response.rollout] + chunk.start;
    const int32_t input = chunk.start > 0 ? plan_.batch.tokens[first - 1] : response.first_input;
    copies_.push_back({kFromResponses, first, chunk.length, chunk.length - 1, row_ + 1,
                       response.position + chunk.start, row_, 0, input, gathered_, segment, response.rollout,
                       plan_.segments_of[response.rollout]});
    gathered_ += chunk.length;
  }

  const Plan& plan_;
  std::vector<Copy>& copies_;
  std::vector<const Side*> sides_;
  std::vector<Response> responses_;
  int64_t row_;       // first row of the next chunk
  int64_t gathered_;  // place of the next response row in the gather index
};

}  // namespace

std::vector<RowExtent> starts_of(const Plan& plan, const RankRange& range) {
  std::vector<RowExtent> starts{RowExtent{}};
  for (int64_t i = range.first; i < range.last; ++i) {
    const ContextShare& share = plan.share(i, range.context_rank);
    starts.push_back({starts.back().rows + share.rows, starts.back().response_rows + share.response_rows});
  }
  return starts;
}

void append_copies(const Plan& plan, int64_t index, int64_t context_rank, const RowExtent& start,
                   std::vector<Copy>& copies) {
  Copier(plan, index, start, copies).add(plan.share(index, context_rank));
}

}  // namespace bicc
