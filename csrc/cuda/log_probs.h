// Log-probs of labels over a vocabulary of which each tensor-parallel rank has a part: one pass over its logits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"

namespace bicc {

// A chunk of logits [rows, vocabulary], float32, and the labels of its rows.
struct LogitRows {
  float* logits;
  int64_t stride;  // elements between two rows
  int64_t rows;
  int64_t vocabulary;     // of this rank's part
  int64_t first;          // token id of column 0
  const int64_t* labels;  // token ids [rows]; a label outside this part belongs to another rank
  float scale;            // z = scale * logit: 1 / temperature
};

// Writes four float32 values a row, [4, rows]:
//   the largest z; the sum of exp(z - largest); the sum of exp(z - largest) (z - largest); the label's z, or 0
void launch_logit_statistics(const LogitRows& logits, float* statistics, cudaStream_t stream);

// Gradients of a row's log-prob and entropy, float32 [rows], and what the forward pass found over the whole vocabulary.
struct LogitGradients {
  const float* lse;           // log-sum-exp of z
  const float* entropy;       // read with grad_entropy only
  const float* grad_log_prob;
  const float* grad_entropy;  // or null: the entropy is in no loss
};

// Overwrites each row's logits with the loss's gradient by them,
//   scale * (grad_log_prob (onehot(label) - p) - grad_entropy p (log p + entropy)),  p = exp(z - lse),
// as `vocabulary` elements of `dtype` that begin where the row begins.
void launch_logit_gradient(Dtype dtype, const LogitRows& logits, const LogitGradients& gradients, cudaStream_t stream);

}  // namespace bicc
