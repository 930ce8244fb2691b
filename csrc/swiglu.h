// SwiGLU on raw memory: silu(gate) * up, where a row of z holds the gates and then the ups, times a factor for each row.
#pragma once

#include "permute.h"

namespace moe_dist {
namespace cpu {

// a[r, i] = factor[r] * s[r, i] with s = silu(z[r, i]) * z[r, width + i]; factor [rows] may be null (all ones). All
// arithmetic in fp32, one rounding at the end.
void swiglu(Dtype dtype, int64_t rows, int64_t width, Matrix z, const float* factor, Matrix a);

// From da, the gradient of a: dz; a once more (the gradient of what follows needs it; it may be the memory of da); and
// dfactor[r] = <da[r], s[r]>, unless that is null.
void swiglu_backward(
    Dtype dtype, int64_t rows, int64_t width, Matrix da, Matrix z, const float* factor, Matrix a, Matrix dz,
    float* dfactor);

}  // namespace cpu

namespace cuda {

// The same on a CUDA stream; null, or the message of a failed launch. dfactor has the same bits in every run.
const char* swiglu(
    Dtype dtype, int64_t rows, int64_t width, Matrix z, const float* factor, Matrix a, void* stream);
const char* swiglu_backward(
    Dtype dtype, int64_t rows, int64_t width, Matrix da, Matrix z, const float* factor, Matrix a, Matrix dz,
    float* dfactor, void* stream);

}  // namespace cuda
}  // namespace moe_dist
