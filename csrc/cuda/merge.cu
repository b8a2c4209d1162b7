#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "merge.h"
#include "merge_math.h"

namespace bicc {
namespace {

constexpr int kVector = 4;  // elements that a lane loads at once

template <class T>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ float from_float(float x) { return x; }
template <>
__device__ __half from_float(float x) { return __float2half_rn(x); }
template <>
__device__ __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

// Warp number over the whole grid; each warp owns one (row, head) at a time.
__device__ int64_t global_warp() { return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; }
__device__ int64_t warps() { return int64_t{gridDim.x} * blockDim.x / kWarp; }

template <class T>
__global__ void merge_kernel(AttentionShape shape, T* out, float* lse, int64_t lse_stride, const T* other,
                             const float* lse_other, int64_t lse_other_stride) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t item = global_warp(); item < shape.rows * shape.heads; item += warps()) {
    const int64_t row = item / shape.heads, head = item % shape.heads;
    float* own_lse = lse + head * lse_stride + row;
    const Shares shares = merge_shares(*own_lse, lse_other[head * lse_other_stride + row]);
    // All lanes have read the old value before one of them writes the new.
    __syncwarp();
    if (lane == 0) *own_lse = shares.lse;
    auto* to = reinterpret_cast<Vector<T>*>(out + item * shape.dim);
    const auto* from = reinterpret_cast<const Vector<T>*>(other + item * shape.dim);
    for (int64_t i = lane; i < shape.dim / kVector; i += kWarp) {
      Vector<T> mine = to[i];
      const Vector<T> theirs = from[i];
      for (int v = 0; v < kVector; ++v) {
        mine.values[v] = from_float<T>(shares.own * to_float(mine.values[v]) + shares.other * to_float(theirs.values[v]));
      }
      to[i] = mine;
    }
  }
}

template <class T>
__global__ void pre_backward_kernel(AttentionShape shape, const T* out, const T* grad, float* delta) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t item = global_warp(); item < shape.rows * shape.heads; item += warps()) {
    const auto* a = reinterpret_cast<const Vector<T>*>(out + item * shape.dim);
    const auto* b = reinterpret_cast<const Vector<T>*>(grad + item * shape.dim);
    float sum = 0.0f;
    for (int64_t i = lane; i < shape.dim / kVector; i += kWarp) {
      const Vector<T> x = a[i], y = b[i];
      for (int v = 0; v < kVector; ++v) sum += to_float(x.values[v]) * to_float(y.values[v]);
    }
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if (lane == 0) delta[item % shape.heads * shape.rows + item / shape.heads] = sum;
  }
}

// Calls launch(T*) with the element type's null pointer; nothing for an empty shape.
template <class Launch>
void dispatch(Dtype dtype, const AttentionShape& shape, const char* kernel, const Launch& launch) {
  if (shape.rows < 0 || shape.heads < 0 || shape.dim < 0 || shape.dim % kVector != 0) {
    throw std::invalid_argument(std::string(kernel) + ": sizes must not be negative, the head dimension a multiple of 4");
  }
  if (shape.rows * shape.heads == 0) return;
  const unsigned blocks = blocks_for((shape.rows * shape.heads * kWarp + kThreads - 1) / kThreads);
  switch (dtype) {
    case Dtype::kFloat32:
      launch(blocks, static_cast<float*>(nullptr));
      break;
    case Dtype::kFloat16:
      launch(blocks, static_cast<__half*>(nullptr));
      break;
    case Dtype::kBfloat16:
      launch(blocks, static_cast<__nv_bfloat16*>(nullptr));
      break;
  }
  check_launch(kernel);
}

}  // namespace

void launch_merge(Dtype dtype, AttentionShape shape, void* out, float* lse, int64_t lse_stride, const void* other,
                  const float* lse_other, int64_t lse_other_stride, cudaStream_t stream) {
  dispatch(dtype, shape, "merge", [&](unsigned blocks, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    merge_kernel<<<blocks, kThreads, 0, stream>>>(shape, static_cast<T*>(out), lse, lse_stride,
                                                  static_cast<const T*>(other), lse_other, lse_other_stride);
  });
}

void launch_pre_backward(Dtype dtype, AttentionShape shape, const void* out, const void* grad, float* delta,
                         cudaStream_t stream) {
  dispatch(dtype, shape, "pre_backward", [&](unsigned blocks, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    pre_backward_kernel<<<blocks, kThreads, 0, stream>>>(shape, static_cast<const T*>(out),
                                                         static_cast<const T*>(grad), delta);
  });
}

}  // namespace bicc
