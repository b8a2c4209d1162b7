// One token of one copy, to every place it goes: the body of the fill kernel.
#pragma once

#include "copy.h"
#include "host_device.h"

namespace bicc {

// Arrays of a fill. The rows are those of csrc/fill.h for one rank, int64 as the policy reads them; of the labels,
// those of response rows only.
struct FillArrays {
  const int32_t* prompt_tokens;
  const int32_t* response_tokens;
  const int32_t* headers;
  int64_t* tokens;     // [rows]
  int64_t* positions;  // [rows]
  int64_t* labels;     // [response rows], as are all below
  int64_t* gather;
  int64_t* segments;  // index of the row's response in its micro-batch
  int64_t* rollouts;  // index of the row's rollout in the batch
  float* scales;      // 1 / segments of the whole step that train the rollout
};

BICC_HOST_DEVICE void place_input(const FillArrays& arrays, int64_t row, int64_t token, int64_t position) {
  arrays.tokens[row] = token;
  arrays.positions[row] = position;
}

BICC_HOST_DEVICE void place_response_token(const Copy& copy, int64_t i, int32_t token, const FillArrays& arrays) {
  if (i == 0) place_input(arrays, copy.input_row - 1, copy.first_input, copy.position - 1);
  const int64_t row = copy.gather + i;
  arrays.labels[row] = token;
  arrays.gather[row] = copy.offset + i;
  arrays.segments[row] = copy.segment;
  arrays.rollouts[row] = copy.rollout;
  arrays.scales[row] = 1.0f / static_cast<float>(copy.segments);
}

// Token i of the copy, 0 <= i < copy.length. Different (copy, i) write different places.
BICC_HOST_DEVICE void copy_token(const Copy& copy, int64_t i, const FillArrays& arrays) {
  if (copy.source == kPadding) {
    place_input(arrays, copy.input_row + i, 0, 0);
    return;
  }
  const int32_t* source = copy.source == kFromPrompts     ? arrays.prompt_tokens
                          : copy.source == kFromResponses ? arrays.response_tokens
                                                          : arrays.headers;
  const int32_t token = source[copy.offset + i];
  if (i < copy.inputs) place_input(arrays, copy.input_row + i, token, copy.position + i);
  if (copy.gather >= 0) place_response_token(copy, i, token, arrays);
}

}  // namespace bicc
