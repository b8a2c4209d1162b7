#include "copies.h"

namespace bicc {
namespace {

int64_t size_of(const std::vector<int64_t>& header) { return static_cast<int64_t>(header.size()); }

int32_t token_at(const Plan& plan, const Copy& copy, int64_t index) {
  const int64_t place = copy.offset + index;
  if (copy.source == kFromPrompts) return plan.batch.prompt_tokens[place];
  if (copy.source == kFromResponses) return plan.batch.tokens[place];
  return plan.headers[place];
}

// Appends the copies of one micro-batch, in the order of its rows.
class Copier {
 public:
  Copier(const Plan& plan, const Extent& start, const MicroBatchSize& size, std::vector<Copy>& copies)
      : plan_(plan),
        start_(start),
        size_(size),
        copies_(copies),
        row_(start.rows),
        response_row_(start.rows + size.prefix_rows) {}

  void add_piece(const Piece& piece) {
    const Side& side = plan_.sides.sides[piece.side];
    add_prefix(side);
    const Copy& last = copies_.back();
    const int32_t first_input = token_at(plan_, last, last.length - 1);
    for (int64_t i = piece.first_response; i < piece.last_response; ++i) {
      add_response(plan_.pieces.responses[i], side.prefix_tokens, first_input);
    }
  }

  void add_padding() {
    const int64_t rows = start_.rows + size_.rows - response_row_;
    if (rows > 0) copies_.push_back({kPadding, 0, rows, rows, response_row_, 0, response_row_, 0, -1, -1, -1, -1, 0});
  }

 private:
  void add_prefix(const Side& side) {
    const Settings& settings = plan_.settings;
    done_ = 0;
    add_run(side, kFromPrompts, plan_.batch.prompt_offsets[side.group], plan_.batch.prompt_length(side.group));
    if (side.context_tokens > 0) {
      const bool wrong = side.shown == Shown::kWrong;
      const int64_t header = size_of(wrong ? settings.wrong_header : settings.right_header);
      for (int64_t p = side.first_part; p < side.last_part; ++p) {
        const Part& part = plan_.sides.parts[p];
        const int64_t first = plan_.batch.offsets[part.rollout];
        add_run(side, kFromHeaders, wrong ? 0 : size_of(settings.wrong_header), header);
        add_run(side, kFromResponses, first, part.head);
        add_run(side, kFromResponses, first + part.length - part.tail, part.tail);
      }
      const int64_t answer = size_of(settings.wrong_header) + size_of(settings.right_header);
      add_run(side, kFromHeaders, answer, size_of(settings.answer_header));
    }
    row_ += side.prefix_tokens - 1;
  }

  // Adds the next `length` tokens of a prefix that starts at row_ and of which done_ tokens are placed. The first
// token of a prefix is no label, and its last token is no input: it is the first input of every response.
  void add_run(const Side& side, CopySource source, int64_t offset, int64_t length) {
    if (length == 0) return;
    const int64_t skip = done_ == 0;
    const bool last = done_ + length == side.prefix_tokens;
    copies_.push_back({source, offset, length, length - last, row_ + done_, done_, row_ + done_ - 1 + skip, skip, -1, -1,
                       -1, -1, 0});
    done_ += length;
  }

  // The first input is the last token of the prefix, one row before the copied inputs.
  void add_response(int64_t rollout, int64_t position, int32_t first_input) {
    const int64_t length = plan_.batch.length(rollout);
    copies_.push_back({kFromResponses, plan_.batch.offsets[rollout], length, length - 1, response_row_ + 1, position,
                       response_row_, 0, first_input, start_.response_rows + gathered_, segments_++, rollout,
                       plan_.segments_of[rollout]});
    response_row_ += length;
    gathered_ += length;
  }

  const Plan& plan_;
  const Extent& start_;
  const MicroBatchSize& size_;
  std::vector<Copy>& copies_;
  int64_t row_;           // first row of the next prefix
  int64_t response_row_;  // first row of the next response
  int64_t gathered_ = 0;  // response rows so far
  int64_t segments_ = 0;  // responses so far
  int64_t done_ = 0;      // tokens of the prefix so far
};

}  // namespace

std::vector<Extent> starts_of(const Plan& plan, Range range) {
  std::vector<Extent> starts{Extent{}};
  for (int64_t i = range.first; i < range.last; ++i) {
    const MicroBatchSize& size = plan.sizes[i];
    Extent next = starts.back();
    next.rows += size.rows;
    next.response_rows += size.response_rows;
    next.segments += size.segments;
    next.sides += size.sides;
    next.seqlens += size.sides + size.segments + size.padded() + 1;
    next.micro_batches += 1;
    starts.push_back(next);
  }
  return starts;
}

void append_copies(const Plan& plan, int64_t index, const Extent& start, std::vector<Copy>& copies) {
  Copier copier(plan, start, plan.sizes[index], copies);
  for (const int64_t piece : plan.micro_batches[index]) copier.add_piece(plan.pieces.pieces[piece]);
  copier.add_padding();
}

}  // namespace bicc
