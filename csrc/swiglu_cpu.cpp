// SwiGLU on the CPU: the choice of instruction set, the threads. Threads share out rows.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "bf16.h"
#include "swiglu.h"
#include "vec.h"

#define MOE_DIST_ISA portable
#define MOE_DIST_BYTES 16
#define MOE_DIST_TARGET
#include "swiglu_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_BYTES
#undef MOE_DIST_TARGET

#ifdef MOE_DIST_X86
#define MOE_DIST_ISA avx2
#define MOE_DIST_BYTES 32
#define MOE_DIST_TARGET __attribute__((target("avx2,fma")))
#include "swiglu_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_BYTES
#undef MOE_DIST_TARGET

#define MOE_DIST_ISA avx512
#define MOE_DIST_BYTES 64
#define MOE_DIST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#include "swiglu_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_BYTES
#undef MOE_DIST_TARGET
#endif

namespace moe_dist {
namespace cpu {
namespace {

constexpr int64_t kGrain = 16384;  // elements that make a thread worth waking

// Calls body with the kernels of the instruction set and a value of the element type, for ranges of rows.
template <class F>
void for_rows(Dtype dtype, int64_t rows, int64_t width, const F& body) {
  const auto run = [&](auto kernels) {
    torch::stable::parallel_for(
        0, rows, std::max<int64_t>(kGrain / std::max<int64_t>(width, 1), 1), [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row) {
            if (dtype == Dtype::f32) {
              body(kernels, float{}, row);
            } else {
              body(kernels, bf16{}, row);
            }
          }
        });
  };
#ifdef MOE_DIST_X86
  if (!std::strcmp(instruction_set(), "avx512")) return run(avx512::Swiglu{});
  if (!std::strcmp(instruction_set(), "avx2")) return run(avx2::Swiglu{});
#endif
  return run(portable::Swiglu{});
}

template <class T>
T* row_of(const Matrix& matrix, int64_t row) {
  return reinterpret_cast<T*>(matrix.data + row * matrix.stride);
}

}  // namespace

void swiglu(Dtype dtype, int64_t rows, int64_t width, Matrix z, const float* factor, Matrix a) {
  for_rows(dtype, rows, width, [&](auto kernels, auto zero, int64_t row) {
    using T = decltype(zero);
    const T* gate = row_of<T>(z, row);
    decltype(kernels)::forward_row(gate, gate + width, factor ? factor[row] : 1.0f, row_of<T>(a, row), width);
  });
}

void swiglu_backward(
    Dtype dtype, int64_t rows, int64_t width, Matrix da, Matrix z, const float* factor, Matrix a, Matrix dz,
    float* dfactor) {
  for_rows(dtype, rows, width, [&](auto kernels, auto zero, int64_t row) {
    using T = decltype(zero);
    const T* gate = row_of<T>(z, row);
    T* dgate = row_of<T>(dz, row);
    const float dot = decltype(kernels)::backward_row(
        row_of<T>(da, row), gate, gate + width, factor ? factor[row] : 1.0f, row_of<T>(a, row), dgate, dgate + width,
        width);
    if (dfactor) dfactor[row] = dot;
  });
}

}  // namespace cpu
}  // namespace moe_dist
