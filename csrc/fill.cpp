#include "fill.h"

#include <algorithm>
#include <numeric>

#include "parallel.h"

namespace bicc {
namespace {

class RowWriter {
 public:
  RowWriter(const Plan& plan, const RowBuffers& out) : plan_(plan), out_(out) {}

  void write(const Copy& copy) const {
    std::iota(out_.positions + copy.input_row, out_.positions + copy.input_row + copy.inputs,
              static_cast<int32_t>(copy.position));
    const int32_t* tokens = source(copy) + copy.offset;
    std::copy(tokens, tokens + copy.inputs, out_.tokens + copy.input_row);
    std::copy(tokens + copy.label_skip, tokens + copy.length, out_.labels + copy.label_row);
    if (copy.gather >= 0) write_response(copy);
  }

  void write_padding(const Copy& copy) const {
    for (int32_t* field : {out_.tokens, out_.positions, out_.labels}) {
      std::fill(field + copy.input_row, field + copy.input_row + copy.length, 0);
    }
  }

 private:
  const int32_t* source(const Copy& copy) const {
    if (copy.source == kFromPrompts) return plan_.batch.prompt_tokens.data;
    return copy.source == kFromResponses ? plan_.batch.tokens.data : plan_.headers.data();
  }

  void write_response(const Copy& copy) const {
    out_.tokens[copy.input_row - 1] = static_cast<int32_t>(copy.first_input);
    out_.positions[copy.input_row - 1] = static_cast<int32_t>(copy.position - 1);
    std::iota(out_.gather + copy.gather, out_.gather + copy.gather + copy.length, copy.offset);
  }

  const Plan& plan_;
  const RowBuffers& out_;
};

// Appends cumulative lengths, starting at 0, to an int32 buffer.
class Cumulative {
 public:
  explicit Cumulative(int32_t* out) : out_(out) {}
  void restart() { *out_++ = 0, sum_ = 0; }
  void add(int64_t length) { *out_++ = static_cast<int32_t>(sum_ += length); }

 private:
  int32_t* out_;
  int64_t sum_ = 0;
};

class SegmentWriter {
 public:
  SegmentWriter(const Plan& plan, const SegmentBuffers& out)
      : plan_(plan),
        out_(out),
        seqlens_(out.cu_seqlens),
        prefixes_(out.cu_prefix),
        sides_(out.cu_response_side),
        responses_(out.cu_response) {}

  // Call for the micro-batches in order.
  void write(const Bin& bin, const MicroBatchSize& size) {
    for (Cumulative* list : {&seqlens_, &prefixes_, &sides_, &responses_}) list->restart();
    for (const int64_t p : bin) {
      const int64_t rows = side_of(p).prefix_tokens - 1;
      prefixes_.add(rows);
      seqlens_.add(rows);
    }
    for (const int64_t p : bin) {
      const Piece& piece = plan_.pieces.pieces[p];
      sides_.add(piece.rows - (side_of(p).prefix_tokens - 1));
      for (int64_t r = piece.first_response; r < piece.last_response; ++r) {
        write_response(plan_.pieces.responses[r], side_of(p).group);
      }
    }
    if (size.padded()) seqlens_.add(size.rows - size.prefix_rows - size.response_rows);
  }

 private:
  const Side& side_of(int64_t piece) const { return plan_.sides.sides[plan_.pieces.pieces[piece].side]; }

  void write_response(int64_t rollout, int64_t group) {
    responses_.add(plan_.batch.length(rollout));
    seqlens_.add(plan_.batch.length(rollout));
    out_.rollout[segment_] = static_cast<int32_t>(rollout);
    out_.group[segment_] = static_cast<int32_t>(group);
    out_.scale[segment_++] = 1.0f / static_cast<float>(plan_.segments_of[rollout]);
  }

  const Plan& plan_;
  const SegmentBuffers& out_;
  Cumulative seqlens_, prefixes_, sides_, responses_;
  int64_t segment_ = 0;
};

}  // namespace

SegmentExtent extent_of_segments(const Plan& plan) {
  SegmentExtent extent;
  for (const MicroBatchSize& size : plan.sizes) {
    extent.segments += size.segments;
    extent.sides += size.sides;
    extent.seqlens += size.sides + size.segments + size.padded() + 1;
    extent.micro_batches += 1;
  }
  for (const ContextShare& share : plan.shares) extent.chunks += static_cast<int64_t>(share.chunks.size());
  return extent;
}

void fill_segments(const Plan& plan, const SegmentBuffers& buffers) {
  SegmentWriter writer(plan, buffers);
  for (size_t i = 0; i < plan.micro_batches.size(); ++i) writer.write(plan.micro_batches[i], plan.sizes[i]);
  int64_t i = 0;
  for (const ContextShare& share : plan.shares) {
    for (const Chunk& chunk : share.chunks) {
      buffers.chunk_segment[i] = static_cast<int32_t>(chunk.segment);
      buffers.chunk_start[i] = static_cast<int32_t>(chunk.start);
      buffers.chunk_length[i++] = static_cast<int32_t>(chunk.length);
    }
  }
}

void fill_rows(const Plan& plan, const RankRange& range, int64_t threads, const RowBuffers& buffers) {
  const RowWriter writer(plan, buffers);
  const std::vector<RowExtent> starts = starts_of(plan, range);
  parallel_for(range.last - range.first, threads, [&] {
    return [&, copies = std::vector<Copy>{}](int64_t i) mutable {
      copies.clear();
      append_copies(plan, range.first + i, range.context_rank, starts[i], copies);
      for (const Copy& copy : copies) copy.source == kPadding ? writer.write_padding(copy) : writer.write(copy);
    };
  });
}

}  // namespace bicc
