#include "launch.h"
#include "token_loss.h"

namespace bicc {
namespace {

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Min {
  __device__ double operator()(double a, double b) const { return a < b ? a : b; }
};
struct Max {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// Reduces over the block, always in the same order; every thread gets the result.
template <class Combine>
__device__ double block_reduce(double value, Combine combine) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) {
      shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + step]);
    }
    __syncthreads();
  }
  const double result = shared[0];
  __syncthreads();
  return result;
}

struct Statistics {
  double values[kLossStatistics];
};

__device__ Statistics no_statistics() {
  Statistics s{};
  s.values[kRatioMin] = INFINITY;
  s.values[kRatioMax] = -INFINITY;
  return s;
}

__device__ void reduce_over_block(const Statistics& s, double* out) {
  for (int i = 0; i < kLossStatistics; ++i) {
    double result;
    if (i == kRatioMin) {
      result = block_reduce(s.values[i], Min());
    } else if (i == kRatioMax) {
      result = block_reduce(s.values[i], Max());
    } else {
      result = block_reduce(s.values[i], Add());
    }
    if (threadIdx.x == 0) out[i] = result;
  }
}

__device__ LossRow read_row(const LossArrays& a, int64_t i) {
  return {a.logp[i],   a.old_logp[i], a.advantage[i], a.weight[i], a.ref_logp ? a.ref_logp[i] : 0.0f,
          a.rollout_logp ? a.rollout_logp[i] : 0.0f};
}

__device__ void count(const LossArrays& a, const LossRow& row, const RowLoss& loss, Statistics& s) {
  const double x = row.logp - row.old_logp;
  const double ratio = exp(x);
  s.values[kLossSum] += loss.loss;
  s.values[kRows] += 1;
  s.values[kClippedLow] += loss.clipped_low;
  s.values[kClippedHigh] += loss.clipped_high;
  s.values[kClippedDual] += loss.clipped_dual;
  s.values[kKlOldNew] += expm1(x) - x;
  if (a.ref_logp) {
    const double d = row.ref_logp - row.logp;
    s.values[kKlNewRef] += expm1(d) - d;
  }
  s.values[kRatioMin] = Min()(s.values[kRatioMin], ratio);
  s.values[kRatioMax] = Max()(s.values[kRatioMax], ratio);
}

__device__ void response_loss(const LossSettings& settings, const LossArrays& a, int64_t segment) {
  const int64_t first = a.cu_response[segment] + threadIdx.x, last = a.cu_response[segment + 1];
  const double rows = static_cast<double>(last - a.cu_response[segment]);
  float mean = 0.0f;
  if (uses_mean(settings.objective)) {
    double sum = 0.0;
    for (int64_t i = first; i < last; i += kThreads) sum += mean_term(settings, read_row(a, i));
    mean = static_cast<float>(block_reduce(sum, Add()) / rows);
  }
  double shared_gradient = 0.0;
  Statistics statistics = no_statistics();
  for (int64_t i = first; i < last; i += kThreads) {
    const LossRow row = read_row(a, i);
    const RowLoss loss = row_loss(settings, row, mean);
    a.gradient[i] = loss.gradient;
    shared_gradient += loss.shared_gradient;
    count(a, row, loss, statistics);
  }
  if (uses_mean(settings.objective)) {
    const float each = static_cast<float>(block_reduce(shared_gradient, Add()) / rows);
    for (int64_t i = first; i < last; i += kThreads) a.gradient[i] += each * mean_term_slope(settings, read_row(a, i));
  }
  reduce_over_block(statistics, a.partials + segment * kLossStatistics);
}

__global__ void token_loss_kernel(LossSettings settings, LossArrays arrays, int64_t segments) {
  for (int64_t s = blockIdx.x; s < segments; s += gridDim.x) response_loss(settings, arrays, s);
}

__global__ void sum_responses_kernel(const double* partials, double* statistics, int64_t segments) {
  Statistics sum = no_statistics();
  for (int64_t s = threadIdx.x; s < segments; s += kThreads) {
    const double* part = partials + s * kLossStatistics;
    for (int i = 0; i < kRatioMin; ++i) sum.values[i] += part[i];
    sum.values[kRatioMin] = Min()(sum.values[kRatioMin], part[kRatioMin]);
    sum.values[kRatioMax] = Max()(sum.values[kRatioMax], part[kRatioMax]);
  }
  reduce_over_block(sum, statistics);
}

}  // namespace

void launch_token_loss(const LossSettings& settings, const LossArrays& arrays, int64_t segments, cudaStream_t stream) {
  if (segments > 0) {
    token_loss_kernel<<<blocks_for(segments), kThreads, 0, stream>>>(settings, arrays, segments);
    check_launch("token_loss");
  }
  sum_responses_kernel<<<1, kThreads, 0, stream>>>(arrays.partials, arrays.statistics, segments);
  check_launch("token_loss");
}

}  // namespace bicc
