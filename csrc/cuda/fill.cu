#include "fill.h"
#include "launch.h"

namespace bicc {
namespace {

__global__ void fill_kernel(const Copy* copies, int64_t count, FillArrays arrays) {
  for (int64_t c = blockIdx.x; c < count; c += gridDim.x) {
    const Copy copy = copies[c];
    for (int64_t i = threadIdx.x; i < copy.length; i += blockDim.x) copy_token(copy, i, arrays);
  }
}

}  // namespace

void launch_fill(const Copy* copies, int64_t count, const FillArrays& arrays, cudaStream_t stream) {
  if (count == 0) return;
  fill_kernel<<<blocks_for(count), kThreads, 0, stream>>>(copies, count, arrays);
  check_launch("fill");
}

}  // namespace bicc
