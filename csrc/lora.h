// A mixture of LoRA experts, each token's chosen ones alone: y[t] += sum over i of mix[t, i] * B_i * A_i * x[t].
//
// Slots are the pairs (token, expert) whose weight is not zero, sorted by expert and, within an expert, by token. The
// work is that of the slots: experts that are not chosen cost nothing. All sums are in fp32.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace moe_dist {
namespace cpu {

using torch::stable::Tensor;

// x [T,H], a [R,H], b [R,O] (every B_i turned), y [T,O], all dense, fp32 or bf16 alike; mix fp32 [T,N]; starts int64
// [N+1]: the rows of expert i in a and b are starts[i] up to starts[i + 1]. Adds to y, rounding once for each slot.
// Returns A_i * x[t] of each slot, fp32 [slots, largest rank]: what the backward needs for the gradient of mix.
Tensor lora_forward(
    const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& mix, const Tensor& starts, const Tensor& y);

// From the gradient of y: adds that of x to dx, writes that of mix for each slot to dmix (zeros are left as they are).
// Each may be missing; u is what the forward returned, and needed for dmix only.
void lora_backward(
    const Tensor& dy, const Tensor& a, const Tensor& b, const Tensor& mix, const Tensor& starts,
    const std::optional<Tensor>& u, const std::optional<Tensor>& dx, const std::optional<Tensor>& dmix);

}  // namespace cpu
}  // namespace moe_dist
