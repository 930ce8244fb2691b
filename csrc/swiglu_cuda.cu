// SwiGLU on CUDA: each element of z (and of the gradient) is read once, the activation and its gradient come out of the
// same reading. All arithmetic is in fp32.
#include "swiglu.h"

#include "cuda_common.h"

namespace moe_dist {
namespace cuda {
namespace {

// Where the result is rounded to bf16, an error of 1e-6 in the exponential is lost in it, and the exact functions would
// take longer than the memory.
template <class T>
__device__ inline float sigmoid(float x) {
  if constexpr (sizeof(T) == 2) return __fdividef(1.0f, 1.0f + __expf(-x));
  return 1.0f / (1.0f + expf(-x));
}

template <class T, int kCount>
__global__ void __launch_bounds__(kBlock)
    swiglu_kernel(int64_t rows, int64_t packs, Matrix z, const float* factor, Matrix a) {
  using P = Pack<T, kCount>;
  for_each_pack(rows, packs, [&](int64_t r, int64_t c) {
    const P gates = load_once<P>(z, r, c), ups = load_once<P>(z, r, packs + c);
    const float f = factor ? factor[r] : 1.0f;
    float gate[kCount], up[kCount];
    to_floats(gates, gate);
    to_floats(ups, up);
#pragma unroll
    for (int i = 0; i < kCount; ++i) up[i] *= f * (gate[i] * sigmoid<T>(gate[i]));
    store(a, r, c, from_floats<T>(up));
  });
}

// One pack of a row: a and dz into place -> this pack's share of <da, s>. `a` may be the memory of `da`.
template <class T, int kCount>
__device__ inline float backward_of_pack(
    int64_t r, int64_t c, int64_t packs, Matrix da, Matrix z, const float* factor, Matrix a, Matrix dz) {
  using P = Pack<T, kCount>;
  const P grads = load_once<P>(da, r, c), gates = load_once<P>(z, r, c), ups = load_once<P>(z, r, packs + c);
  const float f = factor ? factor[r] : 1.0f;
  float grad[kCount], gate[kCount], up[kCount], dot = 0.0f;
  to_floats(grads, grad);
  to_floats(gates, gate);
  to_floats(ups, up);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float sigma = sigmoid<T>(gate[i]), silu = gate[i] * sigma, s = silu * up[i], g = f * grad[i];
    dot += grad[i] * s;
    grad[i] = f * s;
    gate[i] = g * up[i] * (sigma + silu * (1.0f - sigma));
    up[i] = g * silu;
  }
  store(a, r, c, from_floats<T>(grad));
  store(dz, r, c, from_floats<T>(gate));
  store(dz, r, packs + c, from_floats<T>(up));
  return dot;
}

template <class T, int kCount>
__global__ void __launch_bounds__(kBlock) swiglu_backward_kernel(
    int64_t rows, int64_t packs, Matrix da, Matrix z, const float* factor, Matrix a, Matrix dz) {
  for_each_pack(rows, packs, [&](int64_t r, int64_t c) {
    backward_of_pack<T, kCount>(r, c, packs, da, z, factor, a, dz);
  });
}

// The same with the gradient of the factor. A row is one block's; blockDim.x is a power of two up to a warp, or whole
// warps, whose sums are added in their order.
template <class T, int kCount>
__global__ void __launch_bounds__(kBlock) swiglu_factor_kernel(
    int64_t rows, int64_t packs, Matrix da, Matrix z, const float* factor, Matrix a, Matrix dz, float* dfactor) {
  __shared__ float of_warp[kBlock / kWarp];
  const int threads = blockDim.x, width = min(threads, kWarp), warps = threads / width;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * blockDim.y; base < rows; base += stride) {
    const int64_t r = base + threadIdx.y;
    float dot = 0.0f;
    if (r < rows) {
      for (int64_t c = threadIdx.x; c < packs; c += threads) {
        dot += backward_of_pack<T, kCount>(r, c, packs, da, z, factor, a, dz);
      }
    }
    for (int step = width / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
    if (warps > 1) {
      float* of_row = of_warp + threadIdx.y * warps;
      if (threadIdx.x % kWarp == 0) of_row[threadIdx.x / kWarp] = dot;
      __syncthreads();
      if (threadIdx.x == 0) {
        for (int w = 1; w < warps; ++w) dot += of_row[w];
      }
      __syncthreads();  // the next row's sums go to the same place
    }
    if (threadIdx.x == 0 && r < rows) dfactor[r] = dot;
  }
}

}  // namespace

const char* swiglu(
    Dtype dtype, int64_t rows, int64_t width, Matrix z, const float* factor, Matrix a, void* stream_handle) {
  if (rows * width == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_pack<T>(std::min(pack_elements<T>(z), pack_elements<T>(a)), width, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      const int64_t packs = width / kCount;
      const Layout layout = layout_for(rows, packs);
      const auto kernel = swiglu_kernel<T, kCount>;
      MOE_DIST_LAUNCH(kernel, layout.grid, layout.block, 0, stream, rows, packs, z, factor, a);
    });
  });
  return launched();
}

const char* swiglu_backward(
    Dtype dtype, int64_t rows, int64_t width, Matrix da, Matrix z, const float* factor, Matrix a, Matrix dz,
    float* dfactor, void* stream_handle) {
  if (rows * width == 0) return nullptr;
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int limit = std::min(
        {pack_elements<T>(da), pack_elements<T>(z), pack_elements<T>(a), pack_elements<T>(dz)});
    with_pack<T>(limit, width, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      const int64_t packs = width / kCount;
      const Layout layout = layout_for(rows, packs, dfactor != nullptr);
      if (dfactor) {
        const auto kernel = swiglu_factor_kernel<T, kCount>;
        MOE_DIST_LAUNCH(kernel, layout.grid, layout.block, 0, stream, rows, packs, da, z, factor, a, dz, dfactor);
      } else {
        const auto kernel = swiglu_backward_kernel<T, kCount>;
        MOE_DIST_LAUNCH(kernel, layout.grid, layout.block, 0, stream, rows, packs, da, z, factor, a, dz);
      }
    });
  });
  return launched();
}

}  // namespace cuda
}  // namespace moe_dist
