// Merging two parts of one softmax by their log-sum-exps.
#pragma once

#include <cmath>

#include "host_device.h"

namespace bicc {

struct Shares {
  float own;
  float other;
  float lse;
};

// Shares of the softmax mass that two parts hold, and the log-sum-exp of both. A part without keys has a
// log-sum-exp of -inf and no share.
BICC_HOST_DEVICE Shares merge_shares(float lse_own, float lse_other) {
  const float largest = fmaxf(lse_own, lse_other);
  if (largest == -INFINITY) return {0.0f, 0.0f, -INFINITY};
  const float own = expf(lse_own - largest);
  const float other = expf(lse_other - largest);
  const float sum = own + other;
  return {own / sum, other / sum, largest + logf(sum)};
}

}  // namespace bicc
