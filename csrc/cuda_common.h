// What the CUDA files share: launches, accesses of up to 16 bytes, and how a matrix is laid over threads.
// No torch header is needed here: library.cpp hands over raw memory and a stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bf16.h"
#include "permute.h"

// A launch and dynamic shared memory, spelt so that a plain C++ compiler can stand in for nvcc in the tests.
#ifndef MOE_DIST_LAUNCH
#define MOE_DIST_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define MOE_DIST_SHARED(type, name) extern __shared__ type name[]
#endif

namespace moe_dist {
namespace cuda {

constexpr int kWarp = 32;
constexpr int kBlock = 256;
constexpr unsigned kAllLanes = 0xffffffffu;

// Makes the pad rows zero, where there may be any (pad_rows_cuda.cu).
void zero_pad_rows(const Slots& slots, Matrix rows, int64_t row_bytes, cudaStream_t stream);

inline const char* launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// ---- A pack: kCount elements next to each other in a row, read or written by one thread in one access -------------

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};

template <class T, int kCount>
struct Pack {
  using Word = typename WordOf<kCount * sizeof(T)>::type;
  Word word;
};

template <class P>
__device__ inline typename P::Word* word_at(Matrix matrix, int64_t row, int64_t pack) {
  return reinterpret_cast<typename P::Word*>(matrix.data + row * matrix.stride) + pack;
}

template <class P>
__device__ inline P load(Matrix matrix, int64_t row, int64_t pack) {
  return {*word_at<P>(matrix, row, pack)};
}

// For what nothing reads again soon: it leaves the caches before what other kernels are about to read.
template <class P>
__device__ inline P load_once(Matrix matrix, int64_t row, int64_t pack) {
  return {__ldcs(word_at<P>(matrix, row, pack))};
}

template <class P>
__device__ inline void store(Matrix matrix, int64_t row, int64_t pack, const P& value) {
  *word_at<P>(matrix, row, pack) = value.word;
}

// ---- Elements to fp32 and back; two bf16 at a time, as the hardware rounds them -----------------------------------

__device__ inline uint32_t rounded_pair(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  bf16 pair[2];
  from_float(low, &pair[0]);
  from_float(high, &pair[1]);
  uint32_t out;
  memcpy(&out, pair, sizeof out);
  return out;
#endif
}

template <class T, int kCount>
__device__ inline void to_floats(const Pack<T, kCount>& pack, float (&out)[kCount]) {
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    uint32_t pair[kCount / 2];
    memcpy(pair, &pack, sizeof pair);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const uint32_t low = pair[i] << 16, high = pair[i] & 0xffff0000u;
      memcpy(&out[2 * i], &low, sizeof low);
      memcpy(&out[2 * i + 1], &high, sizeof high);
    }
  } else {
    T value[kCount];
    memcpy(value, &pack, sizeof value);
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = to_float(value[i]);
  }
}

template <class T, int kCount>
__device__ inline Pack<T, kCount> from_floats(const float (&in)[kCount]) {
  Pack<T, kCount> out;
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    uint32_t pair[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) pair[i] = rounded_pair(in[2 * i], in[2 * i + 1]);
    memcpy(&out, pair, sizeof pair);
  } else {
    T value[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) from_float(in[i], &value[i]);
    memcpy(&out, value, sizeof value);
  }
  return out;
}

template <class To, class From, int kCount>
__device__ inline Pack<To, kCount> cast(const Pack<From, kCount>& pack) {
  if constexpr (std::is_same_v<From, To>) {
    return pack;
  } else {
    float value[kCount];
    to_floats(pack, value);
    return from_floats<To>(value);
  }
}

// ---- How a matrix is laid over threads -----------------------------------------------------------------------------

// blockDim.x threads take the packs of a row and blockDim.y rows share a block. A row of more than kBlock packs goes
// to several blocks, next to each other so that it is in the same memory pages at the same time, or, where one block has
// to see all of it, to one whose threads take several packs each.
struct Layout {
  unsigned grid;
  dim3 block;
};

inline Layout layout_for(int64_t rows, int64_t packs, bool whole_rows = false) {
  const int64_t pieces = (packs + kBlock - 1) / kBlock;
  const int64_t even = (packs + pieces - 1) / pieces;
  int along = 1;
  while (along < kWarp && along < even) along *= 2;
  if (even > kWarp) along = static_cast<int>((even + kWarp - 1) / kWarp * kWarp);
  const int together = kBlock / along;
  const int64_t blocks = (rows + together - 1) / together, sharing = whole_rows ? 1 : (packs + along - 1) / along;
  const int64_t most = std::max<int64_t>(1, (int64_t{1} << 30) / sharing);
  return {static_cast<unsigned>(std::min(blocks, most) * sharing), dim3(along, together)};
}

// Calls visit(row, pack) for this thread's pack of each of its rows, in a layout without whole rows.
template <class Visit>
__device__ inline void for_each_pack(int64_t rows, int64_t packs, const Visit& visit) {
  const unsigned sharing = static_cast<unsigned>((packs + blockDim.x - 1) / blockDim.x);
  const int64_t pack = static_cast<int64_t>(blockIdx.x % sharing) * blockDim.x + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x / sharing) * blockDim.y;
  if (pack >= packs) return;
  for (int64_t row = static_cast<int64_t>(blockIdx.x / sharing) * blockDim.y + threadIdx.y; row < rows; row += stride) {
    visit(row, pack);
  }
}

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// Calls body with a value of the type that the dtype stands for.
template <class F>
void with_dtype(Dtype dtype, const F& body) {
  return dtype == Dtype::f32 ? body(float{}) : body(bf16{});
}

// Calls body with one for each of two dtypes.
template <class F>
void with_dtypes(Dtype from, Dtype to, const F& body) {
  with_dtype(from, [&](auto source) { with_dtype(to, [&](auto target) { body(source, target); }); });
}

// The larger of two element types: what limits how many elements a pack holds.
template <class A, class B>
using Wider = std::conditional_t<(sizeof(A) > sizeof(B)), A, B>;

// The largest access, a power of two up to 16 bytes, at which this matrix can be read or written.
inline int access_bytes(Matrix matrix) {
  const uint64_t bits = reinterpret_cast<uintptr_t>(matrix.data) | static_cast<uint64_t>(matrix.stride);
  return static_cast<int>(std::min<uint64_t>(16, bits ? bits & -bits : 16));
}

template <class T>
int pack_elements(Matrix matrix) {
  return access_bytes(matrix) / static_cast<int>(sizeof(T));
}

// Calls body with the elements of a pack as a compile-time number: a divisor of `columns`, at most `limit`, and no more
// than 16 bytes of T hold.
template <class T, class F>
void with_pack(int limit, int64_t columns, const F& body) {
  if constexpr (sizeof(T) == 2) {
    if (limit >= 8 && columns % 8 == 0) return body(Number<8>{});
  }
  if (limit >= 4 && columns % 4 == 0) return body(Number<4>{});
  if (limit >= 2 && columns % 2 == 0) return body(Number<2>{});
  body(Number<1>{});
}

}  // namespace cuda
}  // namespace moe_dist
