// permute and unpermute on CUDA. No torch header is needed here: library.cpp hands over raw memory and a stream.
//
// The data path has no atomics and reads each token (permute) and each row (unpermute) once, in the widest accesses,
// up to 16 bytes, that the pointers, strides and row lengths allow. Each sum is a loop of one thread in the order of
// k, or a reduction over a warp in fixed order: the result has the same bits in every run.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>

#include "bf16.h"
#include "permute.h"

// A launch and dynamic shared memory, spelt so that a plain C++ compiler can stand in for nvcc in the tests.
#ifndef MOE_DIST_LAUNCH
#define MOE_DIST_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define MOE_DIST_SHARED(type, name) extern __shared__ type name[]
#endif

namespace moe_dist {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kBlock = 256;
constexpr int kWarpsPerBlock = kBlock / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Row map: a stable counting sort. The slots are cut into chunks, one warp each. ------------------------------

constexpr int64_t kMinChunk = 256;
constexpr int64_t kMaxChunks = 1024;

int64_t chunk_length(int64_t slots) {
  const int64_t even = (slots + kMaxChunks - 1) / kMaxChunks;
  return std::max(kMinChunk, (even + kWarp - 1) / kWarp * kWarp);
}

int64_t chunk_count(int64_t slots) {
  return (slots + chunk_length(slots) - 1) / chunk_length(slots);
}

// Warps in a block of the counting kernels: each has E counters in the 48 KiB of shared memory.
int counting_warps(int64_t num_experts) {
  return static_cast<int>(std::clamp<int64_t>(12288 / num_experts, 1, kWarpsPerBlock));
}

__device__ inline int64_t id_at(const Ids& ids, int64_t slot) {
  return ids.wide ? static_cast<const int64_t*>(ids.data)[slot] : static_cast<const int32_t*>(ids.data)[slot];
}

// Walks a chunk in order, 32 slots at a time. visit(slot, id, row_in_expert): the lanes of one expert get consecutive
// numbers from that expert's counter, in lane order. A dropped slot (or a wrong id) is visited with -1.
template <class Visit>
__device__ inline void count_through(const Ids& ids, int64_t num_experts, int64_t begin, int64_t end, int* counter,
                                     const Visit& visit) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t base = begin; base < end; base += kWarp) {
    const int64_t slot = base + lane;
    const int64_t id = slot < end ? id_at(ids, slot) : -1;
    const bool valid = id >= 0 && id < num_experts;
    const unsigned same = __match_any_sync(kAllLanes, valid ? static_cast<int>(id) : -1);
    const int before = __popc(same & ((1u << lane) - 1u));
    const int first = valid ? counter[id] : 0;
    __syncwarp();
    if (valid && before == 0) counter[id] = first + __popc(same);
    __syncwarp();
    if (slot < end) visit(slot, id, valid ? first + before : -1);
  }
}

// histogram[e * chunks + chunk] = slots of expert e in the chunk.
__global__ void count_kernel(Ids ids, int64_t num_experts, int64_t length, int64_t chunks, int32_t* histogram,
                             int64_t* status) {
  MOE_DIST_SHARED(int, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (chunk >= chunks) return;  // a whole warp at once
  int* counter = shared + warp * num_experts;
  for (int64_t e = lane; e < num_experts; e += kWarp) counter[e] = 0;
  __syncwarp();
  const int64_t begin = chunk * length;
  const int64_t end = begin + length < ids.slots ? begin + length : ids.slots;
  count_through(ids, num_experts, begin, end, counter, [&](int64_t, int64_t id, int) {
    if (id >= num_experts) status[1] = id;  // whichever thread is last: any wrong id is worth naming
  });
  for (int64_t e = lane; e < num_experts; e += kWarp) histogram[e * chunks + chunk] = counter[e];
}

// One warp an expert: its counts become, in place, the slots of that expert in earlier chunks.
__global__ void scan_kernel(int64_t num_experts, int64_t chunks, int32_t* histogram, int64_t* counts) {
  const int lane = threadIdx.x % kWarp;
  const int64_t e = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (e >= num_experts) return;
  int32_t total = 0;
  for (int64_t base = 0; base < chunks; base += kWarp) {
    const int64_t chunk = base + lane;
    const int32_t count = chunk < chunks ? histogram[e * chunks + chunk] : 0;
    int32_t upto = count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += other;
    }
    if (chunk < chunks) histogram[e * chunks + chunk] = total + upto - count;
    total += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
  if (lane == 0) counts[e] = total;
}

__global__ void place_kernel(Ids ids, int64_t num_experts, int64_t expected, int64_t length, int64_t chunks,
                             const int32_t* histogram, RowMap out) {
  MOE_DIST_SHARED(int, shared);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (chunk >= chunks) return;
  int* next = shared + warp * num_experts;
  int total = 0;  // of the experts before e: a few hundred sums, done again by each warp rather than by one more launch
  for (int64_t base = 0; base < num_experts; base += kWarp) {
    const int64_t e = base + lane;
    const int count = e < num_experts ? static_cast<int>(out.counts[e]) : 0;
    int upto = count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += other;
    }
    if (e < num_experts) next[e] = total + upto - count + histogram[e * chunks + chunk];
    total += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
  __syncwarp();
  if (chunk == 0 && lane == 0) {
    out.status[0] = total;
    if (expected >= 0 && (out.status[1] >= 0 || total != expected)) {
      printf("moe_dist: %d of the expert ids are in [0, %d), %d were promised\n", total, static_cast<int>(num_experts),
             static_cast<int>(expected));
      __trap();
    }
  }
  const int64_t begin = chunk * length;
  const int64_t end = begin + length < ids.slots ? begin + length : ids.slots;
  count_through(ids, num_experts, begin, end, next, [&](int64_t slot, int64_t, int row) {
    out.row_of_slot[slot] = row;
    if (row >= 0) out.slot_of_row[row] = static_cast<int32_t>(slot);
  });
}

__global__ void empty_status_kernel(int64_t num_experts, RowMap out) {
  for (int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) out.counts[e] = 0;
  if (threadIdx.x == 0) {
    out.status[0] = 0;
    out.status[1] = -1;
  }
}

// ---- Data movement ------------------------------------------------------------------------------------------------

// Bytes as one access. aligned: the compiler then makes one load or store of it.
template <int kBytes>
struct alignas(kBytes) Pack {
  unsigned char byte[kBytes];
};

template <int kBytes, class T>
__device__ inline T element(const Pack<kBytes>& pack, int i) {
  T out;
  memcpy(&out, pack.byte + i * sizeof(T), sizeof(T));
  return out;
}

template <int kBytes, class T>
__device__ inline void set_element(Pack<kBytes>* pack, int i, float value) {
  T narrow;
  from_float(value, &narrow);
  memcpy(pack->byte + i * sizeof(T), &narrow, sizeof(T));
}

template <int kBytes>
__device__ inline Pack<kBytes>* packs_of(Matrix matrix, int64_t row) {
  return reinterpret_cast<Pack<kBytes>*>(matrix.data + row * matrix.stride);
}

constexpr int kAhead = 4;  // slots whose loads are all issued before the first of them is used

// A group of blockDim.x threads takes a token, blockDim.y tokens a block.
template <int kBytes>
__global__ void permute_kernel(Slots slots, Matrix x, Matrix rows, int64_t packs) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < slots.tokens; t += stride) {
    const Pack<kBytes>* source = packs_of<kBytes>(x, t);
    const int32_t* row_of = slots.row_of_slot + t * slots.top_k;
    for (int64_t c = threadIdx.x; c < packs; c += blockDim.x) {
      const Pack<kBytes> value = source[c];
      for (int64_t k0 = 0; k0 < slots.top_k; k0 += kAhead) {
        int64_t row[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) row[j] = k0 + j < slots.top_k ? row_of[k0 + j] : -1;
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (row[j] >= 0) packs_of<kBytes>(rows, row[j])[c] = value;
        }
      }
    }
  }
}

template <int kBytes, class T>
__global__ void unpermute_kernel(Slots slots, Matrix rows, const float* probs, Matrix y, int64_t packs) {
  constexpr int kElements = kBytes / sizeof(T);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < slots.tokens; t += stride) {
    const int64_t first = t * slots.top_k;
    for (int64_t c = threadIdx.x; c < packs; c += blockDim.x) {
      float sum[kElements] = {};
      for (int64_t k0 = 0; k0 < slots.top_k; k0 += kAhead) {
        Pack<kBytes> value[kAhead];
        float factor[kAhead];
        bool kept[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const int64_t k = k0 + j;
          const int64_t row = k < slots.top_k ? slots.row_of_slot[first + k] : -1;
          kept[j] = row >= 0;
          if (kept[j]) {
            value[j] = packs_of<kBytes>(rows, row)[c];
            factor[j] = probs ? probs[first + k] : 1.0f;
          }
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (!kept[j]) continue;
#pragma unroll
          for (int i = 0; i < kElements; ++i) sum[i] += factor[j] * to_float(element<kBytes, T>(value[j], i));
        }
      }
      Pack<kBytes> out;
#pragma unroll
      for (int i = 0; i < kElements; ++i) set_element<kBytes, T>(&out, i, sum[i]);
      packs_of<kBytes>(y, t)[c] = out;
    }
  }
}

// One warp a token, so that the dot products need no shared memory. kDots of them are summed at once; dy is read
// again (from cache) only where K is larger.
template <int kBytes, class T, bool kDot>
__global__ void unpermute_backward_kernel(Slots slots, Matrix dy, const float* probs, Matrix rows, Matrix drows,
                                          float* dprobs, int64_t packs) {
  constexpr int kElements = kBytes / sizeof(T);
  constexpr int kDots = 8;
  const int lane = threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < slots.tokens; t += stride) {
    const Pack<kBytes>* dy_row = packs_of<kBytes>(dy, t);
    for (int64_t k0 = 0; k0 < slots.top_k; k0 += kDots) {
      int64_t row[kDots];
      float factor[kDots], dot[kDots];
#pragma unroll
      for (int j = 0; j < kDots; ++j) {
        const int64_t k = k0 + j, slot = t * slots.top_k + k;
        row[j] = k < slots.top_k ? slots.row_of_slot[slot] : -1;
        factor[j] = probs && k < slots.top_k ? probs[slot] : 1.0f;
        dot[j] = 0.0f;
      }
      for (int64_t c = lane; c < packs; c += kWarp) {
        const Pack<kBytes> value = dy_row[c];
        Pack<kBytes> other[kDots];  // all loads before the first store, which the compiler cannot move them past
        if constexpr (kDot) {
#pragma unroll
          for (int j = 0; j < kDots; ++j) {
            if (row[j] >= 0) other[j] = packs_of<kBytes>(rows, row[j])[c];
          }
        }
#pragma unroll
        for (int j = 0; j < kDots; ++j) {
          if (row[j] < 0) continue;
          Pack<kBytes> out;
#pragma unroll
          for (int i = 0; i < kElements; ++i) {
            const float v = to_float(element<kBytes, T>(value, i));
            if constexpr (kDot) dot[j] += v * to_float(element<kBytes, T>(other[j], i));
            set_element<kBytes, T>(&out, i, factor[j] * v);
          }
          packs_of<kBytes>(drows, row[j])[c] = out;
        }
      }
      if constexpr (kDot) {
#pragma unroll
        for (int j = 0; j < kDots; ++j) {
          float sum = dot[j];
          for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
          if (lane == 0 && k0 + j < slots.top_k) dprobs[t * slots.top_k + k0 + j] = sum;
        }
      }
    }
  }
}

// ---- Launches -----------------------------------------------------------------------------------------------------

// The widest access, in bytes, that `bits` (addresses, strides and lengths, or-ed together) are multiples of.
int access_bytes(uint64_t bits) {
  for (int width : {16, 8, 4}) {
    if (bits % width == 0) return width;
  }
  return 2;
}

uint64_t bits_of(Matrix matrix) {
  return reinterpret_cast<uintptr_t>(matrix.data) | static_cast<uint64_t>(matrix.stride);
}

dim3 block_for(int64_t packs) {
  int threads = kWarp;
  while (threads < kBlock && threads < packs) threads *= 2;
  return dim3(threads, kBlock / threads);
}

unsigned grid_for(int64_t tokens, dim3 block) {
  return static_cast<unsigned>(std::min<int64_t>((tokens + block.y - 1) / block.y, int64_t{1} << 30));
}

const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int kBytes>
struct Width {
  static constexpr int value = kBytes;
};

// Calls body with the access width as a compile-time number; an access holds at least one element of T.
template <class T, class F>
void with_width(int width, const F& body) {
  if (width == 16) {
    body(Width<16>{});
  } else if (width == 8) {
    body(Width<8>{});
  } else if (width == 4 || sizeof(T) == 4) {
    body(Width<4>{});
  } else {
    body(Width<sizeof(T)>{});
  }
}

template <class F>
void with_dtype(Dtype dtype, const F& body) {
  return dtype == Dtype::f32 ? body(float{}) : body(bf16{});
}

}  // namespace

int64_t row_map_scratch(int64_t slots, int64_t num_experts) {
  return chunk_count(slots) * num_experts;
}

const char* row_map(
    const Ids& ids, int64_t num_experts, int64_t expected, const RowMap& out, int32_t* scratch, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t chunks = chunk_count(ids.slots), length = chunk_length(ids.slots);
  MOE_DIST_LAUNCH(empty_status_kernel, 1, kBlock, 0, stream, num_experts, out);
  if (ids.slots == 0) return launched();
  const int warps = counting_warps(num_experts);
  const unsigned blocks = static_cast<unsigned>((chunks + warps - 1) / warps);
  const unsigned expert_blocks = static_cast<unsigned>((num_experts + kWarpsPerBlock - 1) / kWarpsPerBlock);
  const size_t shared = warps * num_experts * sizeof(int);
  MOE_DIST_LAUNCH(
      count_kernel, blocks, warps * kWarp, shared, stream, ids, num_experts, length, chunks, scratch, out.status);
  MOE_DIST_LAUNCH(scan_kernel, expert_blocks, kBlock, 0, stream, num_experts, chunks, scratch, out.counts);
  MOE_DIST_LAUNCH(
      place_kernel, blocks, warps * kWarp, shared, stream, ids, num_experts, expected, length, chunks, scratch, out);
  return launched();
}

const char* permute(const Slots& slots, Matrix x, Matrix rows, int64_t row_bytes, void* stream_handle) {
  if (slots.tokens * slots.top_k * row_bytes == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  with_width<uint16_t>(access_bytes(bits_of(x) | bits_of(rows) | row_bytes), [&](auto width) {
    constexpr int kBytes = decltype(width)::value;
    const int64_t packs = row_bytes / kBytes;
    const dim3 block = block_for(packs);
    MOE_DIST_LAUNCH(permute_kernel<kBytes>, grid_for(slots.tokens, block), block, 0, stream, slots, x, rows, packs);
  });
  return launched();
}

const char* unpermute(
    const Slots& slots, Dtype dtype, int64_t hidden, Matrix rows, const float* probs, Matrix y, void* stream_handle) {
  if (slots.tokens * hidden == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t row_bytes = hidden * sizeof(T);
    with_width<T>(access_bytes(bits_of(rows) | bits_of(y) | row_bytes), [&](auto width) {
      constexpr int kBytes = decltype(width)::value;
      const int64_t packs = row_bytes / kBytes;
      const dim3 block = block_for(packs);
      const auto kernel = unpermute_kernel<kBytes, T>;
      MOE_DIST_LAUNCH(kernel, grid_for(slots.tokens, block), block, 0, stream, slots, rows, probs, y, packs);
    });
  });
  return launched();
}

const char* unpermute_backward(
    const Slots& slots, Dtype dtype, int64_t hidden, Matrix dy, const float* probs, Matrix rows, Matrix drows,
    float* dprobs, void* stream_handle) {
  if (slots.tokens * slots.top_k == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t row_bytes = hidden * sizeof(T);
    const uint64_t bits = bits_of(dy) | bits_of(drows) | (dprobs ? bits_of(rows) : 0) | row_bytes;
    with_width<T>(access_bytes(bits), [&](auto width) {
      constexpr int kBytes = decltype(width)::value;
      const auto kernel = dprobs ? unpermute_backward_kernel<kBytes, T, true> : unpermute_backward_kernel<kBytes, T, false>;
      const dim3 block(kWarp, kWarpsPerBlock);
      MOE_DIST_LAUNCH(kernel, grid_for(slots.tokens, block), block, 0, stream, slots, dy, probs, rows, drows, dprobs,
                      row_bytes / kBytes);
    });
  });
  return launched();
}

}  // namespace cuda
}  // namespace moe_dist
