// One token of one copy, to every place it goes: the body of the fill kernel.
#pragma once

#include "copy.h"
#include "host_device.h"

namespace bicc {

// Arrays of a fill; field by field those of csrc/fill.h.
struct FillArrays {
  const int32_t* sources[3];  // by CopySource
  const float* features;      // [feature_count, response_tokens]
  int64_t feature_count;
  int64_t response_tokens;
  int32_t* tokens;
  int32_t* positions;
  int32_t* labels;
  int64_t* gather;
  float* features_out;
};

BICC_HOST_DEVICE void place_input(const FillArrays& arrays, int64_t row, int32_t token, int64_t position) {
  arrays.tokens[row] = token;
  arrays.positions[row] = static_cast<int32_t>(position);
}

BICC_HOST_DEVICE void place_response_token(const Copy& copy, int64_t i, const FillArrays& arrays) {
  if (i == 0) place_input(arrays, copy.input_row - 1, static_cast<int32_t>(copy.first_input), copy.position - 1);
  arrays.gather[copy.gather + i] = copy.offset + i;
  const int64_t start = copy.micro_start * arrays.feature_count + copy.gather - copy.micro_start;
  for (int64_t c = 0; c < arrays.feature_count; ++c) {
    arrays.features_out[start + c * copy.micro_rows + i] = arrays.features[c * arrays.response_tokens + copy.offset + i];
  }
}

// Token i of the copy, 0 <= i < copy.length. Different (copy, i) write different places.
BICC_HOST_DEVICE void copy_token(const Copy& copy, int64_t i, const FillArrays& arrays) {
  if (copy.source == kPadding) {
    place_input(arrays, copy.input_row + i, 0, 0);
    arrays.labels[copy.label_row + i] = 0;
    return;
  }
  const int32_t token = arrays.sources[copy.source][copy.offset + i];
  if (i < copy.inputs) place_input(arrays, copy.input_row + i, token, copy.position + i);
  if (i >= copy.label_skip) arrays.labels[copy.label_row + i - copy.label_skip] = token;
  if (copy.gather >= 0) place_response_token(copy, i, arrays);
}

}  // namespace bicc
