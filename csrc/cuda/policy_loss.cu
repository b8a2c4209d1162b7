#include "launch.h"
#include "policy_loss.h"

namespace bicc {
namespace {

// Adds up over the block, always in the same order; every thread gets the result.
__device__ double block_sum(double value) {
  __shared__ double shared[kThreads];
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int step = kThreads / 2; step > 0; step /= 2) {
    if (static_cast<int>(threadIdx.x) < step) shared[threadIdx.x] += shared[threadIdx.x + step];
    __syncthreads();
  }
  const double result = shared[0];
  __syncthreads();
  return result;
}

// Index of the first of `count` ascending items that is at least `value`; `count` if none is.
__device__ int64_t first_at_least(const int64_t* items, int64_t count, int64_t value) {
  int64_t low = 0;
  while (low < count) {
    const int64_t middle = low + (count - low) / 2;
    if (items[middle] < value) {
      low = middle + 1;
    } else {
      count = middle;
    }
  }
  return low;
}

template <class T>
__device__ T read_or_zero(const T* values, int64_t i) {
  return values ? values[i] : T{0};
}

template <class T>
__device__ LossRow<T> read_row(const LossArrays<T>& a, int64_t i) {
  return {a.logp[i],
          a.old_logp ? a.old_logp[i] : a.logp[i],
          a.advantage[i],
          a.weight[i],
          read_or_zero(a.regularisation, i),
          read_or_zero(a.ref_logp, i),
          read_or_zero(a.entropy, i)};
}

// Returns the sum over the rows that this thread takes of the response's rows [begin, end).
template <class T>
__device__ double response_loss(const LossSettings<T>& settings, const LossArrays<T>& a, int64_t rows, int64_t begin,
                                int64_t end) {
  const int64_t first = begin + threadIdx.x;
  const double length = static_cast<double>(end - begin);
  const bool averages = uses_mean(settings) && !a.mean;
  T mean = 0;
  if (averages) {
    double sum = 0.0;
    for (int64_t i = first; i < end; i += kThreads) sum += mean_term(settings, read_row(a, i));
    mean = static_cast<T>(block_sum(sum) / length);
  }
  double loss_sum = 0.0, shared_gradient = 0.0;
  for (int64_t i = first; i < end; i += kThreads) {
    const RowLoss<T> loss = row_loss(settings, read_row(a, i), a.mean ? a.mean[i] : mean);
    loss_sum += loss.loss;
    shared_gradient += loss.shared_gradient;
    a.gradient[i] = loss.gradient;
    if (a.mean) a.mean_gradient[i] = loss.shared_gradient;
    a.masks[i] = loss.low;
    a.masks[rows + i] = loss.high;
    a.masks[2 * rows + i] = loss.dual;
  }
  if (averages) {
    const T each = static_cast<T>(block_sum(shared_gradient) / length);
    for (int64_t i = first; i < end; i += kThreads) a.gradient[i] += each * mean_term_slope(settings, read_row(a, i));
  }
  return loss_sum;
}

template <class T>
__global__ void policy_loss_kernel(LossSettings<T> settings, LossArrays<T> arrays, int64_t rows) {
  const int64_t responses = arrays.response[rows - 1] + 1;
  if (blockIdx.x >= responses) {
    if (threadIdx.x == 0) arrays.partials[blockIdx.x] = 0.0;
    return;
  }
  double sum = 0.0;
  for (int64_t r = blockIdx.x; r < responses; r += gridDim.x) {
    const int64_t begin = first_at_least(arrays.response, rows, r);
    sum += response_loss(settings, arrays, rows, begin, first_at_least(arrays.response, rows, r + 1));
  }
  const double total = block_sum(sum);
  if (threadIdx.x == 0) arrays.partials[blockIdx.x] = total;
}

template <class T>
__global__ void add_partials_kernel(const double* partials, int64_t count, T* share) {
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partials[i];
  const double total = block_sum(sum);
  if (threadIdx.x == 0) *share = static_cast<T>(total);
}

}  // namespace

template <class T>
void launch_policy_loss(const LossSettings<T>& settings, const LossArrays<T>& arrays, int64_t rows,
                        cudaStream_t stream) {
  // How many responses have rows, only the device knows; at most as many as there are rows.
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(rows, kLossBlocks));
  if (blocks > 0) {
    policy_loss_kernel<<<blocks, kThreads, 0, stream>>>(settings, arrays, rows);
    check_launch("policy_loss");
  }
  add_partials_kernel<<<1, kThreads, 0, stream>>>(arrays.partials, blocks, arrays.share);
  check_launch("policy_loss");
}

template void launch_policy_loss(const LossSettings<float>&, const LossArrays<float>&, int64_t, cudaStream_t);
template void launch_policy_loss(const LossSettings<double>&, const LossArrays<double>&, int64_t, cudaStream_t);

}  // namespace bicc
