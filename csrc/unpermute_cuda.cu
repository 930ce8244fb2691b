// unpermute and its backward on CUDA. No atomics: each sum is a loop of one thread in the order of k, or a reduction
// over a warp in fixed order, so the result has the same bits in every run.
#include "cuda_common.h"

namespace moe_dist {
namespace cuda {
namespace {

constexpr int kWarpsPerBlock = kBlock / kWarp;
constexpr int kAhead = 4;  // rows whose loads are all issued before the first of them is used

// A thread adds up one pack of a token's rows.
template <class From, class To, int kCount>
__global__ void __launch_bounds__(kBlock)
    unpermute_kernel(Slots slots, Matrix rows, const float* probs, Matrix y, int64_t packs) {
  using P = Pack<From, kCount>;
  for_each_pack(slots.tokens, packs, [&](int64_t t, int64_t c) {
    const int64_t first = t * slots.top_k;
    float sum[kCount] = {};
    for (int64_t k0 = 0; k0 < slots.top_k; k0 += kAhead) {
      P value[kAhead];
      float factor[kAhead];
      bool kept[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int64_t k = k0 + j;
        const int64_t row = k < slots.top_k ? slots.row_of_slot[first + k] : -1;
        kept[j] = row >= 0;
        if (kept[j]) {
          value[j] = load_once<P>(rows, row, c);
          factor[j] = probs ? probs[first + k] : 1.0f;
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (!kept[j]) continue;
        float term[kCount];
        to_floats(value[j], term);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] += factor[j] * term[i];
      }
    }
    store(y, t, c, from_floats<To>(sum));
  });
}

// One warp a token, so that the dot products need no shared memory. kDots of them are summed at once; dy is read
// again (from cache) only where K is larger.
template <class From, class To, int kCount, bool kDot>
__global__ void __launch_bounds__(kBlock) unpermute_backward_kernel(
    Slots slots, Matrix dy, const float* probs, Matrix rows, Matrix drows, float* dprobs, int64_t packs) {
  constexpr int kDots = 8;
  const int lane = threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; t < slots.tokens; t += stride) {
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
        float value[kCount];
        to_floats(load<Pack<From, kCount>>(dy, t, c), value);
        Pack<To, kCount> other[kDots];  // all loads before the first store, which the compiler cannot move them past
        if constexpr (kDot) {
#pragma unroll
          for (int j = 0; j < kDots; ++j) {
            if (row[j] >= 0) other[j] = load_once<Pack<To, kCount>>(rows, row[j], c);
          }
        }
#pragma unroll
        for (int j = 0; j < kDots; ++j) {
          if (row[j] < 0) continue;
          if constexpr (kDot) {
            float theirs[kCount];
            to_floats(other[j], theirs);
#pragma unroll
            for (int i = 0; i < kCount; ++i) dot[j] += value[i] * theirs[i];
          }
          float scaled[kCount];
#pragma unroll
          for (int i = 0; i < kCount; ++i) scaled[i] = factor[j] * value[i];
          store(drows, row[j], c, from_floats<To>(scaled));
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

}  // namespace

const char* unpermute(
    const Slots& slots, int64_t hidden, Dtype from, Matrix rows, const float* probs, Dtype to, Matrix y,
    void* stream_handle) {
  if (slots.tokens * hidden == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  with_dtypes(from, to, [&](auto source, auto target) {
    using From = decltype(source);
    using To = decltype(target);
    const int limit = std::min(pack_elements<From>(rows), pack_elements<To>(y));
    with_pack<Wider<From, To>>(limit, hidden, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      const int64_t packs = hidden / kCount;
      const Layout layout = layout_for(slots.tokens, packs);
      const auto kernel = unpermute_kernel<From, To, kCount>;
      MOE_DIST_LAUNCH(kernel, layout.grid, layout.block, 0, stream, slots, rows, probs, y, packs);
    });
  });
  return launched();
}

const char* unpermute_backward(
    const Slots& slots, int64_t hidden, Dtype from, Matrix dy, const float* probs, Dtype to, Matrix rows, Matrix drows,
    float* dprobs, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  zero_pad_rows(slots, drows, hidden * (to == Dtype::f32 ? 4 : 2), stream);
  if (slots.tokens * slots.top_k == 0) return launched();
  const dim3 block(kWarp, kWarpsPerBlock);
  const auto blocks = static_cast<unsigned>(
      std::min<int64_t>((slots.tokens + kWarpsPerBlock - 1) / kWarpsPerBlock, int64_t{1} << 30));
  with_dtypes(from, to, [&](auto source, auto target) {
    using From = decltype(source);
    using To = decltype(target);
    int limit = std::min(pack_elements<From>(dy), pack_elements<To>(drows));
    if (dprobs) limit = std::min(limit, pack_elements<To>(rows));
    with_pack<Wider<From, To>>(limit, hidden, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      const auto kernel =
          dprobs ? unpermute_backward_kernel<From, To, kCount, true> : unpermute_backward_kernel<From, To, kCount, false>;
      MOE_DIST_LAUNCH(kernel, blocks, block, 0, stream, slots, dy, probs, rows, drows, dprobs, hidden / kCount);
    });
  });
  return launched();
}

}  // namespace cuda
}  // namespace moe_dist
