// Elements of the types that tensors come in; kernels compute in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "launch.h"

namespace bicc {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float(float x) { return x; }
template <>
__device__ inline __half from_float(float x) { return __float2half_rn(x); }
template <>
__device__ inline __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }

// N elements that a thread loads or stores at once.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

constexpr int kVectorBytes = 16;  // the widest load of a thread

// Whether every address and every stride, in bytes, is a multiple of `bytes`.
inline bool all_aligned(int64_t bytes, std::initializer_list<const void*> addresses,
                        std::initializer_list<int64_t> strides) {
  const auto aligned = [bytes](auto value) { return (int64_t)value % bytes == 0; };
  return std::all_of(addresses.begin(), addresses.end(), aligned) && std::all_of(strides.begin(), strides.end(), aligned);
}

// Calls launch(T()) with the element type.
template <class Launch>
void with_type(Dtype dtype, const Launch& launch) {
  switch (dtype) {
    case Dtype::kFloat32:
      return launch(float());
    case Dtype::kFloat16:
      return launch(__half());
    case Dtype::kBfloat16:
      return launch(__nv_bfloat16());
  }
}

}  // namespace bicc
