// Stands in for CUDA's header, so that a plain C++ compiler compiles the kernels and runs them on the CPU.
//
// A block's threads are fibers on one CPU thread. A fiber runs until it waits for its warp or its block, or ends; it
// goes on when every living fiber of the warp, or of the block, waits too. Between two such waits threads and warps run
// one after the other, in order or in reverse (`set_reverse`): what depends on that order lacks a barrier.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };

namespace fibers {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 128 << 10;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread;
  bool done = false, at_barrier = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> block;
inline std::vector<uint32_t> exchange;  // one word a thread, for the intrinsics
inline std::vector<int64_t> shared;
inline std::function<void()> body;
inline unsigned current = 0;
inline bool trapped = false;
inline bool reverse = false;

inline void wait_for_warp() {
  swapcontext(&block[current].context, &scheduler);
}

inline void wait_for_block() {
  block[current].at_barrier = true;
  swapcontext(&block[current].context, &scheduler);
}

inline void finish() {
  block[current].done = true;
  swapcontext(&block[current].context, &scheduler);
}

inline void enter() {
  body();
  finish();
}

// Runs the warp's fibers until each has ended or waits for the block.
inline void run_warp(unsigned first) {
  const unsigned size = std::min<size_t>(kWarp, block.size() - first);
  for (bool alive = true; alive;) {
    alive = false;
    for (unsigned i = 0; i < size; ++i) {
      current = first + (reverse ? size - 1 - i : i);
      if (block[current].done || block[current].at_barrier) continue;
      alive = true;
      threadIdx = block[current].thread;
      swapcontext(&scheduler, &block[current].context);
    }
  }
}

inline void run_block() {
  block.clear();
  block.resize(blockDim.x * blockDim.y);
  exchange.assign(block.size(), 0);
  for (unsigned i = 0; i < block.size(); ++i) {
    Fiber& fiber = block[i];
    fiber.thread = dim3(i % blockDim.x, i / blockDim.x);
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool alive = true; alive;) {
    const unsigned warps = (block.size() + kWarp - 1) / kWarp;
    for (unsigned w = 0; w < warps; ++w) run_warp((reverse ? warps - 1 - w : w) * kWarp);
    alive = false;
    for (Fiber& fiber : block) {
      alive |= fiber.at_barrier;
      fiber.at_barrier = false;
    }
  }
}

inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = grid;
  blockDim = threads;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(reverse ? grid.x - 1 - b : b);
    shared.assign(shared_bytes / sizeof(int64_t) + 1, -1);  // not zero: a kernel has to clear what it counts in
    run_block();
  }
}

inline unsigned lane() {
  return current % kWarp;
}

inline uint32_t* warp_words() {
  return exchange.data() + current / kWarp * kWarp;
}

template <class T>
T swap_words(T value, unsigned from) {
  static_assert(sizeof(T) == 4, "32-bit values only");
  memcpy(warp_words() + lane(), &value, 4);
  wait_for_warp();
  T out;
  memcpy(&out, warp_words() + from, 4);
  wait_for_warp();
  return out;
}

}  // namespace fibers

inline void __syncwarp() {
  fibers::wait_for_warp();
}

inline void __syncthreads() {
  fibers::wait_for_block();
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return fibers::swap_words(value, from);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fibers::swap_words(value, fibers::lane() ^ mask);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int step) {
  const int lane = fibers::lane();
  return fibers::swap_words(value, lane >= step ? lane - step : lane);
}

inline unsigned __match_any_sync(unsigned, int value) {
  fibers::warp_words()[fibers::lane()] = static_cast<uint32_t>(value);
  fibers::wait_for_warp();
  unsigned same = 0;
  for (unsigned i = 0; i < fibers::kWarp; ++i) {
    if (fibers::warp_words()[i] == static_cast<uint32_t>(value)) same |= 1u << i;
  }
  fibers::wait_for_warp();
  return same;
}

template <class T>
T __ldcs(const T* address) {
  return *address;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = std::max(before, value);
  return before;
}

inline float __expf(float x) {
  return expf(x);
}

inline float __fdividef(float x, float y) {
  return x / y;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline void __trap() {
  fibers::trapped = true;
  fibers::finish();
}

inline cudaError_t cudaGetLastError() {
  const bool failed = fibers::trapped;
  fibers::trapped = false;
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t) {
  return "the device stopped";
}

#define MOE_DIST_LAUNCH(kernel, grid, block, shared, stream, ...) \
  fibers::launch(dim3(grid), dim3(block), shared, [&] { kernel(__VA_ARGS__); })
#define MOE_DIST_SHARED(type, name) type* name = reinterpret_cast<type*>(fibers::shared.data())
