// One entry of the plan's list of copies, executed by the CPU fill or the CUDA kernel.
#pragma once

#include <cstdint>

namespace bicc {

// kFromHeaders: Plan::headers. kPadding: zeros.
enum CopySource : int64_t { kFromPrompts, kFromResponses, kFromHeaders, kPadding };

// A run of tokens of one chunk of a segment and its destination. Rows and places index the output buffers. All fields are
// int64_t, so that an array of copies is a plain table.
struct Copy {
  int64_t source;       // CopySource
  int64_t offset;       // of the first token in its source
  int64_t length;       // tokens
  int64_t inputs;       // leading tokens that are inputs; the token after a chunk's last input is only a label
  int64_t input_row;    // row of the first token
  int64_t position;     // position of the first token
  int64_t label_row;    // row that the first label goes to
  int64_t label_skip;   // leading tokens that are not a label of the chunk's rows: 1 at the start of a prefix's chunk
  int64_t first_input;  // responses: the token before the chunk, input of the row before input_row; else -1
  int64_t gather;       // responses: place of the first label in the gather index; else -1
  int64_t segment;      // responses: index among the responses of the micro-batch
  int64_t rollout;      // responses: index in the batch
  int64_t segments;     // responses: segments of the whole step that train the rollout
};

}  // namespace bicc
