// Stands in for CUDA's header, so that a plain C++ compiler compiles the kernels and runs them on the CPU.
//
// A block's threads are fibers on one CPU thread. A fiber runs until it waits for its warp or ends; it goes on when
// every living fiber of its warp waits too. That is what the warp intrinsics promise, and all that the kernels use.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__

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
  bool done = false, waiting = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> block;
inline std::vector<uint32_t> exchange;  // one word a thread, for the intrinsics
inline std::vector<int64_t> shared;
inline std::function<void()> body;
inline unsigned current = 0;
inline bool trapped = false;

inline void wait_for_warp() {
  block[current].waiting = true;
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
  for (unsigned first = 0; first < block.size(); first += kWarp) {  // no kernel waits for another warp
    for (bool alive = true; alive;) {
      alive = false;
      for (current = first; current < first + kWarp && current < block.size(); ++current) {
        if (block[current].done) continue;
        alive = true;
        block[current].waiting = false;
        threadIdx = block[current].thread;
        swapcontext(&scheduler, &block[current].context);
      }
    }
  }
}

inline void launch(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = grid;
  blockDim = threads;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(b);
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
