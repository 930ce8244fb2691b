// The products of a stack of SwiGLU experts on the CPU, threads shared out over experts.
//
// Rows lie expert after expert, counts[e] of them each. A product of one expert is small: threads that work on it
// together spend much of their time waiting for each other. So each thread takes whole experts, the largest first, and
// keeps what lies between an expert's products in its own cache. An expert with more rows than a thread's fair share
// is done by all threads together before that.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace moe_dist {
namespace cpu {

using torch::stable::Tensor;

// x [R,H], w_in [S,2I,H], w_out [S,H,I], counts int64 [up to S]; all dense, fp32 or bf16 alike. factor [R] or null.
// y[r] = factor[r] · swiglu(x[r] · w_in[e]ᵀ) · w_out[e]ᵀ, the factor applied to the activation; z [R,2I] receives what
// goes into that, where it is wanted.
void experts_forward(
    const Tensor& x, const Tensor& w_in, const Tensor& w_out, const Tensor& counts, const float* factor,
    const Tensor& y, const std::optional<Tensor>& z);

// From the gradient of y. Without z it is computed again from x. x may be missing where neither that nor dw_in asks for
// it; each result may be missing (dfactor [R]: null). dw of experts without rows is left as it is.
void experts_backward(
    const Tensor& dy, const std::optional<Tensor>& x, const std::optional<Tensor>& z, const Tensor& w_in,
    const Tensor& w_out, const Tensor& counts, const float* factor, const std::optional<Tensor>& dx,
    const std::optional<Tensor>& dw_in, const std::optional<Tensor>& dw_out, float* dfactor);

}  // namespace cpu
}  // namespace moe_dist
