// The policy loss of a micro-batch's response rows: sum, gradient and statistics.
#pragma once

#include <cuda_runtime.h>

#include "token_loss_math.h"

namespace bicc {

// Arrays of one micro-batch in device memory; float32 [rows] unless said otherwise.
struct LossArrays {
  const float* logp;
  const float* old_logp;
  const float* advantage;
  const float* weight;
  const float* ref_logp;       // null where kl_coefficient is 0
  const float* rollout_logp;   // null where tis_cap is 0
  const int32_t* cu_response;  // [segments + 1]: rows of each response
  float* gradient;             // out: d loss / d logp
  double* partials;            // workspace [segments, kLossStatistics]
  double* statistics;          // out: [kLossStatistics]
};

// Sums over the rows, and the extremes of the ratio exp(x); x as in token_loss_math.h.
enum LossStatistic {
  kLossSum,
  kRows,
  kClippedLow,
  kClippedHigh,
  kClippedDual,
  kKlOldNew,  // k3 estimate of KL(old || new): e^x - 1 - x
  kKlNewRef,  // k3 estimate of KL(new || ref); 0 without ref_logp
  kRatioMin,
  kRatioMax,
  kLossStatistics
};

// One block a response, then one block that adds up the responses in their order: the same sums every time.
// Does not synchronise; throws std::runtime_error if a launch fails.
void launch_token_loss(const LossSettings& settings, const LossArrays& arrays, int64_t segments, cudaStream_t stream);

}  // namespace bicc
