#include "fill.h"

#include <algorithm>
#include <numeric>

#include "parallel.h"

namespace bicc {
namespace {

Extent extent_of(const MicroBatchSize& size) {
  return {size.rows, size.response_rows, size.segments, size.sides, size.sides + size.segments + size.padded() + 1, 1};
}

void advance(Extent& at, const Extent& by) {
  at.rows += by.rows;
  at.response_rows += by.response_rows;
  at.segments += by.segments;
  at.sides += by.sides;
  at.seqlens += by.seqlens;
  at.micro_batches += by.micro_batches;
}

template <class T>
T* copy(const T* source, int64_t n, T* target) {
  return std::copy(source, source + n, target);
}

// Writes the tokens of a side's prefix and returns the end of what it wrote.
int32_t* write_prefix_tokens(const Plan& plan, const Side& side, int32_t* out) {
  const Batch& batch = plan.batch;
  const int64_t prompt = batch.prompt_offsets[side.group];
  out = copy(batch.prompt_tokens.data + prompt, batch.prompt_length(side.group), out);
  if (side.context_tokens == 0) return out;
  const auto& header = side.shown == Shown::kWrong ? plan.settings.wrong_header : plan.settings.right_header;
  for (int64_t p = side.first_part; p < side.last_part; ++p) {
    const Part& part = plan.sides.parts[p];
    const int32_t* tokens = batch.tokens.data + batch.offsets[part.rollout];
    out = std::copy(header.begin(), header.end(), out);
    out = copy(tokens, part.head, out);
    out = copy(tokens + part.length - part.tail, part.tail, out);
  }
  return std::copy(plan.settings.answer_header.begin(), plan.settings.answer_header.end(), out);
}

// Writes one micro-batch; all pointers of `out_` are at its first item.
class Writer {
 public:
  Writer(const Plan& plan, Span<float> channels, const Bin& bin, const MicroBatchSize& size, const Buffers& out)
      : plan_(plan), channels_(channels), bin_(bin), size_(size), out_(out) {}

  void write() {
    write_prefixes();
    write_responses();
    write_padding();
  }

 private:
  const Side& side_of(size_t index) const { return plan_.sides.sides[plan_.pieces.pieces[bin_[index]].side]; }

  // A whole prefix is written although its last token has no row here: the next prefix or the first response,
  // written later, takes that place.
  void write_prefixes() {
    int64_t row = 0;
    out_.cu_seqlens[0] = out_.cu_prefix[0] = 0;
    for (size_t p = 0; p < bin_.size(); ++p) {
      const int64_t rows = side_of(p).prefix_tokens - 1;
      write_prefix_tokens(plan_, side_of(p), out_.tokens + row);
      copy(out_.tokens + row + 1, rows, out_.labels + row);
      std::iota(out_.positions + row, out_.positions + row + rows, 0);
      row += rows;
      out_.cu_seqlens[p + 1] = out_.cu_prefix[p + 1] = static_cast<int32_t>(row);
    }
  }

  int32_t last_prefix_token(size_t index) const {
    const Side& side = side_of(index);
    if (side.prefix_tokens > 1) return out_.labels[out_.cu_prefix[index + 1] - 1];
    return plan_.batch.prompt_tokens[plan_.batch.prompt_offsets[side.group]];
  }

  void write_responses() {
    out_.cu_response_side[0] = out_.cu_response[0] = 0;
    for (size_t p = 0; p < bin_.size(); ++p) {
      const Piece& piece = plan_.pieces.pieces[bin_[p]];
      for (int64_t i = piece.first_response; i < piece.last_response; ++i) {
        write_response(plan_.pieces.responses[i], side_of(p), last_prefix_token(p));
      }
      out_.cu_response_side[p + 1] = static_cast<int32_t>(done_);
    }
  }

  void write_response(int64_t rollout, const Side& side, int32_t first_input) {
    const int64_t first = plan_.batch.offsets[rollout];
    const int64_t length = plan_.batch.length(rollout);
    const int32_t* tokens = plan_.batch.tokens.data + first;
    const int64_t row = size_.prefix_rows + done_;
    out_.tokens[row] = first_input;
    copy(tokens, length - 1, out_.tokens + row + 1);
    copy(tokens, length, out_.labels + row);
    std::iota(out_.positions + row, out_.positions + row + length, static_cast<int32_t>(side.prefix_tokens - 1));
    std::iota(out_.gather + done_, out_.gather + done_ + length, first);
    write_channels(first, length);
    out_.rollout[segment_] = static_cast<int32_t>(rollout);
    out_.group[segment_] = static_cast<int32_t>(side.group);
    out_.scale[segment_] = 1.0f / static_cast<float>(plan_.segments_of[rollout]);
    done_ += length;
    ++segment_;
    out_.cu_seqlens[size_.sides + segment_] = static_cast<int32_t>(size_.prefix_rows + done_);
    out_.cu_response[segment_] = static_cast<int32_t>(done_);
  }

  void write_channels(int64_t first, int64_t length) {
    for (int64_t c = 0; c < channels_.size / plan_.batch.tokens.size; ++c) {
      copy(channels_.data + c * plan_.batch.tokens.size + first, length,
           out_.channels + c * size_.response_rows + done_);
    }
  }

  void write_padding() {
    if (!size_.padded()) return;
    for (int32_t* field : {out_.tokens, out_.positions, out_.labels}) {
      std::fill(field + size_.prefix_rows + done_, field + size_.rows, 0);
    }
    out_.cu_seqlens[size_.sides + segment_ + 1] = static_cast<int32_t>(size_.rows);
  }

  const Plan& plan_;
  const Span<float> channels_;
  const Bin& bin_;
  const MicroBatchSize& size_;
  const Buffers out_;
  int64_t done_ = 0;     // response rows written
  int64_t segment_ = 0;  // responses written
};

Buffers at(const Buffers& whole, const Extent& start, int64_t channels) {
  Buffers part = whole;
  for (int32_t** field : {&part.tokens, &part.positions, &part.labels}) *field += start.rows;
  for (int32_t** field : {&part.cu_prefix, &part.cu_response_side}) *field += start.sides + start.micro_batches;
  part.cu_seqlens += start.seqlens;
  part.cu_response += start.segments + start.micro_batches;
  part.rollout += start.segments;
  part.group += start.segments;
  part.scale += start.segments;
  part.gather += start.response_rows;
  part.channels += channels * start.response_rows;
  return part;
}

}  // namespace

Extent extent_of(const Plan& plan) {
  Extent total;
  for (const MicroBatchSize& size : plan.sizes) advance(total, extent_of(size));
  return total;
}

void fill(const Plan& plan, Span<float> channels, int64_t threads, const Buffers& buffers) {
  const int64_t channel_count = channels.size / plan.batch.tokens.size;
  std::vector<Extent> starts(1);
  for (const MicroBatchSize& size : plan.sizes) {
    starts.push_back(starts.back());
    advance(starts.back(), extent_of(size));
  }
  parallel_for(static_cast<int64_t>(plan.sizes.size()), threads, [&](int64_t i) {
    Writer(plan, channels, plan.micro_batches[i], plan.sizes[i], at(buffers, starts[i], channel_count)).write();
  });
}

}  // namespace bicc
