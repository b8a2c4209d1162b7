// The bodies of the CUDA kernels, called one item after another on the host (test_cuda_on_host.py).
#include "cuda/copy_token.h"
#include "cuda/token_loss_math.h"

using namespace bicc;

extern "C" void run_copies(const Copy* copies, int64_t count, const FillArrays* arrays) {
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t i = 0; i < copies[c].length; ++i) copy_token(copies[c], i, *arrays);
  }
}

// The steps of token_loss.cu for one response; returns its loss and counts its clipped rows.
extern "C" double response_loss(const LossSettings* settings, const LossRow* rows, int64_t count, float* gradient,
                                int64_t* clipped) {
  double mean = 0, shared = 0, loss = 0;
  for (int64_t i = 0; i < count; ++i) mean += mean_term(*settings, rows[i]) / count;
  for (int64_t i = 0; i < count; ++i) {
    const RowLoss row = row_loss(*settings, rows[i], static_cast<float>(mean));
    loss += row.loss;
    gradient[i] = row.gradient;
    shared += row.shared_gradient / count;
    clipped[0] += row.clipped_low;
    clipped[1] += row.clipped_high;
    clipped[2] += row.clipped_dual;
  }
  for (int64_t i = 0; i < count && uses_mean(settings->objective); ++i) {
    gradient[i] += static_cast<float>(shared) * mean_term_slope(*settings, rows[i]);
  }
  return loss;
}
