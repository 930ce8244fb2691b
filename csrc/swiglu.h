// SwiGLU on raw memory: silu(gate) * up, where a row of z holds the gates and then the ups.
#pragma once

#include "permute.h"

namespace moe_dist {
namespace cpu {

// a[r, i] = silu(z[r, i]) * z[r, width + i]. All arithmetic in fp32, one rounding at the end.
void swiglu(Dtype dtype, int64_t rows, int64_t width, Matrix z, Matrix a);

// The gradient of z, and a once more (the gradient of what follows needs it). `a` may be the memory of `da`.
void swiglu_backward(Dtype dtype, int64_t rows, int64_t width, Matrix da, Matrix z, Matrix a, Matrix dz);

}  // namespace cpu
}  // namespace moe_dist
