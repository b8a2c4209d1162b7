// What every launcher shares.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace bicc {

// Element types of tensors.
enum class Dtype { kFloat32, kFloat16, kBfloat16 };

constexpr int kThreads = 256;
constexpr int kWarp = 32;

// Blocks for `items`, one a block; kernels stride over the rest.
inline unsigned blocks_for(int64_t items) { return static_cast<unsigned>(std::min<int64_t>(items, 1 << 20)); }

// Of the launch itself; what goes wrong while a kernel runs shows at the caller's next synchronisation.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorString(error));
}

}  // namespace bicc
