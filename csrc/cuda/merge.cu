#include "merge.h"

#include <cmath>

#include "elements.cuh"

namespace bicc {
namespace {

struct Shares {
  float own;
  float other;
  float lse;
};

// Shares of the softmax mass that two parts hold, and the log-sum-exp of both. A part without keys has no share.
__device__ Shares merge_shares(float lse_own, float lse_other) {
  const float largest = fmaxf(lse_own, lse_other);
  if (largest == -INFINITY) return {0.0f, 0.0f, -INFINITY};
  const float own = expf(lse_own - largest);
  const float other = expf(lse_other - largest);
  const float sum = own + other;
  return {own / sum, other / sum, largest + logf(sum)};
}

template <class T, int N>
__device__ Vector<T, N>* vectors(const AttentionPart& part, int64_t row, int64_t head) {
  return reinterpret_cast<Vector<T, N>*>(reinterpret_cast<T*>(part.out) + row * part.out_strides.first +
                                         head * part.out_strides.second);
}

__device__ float* lse_of(const AttentionPart& part, int64_t row, int64_t head) {
  return part.lse + row * part.lse_strides.first + head * part.lse_strides.second;
}

// `lanes` neighbours of a warp share a (row, head), so that small heads leave no lane idle: a power of 2.
template <class T, int N>
__global__ void merge_kernel(AttentionShape shape, AttentionPart part, AttentionPart other, int lanes) {
  const int64_t items = shape.rows * shape.heads;
  const int lane = threadIdx.x % lanes;
  const int64_t step = int64_t{gridDim.x} * blockDim.x / lanes;
  const int64_t within_warp = threadIdx.x % kWarp / lanes;
  // Counted by the warp's first item, so that its lanes leave the loop together.
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / lanes - within_warp;
  for (int64_t item = first + within_warp; item - within_warp < items; item += step) {
    const bool inside = item < items;
    const int64_t row = item / shape.heads, head = item % shape.heads;
    Shares shares{};
    if (inside) shares = merge_shares(*lse_of(part, row, head), *lse_of(other, row, head));
    // All lanes have read the old value before one of them writes the new.
    __syncwarp();
    if (!inside) continue;
    if (lane == 0) *lse_of(part, row, head) = shares.lse;
    Vector<T, N>* to = vectors<T, N>(part, row, head);
    const Vector<T, N>* from = vectors<T, N>(other, row, head);
    for (int64_t i = lane; i < shape.dim / N; i += lanes) {
      Vector<T, N> mine = to[i];
      const Vector<T, N> theirs = from[i];
      for (int n = 0; n < N; ++n) {
        mine.values[n] = from_float<T>(shares.own * to_float(mine.values[n]) + shares.other * to_float(theirs.values[n]));
      }
      to[i] = mine;
    }
  }
}

template <class T, int N>
void run_merge(AttentionShape shape, const AttentionPart& part, const AttentionPart& other, cudaStream_t stream) {
  int lanes = 1;
  while (lanes < kWarp && lanes < shape.dim / N) lanes *= 2;
  const int64_t threads = shape.rows * shape.heads * lanes;
  merge_kernel<T, N><<<blocks_for((threads + kThreads - 1) / kThreads), kThreads, 0, stream>>>(shape, part, other, lanes);
}

constexpr int kSums = 3;

// Block b works on sum b % 3.
template <class T, int N>
__global__ void add_kernel(RowSum q, RowSum k, RowSum v) {
  const unsigned which = blockIdx.x % kSums;
  const RowSum sum = which == 0 ? q : which == 1 ? k : v;
  const int64_t width = sum.width / N, step = int64_t{gridDim.x / kSums} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x / kSums} * blockDim.x + threadIdx.x; i < sum.rows * width; i += step) {
    const int64_t row = i / width, column = i % width;
    auto* to = reinterpret_cast<Vector<T, N>*>(reinterpret_cast<T*>(sum.to) + row * sum.to_stride) + column;
    const auto* from = reinterpret_cast<const Vector<T, N>*>(reinterpret_cast<const T*>(sum.from) + row * sum.from_stride);
    Vector<T, N> total = *to;
    const Vector<T, N> part = from[column];
    for (int n = 0; n < N; ++n) total.values[n] = from_float<T>(to_float(total.values[n]) + to_float(part.values[n]));
    *to = total;
  }
}

template <class T, int N>
void run_add(const RowSum& q, const RowSum& k, const RowSum& v, cudaStream_t stream) {
  const auto vectors = [](const RowSum& sum) { return sum.rows * sum.width / N; };
  const int64_t most = std::max({vectors(q), vectors(k), vectors(v)});
  add_kernel<T, N><<<kSums * blocks_for((most + kThreads - 1) / kThreads), kThreads, 0, stream>>>(q, k, v);
}

}  // namespace

void launch_merge(Dtype dtype, AttentionShape shape, const AttentionPart& part, const AttentionPart& other,
                  cudaStream_t stream) {
  if (shape.rows * shape.heads == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t size = sizeof(T);
    const bool wide = all_aligned(
        kVectorBytes, {reinterpret_cast<void*>(part.out), reinterpret_cast<void*>(other.out)},
        {shape.dim * size, part.out_strides.first * size, part.out_strides.second * size,
         other.out_strides.first * size, other.out_strides.second * size});
    wide ? run_merge<T, kVectorBytes / size>(shape, part, other, stream) : run_merge<T, 1>(shape, part, other, stream);
  });
  check_launch("merge");
}

void launch_add_gradients(Dtype dtype, const RowSum& q, const RowSum& k, const RowSum& v, cudaStream_t stream) {
  if (q.rows * q.width + k.rows * k.width + v.rows * v.width == 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int64_t size = sizeof(T);
    const auto aligned = [](const RowSum& sum) {
      return all_aligned(kVectorBytes, {reinterpret_cast<void*>(sum.to), reinterpret_cast<void*>(sum.from)},
                         {sum.width * size, sum.to_stride * size, sum.from_stride * size});
    };
    const bool wide = aligned(q) && aligned(k) && aligned(v);
    wide ? run_add<T, kVectorBytes / size>(q, k, v, stream) : run_add<T, 1>(q, k, v, stream);
  });
  check_launch("add_gradients");
}

}  // namespace bicc
