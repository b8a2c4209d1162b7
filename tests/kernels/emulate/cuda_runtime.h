// A test double of CUDA for csrc/cuda: runs a kernel on the host. The threads of a block are fibers of one host
// thread that switch at every synchronisation; blocks run one after another.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// one block runs at a time, so a static variable is shared by exactly its threads
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace emulate {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

// All threads of the group that have not ended must arrive before any goes on.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;

  void release_if_complete() {
    if (expected > 0 && arrived == expected) arrived = 0, ++generation;
  }
};

// A fiber runs its thread of every block: made once by makecontext, then left and entered by _longjmp, which, unlike
// swapcontext, needs no system call.
struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool started = false, ended = true;
  const Barrier* awaited = nullptr;
  unsigned generation = 0;  // that the barrier had at the arrival

  bool is_waiting() const { return awaited != nullptr && awaited->generation == generation; }
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::vector<uint64_t> exchange;  // by thread: what it offers to a shuffle
inline unsigned progress = 0;           // changes whenever a fiber passes a barrier or ends

inline void leave(unsigned self) {
  if (_setjmp(fibers[self].place) == 0) _longjmp(scheduler, 1);
}

inline void wait_at(Barrier& barrier) {
  const unsigned self = threadIdx.x;
  fibers[self].awaited = &barrier;
  fibers[self].generation = barrier.generation;
  ++barrier.arrived;
  barrier.release_if_complete();
  if (fibers[self].is_waiting()) leave(self);
  fibers[self].awaited = nullptr;
  ++progress;
}

inline void run_fiber() {
  while (true) {
    body();
    const unsigned self = threadIdx.x;
    fibers[self].ended = true;
    ++progress;
    for (Barrier* barrier : {&block_barrier, &warp_barriers[self / kWarp]}) {
      --barrier->expected;
      barrier->release_if_complete();
    }
    leave(self);
  }
}

inline void enter(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.data();
  fiber.start.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

inline void run_block(unsigned threads) {
  block_barrier = {threads};
  warp_barriers.assign((threads + kWarp - 1) / kWarp, {});
  for (unsigned t = 0; t < threads; ++t) {
    ++warp_barriers[t / kWarp].expected;
    fibers[t].ended = false;
  }
  for (unsigned running = threads; running > 0;) {
    const unsigned before = progress;
    running = 0;
    for (unsigned turn = 0; turn < threads; ++turn) {
      // Every other block runs its threads from the last: a missing barrier shows in one of the two orders.
      const unsigned t = blockIdx.x % 2 == 0 ? turn : threads - 1 - turn;
      if (fibers[t].ended) continue;
      threadIdx.x = t;
      if (!fibers[t].is_waiting()) enter(fibers[t]);
      running += !fibers[t].ended;
    }
    if (running > 0 && progress == before) {
      fibers.clear();  // they are in the middle of this kernel
      throw std::runtime_error("a barrier that not all threads reach");
    }
  }
}

struct Configuration {
  unsigned blocks, threads;
  size_t shared_bytes;
  cudaStream_t stream;
};

inline void launch(Configuration c, std::function<void()> kernel) {
  if (c.blocks == 0 || c.threads == 0 || c.threads > 1024) throw std::runtime_error("invalid launch configuration");
  if (c.shared_bytes > 0) throw std::runtime_error("dynamic shared memory is not emulated");
  body = std::move(kernel);
  gridDim.x = c.blocks, blockDim.x = c.threads;
  if (fibers.size() < c.threads) fibers.resize(c.threads);
  exchange.assign(c.threads, 0);
  for (blockIdx.x = 0; blockIdx.x < c.blocks; ++blockIdx.x) run_block(c.threads);
}

template <class T>
T shuffle(T value, unsigned source_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned self = threadIdx.x, first = self - self % kWarp;
  std::memcpy(&exchange[self], &value, sizeof(T));
  wait_at(warp_barriers[self / kWarp]);
  T result = value;
  if (source_lane < kWarp && first + source_lane < blockDim.x) {
    std::memcpy(&result, &exchange[first + source_lane], sizeof(T));
  }
  wait_at(warp_barriers[self / kWarp]);
  return result;
}

}  // namespace emulate

inline void __syncthreads() { emulate::wait_at(emulate::block_barrier); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulate::wait_at(emulate::warp_barriers[threadIdx.x / emulate::kWarp]); }
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  return emulate::shuffle(value, threadIdx.x % emulate::kWarp + delta);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask) {
  return emulate::shuffle(value, (threadIdx.x % emulate::kWarp) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned lane) {
  return emulate::shuffle(value, lane);
}

// kernel<<<blocks, threads, shared bytes, stream>>>(arguments), as tests/support/emulated_kernels.py rewrites it
#define EMULATED_BRACES(...) {__VA_ARGS__}
#define EMULATED_LAUNCH(configuration, kernel, ...) \
  emulate::launch(EMULATED_BRACES configuration, [&] { (kernel)(__VA_ARGS__); })
