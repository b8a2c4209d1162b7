#include "log_probs.h"

#include <cfloat>
#include <cmath>

#include "elements.cuh"

namespace bicc {
namespace {

constexpr int kWarps = kThreads / kWarp;

// Of some of a row's z.
struct RowSums {
  float largest;
  float total;     // sum of exp(z - largest)
  float weighted;  // sum of exp(z - largest) (z - largest)
};

// Sums of no z. Finite, so that a difference of two maxima is a number; the total of 0 takes its weight away.
__device__ RowSums no_sums() { return {-FLT_MAX, 0.0f, 0.0f}; }

// The same sums relative to a larger maximum.
__device__ RowSums relative_to(float largest, const RowSums& sums) {
  const float less = sums.largest - largest;
  const float share = expf(less);
  return {largest, share * sums.total, share * (sums.weighted + less * sums.total)};
}

__device__ RowSums combined(const RowSums& a, const RowSums& b) {
  const float largest = fmaxf(a.largest, b.largest);
  const RowSums x = relative_to(largest, a), y = relative_to(largest, b);
  return {largest, x.total + y.total, x.weighted + y.weighted};
}

__device__ RowSums combined_over_warp(RowSums sums) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    sums = combined(sums, {__shfl_down_sync(0xffffffffu, sums.largest, step),
                           __shfl_down_sync(0xffffffffu, sums.total, step),
                           __shfl_down_sync(0xffffffffu, sums.weighted, step)});
  }
  return sums;  // complete in lane 0
}

// The first thread gets the block's sums. Always in the same order: two runs give the same bits.
__device__ RowSums combined_over_block(const RowSums& own) {
  __shared__ RowSums of_warps[kWarps];
  const RowSums of_warp = combined_over_warp(own);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  RowSums sums = of_warps[0];
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) sums = combined(sums, of_warps[warp]);
  }
  __syncthreads();  // of_warps is written again for the next row
  return sums;
}

// NaN and infinite logits make the sums NaN, and so the row's results.
template <int N>
__device__ RowSums thread_sums(const float* row, int64_t vocabulary, float scale) {
  RowSums sums = no_sums();
#pragma unroll 4
  for (int64_t i = int64_t{threadIdx.x} * N; i < vocabulary; i += kThreads * N) {
    Vector<float, N> z = *reinterpret_cast<const Vector<float, N>*>(row + i);
    float largest = sums.largest;
    for (int n = 0; n < N; ++n) {
      z.values[n] *= scale;
      largest = fmaxf(largest, z.values[n]);
    }
    sums = relative_to(largest, sums);
    for (int n = 0; n < N; ++n) {
      const float less = z.values[n] - largest;
      const float share = expf(less);
      sums.total += share;
      sums.weighted += share * less;
    }
  }
  return sums;
}

template <int N>
__global__ void statistics_kernel(LogitRows logits, float* statistics) {
  for (int64_t r = blockIdx.x; r < logits.rows; r += gridDim.x) {
    const float* row = logits.logits + r * logits.stride;
    const RowSums sums = combined_over_block(thread_sums<N>(row, logits.vocabulary, logits.scale));
    if (threadIdx.x != 0) continue;
    const int64_t label = logits.labels[r] - logits.first;
    const bool is_local = label >= 0 && label < logits.vocabulary;
    statistics[r] = sums.largest;
    statistics[logits.rows + r] = sums.total;
    statistics[2 * logits.rows + r] = sums.weighted;
    statistics[3 * logits.rows + r] = is_local ? logits.scale * row[label] : 0.0f;
  }
}

template <class T, int N>
__global__ void gradient_kernel(LogitRows logits, LogitGradients gradients) {
  for (int64_t r = blockIdx.x; r < logits.rows; r += gridDim.x) {
    float* row = logits.logits + r * logits.stride;
    T* out = reinterpret_cast<T*>(row);
    const float lse = gradients.lse[r];
    const float grad_log_prob = logits.scale * gradients.grad_log_prob[r];
    const float grad_entropy = gradients.grad_entropy ? logits.scale * gradients.grad_entropy[r] : 0.0f;
    const float entropy = gradients.grad_entropy ? gradients.entropy[r] : 0.0f;
    const int64_t label = logits.labels[r] - logits.first;
    for (int64_t start = 0; start < logits.vocabulary; start += kThreads * N) {
      const int64_t i = start + int64_t{threadIdx.x} * N;
      const bool inside = i < logits.vocabulary;
      Vector<float, N> z{};
      if (inside) z = *reinterpret_cast<const Vector<float, N>*>(row + i);
      // A narrower gradient lies before its logit, so what is written below was read before this line.
      __syncthreads();
      if (!inside) continue;
      Vector<T, N> gradient;
      for (int n = 0; n < N; ++n) {
        const float log_p = logits.scale * z.values[n] - lse;
        float slope = grad_log_prob;
        if (gradients.grad_entropy) slope += grad_entropy * (log_p + entropy);
        gradient.values[n] = from_float<T>((i + n == label ? grad_log_prob : 0.0f) - expf(log_p) * slope);
      }
      *reinterpret_cast<Vector<T, N>*>(out + i) = gradient;
    }
  }
}

constexpr int kWide = kVectorBytes / sizeof(float);

bool wide(const LogitRows& logits) {
  constexpr int64_t size = sizeof(float);
  return all_aligned(kVectorBytes, {logits.logits}, {logits.vocabulary * size, logits.stride * size});
}

}  // namespace

void launch_logit_statistics(const LogitRows& logits, float* statistics, cudaStream_t stream) {
  if (logits.rows == 0) return;
  if (wide(logits)) {
    statistics_kernel<kWide><<<blocks_for(logits.rows), kThreads, 0, stream>>>(logits, statistics);
  } else {
    statistics_kernel<1><<<blocks_for(logits.rows), kThreads, 0, stream>>>(logits, statistics);
  }
  check_launch("logit_statistics");
}

void launch_logit_gradient(Dtype dtype, const LogitRows& logits, const LogitGradients& gradients, cudaStream_t stream) {
  if (logits.rows == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    if (wide(logits)) {
      gradient_kernel<T, kWide><<<blocks_for(logits.rows), kThreads, 0, stream>>>(logits, gradients);
    } else {
      gradient_kernel<T, 1><<<blocks_for(logits.rows), kThreads, 0, stream>>>(logits, gradients);
    }
  });
  check_launch("logit_gradient");
}

}  // namespace bicc
