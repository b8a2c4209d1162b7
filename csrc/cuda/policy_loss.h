// The policy loss of a micro-batch's response rows: their sum, its gradient and the clip masks.
#pragma once

#include <cuda_runtime.h>

#include "policy_loss_math.h"

namespace bicc {

constexpr int kLossBlocks = 1024;

// Arrays of one micro-batch in device memory, [rows] unless said otherwise.
template <class T>
struct LossArrays {
  const T* logp;
  const T* old_logp;  // null: the log-probs themselves, so that the ratio is 1
  const T* advantage;
  const T* weight;
  const T* regularisation;  // may be null where both coefficients are 0
  const T* ref_logp;        // may be null where kl_coefficient is 0
  const T* entropy;         // may be null where entropy_coefficient is 0
  const T* mean;            // of the objective's averaged term over the row's response; null: computed here
  const int64_t* response;  // index of the row's response; rises, in steps of 1 where mean is null
  T* share;                 // out: [1]
  T* gradient;              // out: d share / d logp
  T* mean_gradient;         // out: d share / d mean; null where mean is
  bool* masks;              // out: [3, rows], clipped at the lower edge, the upper edge, by the dual clip
  double* partials;         // workspace [kLossBlocks]
};

// A block takes responses one after another; then one block adds up the blocks in their order: the same sum every
// time. Does not synchronise; throws std::runtime_error if a launch fails.
template <class T>
void launch_policy_loss(const LossSettings<T>& settings, const LossArrays<T>& arrays, int64_t rows,
                        cudaStream_t stream);

}  // namespace bicc
