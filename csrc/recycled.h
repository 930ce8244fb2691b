// Large results of one layer after the other, in memory that is used again. The C library gives blocks of this size
// back to the system as soon as they are free, and the system clears every page anew at its first touch: for a layer's
// gradients that takes a third of the time of the matrix products.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

namespace moe_dist {
namespace cpu {

// A tensor of so many bytes (uint8) whose memory comes back here when nothing holds its storage any more. Never holds
// more than was in use at some one time.
torch::stable::Tensor recycled(int64_t bytes);

// {bytes in use, bytes waiting for use, most bytes ever in use}
std::tuple<int64_t, int64_t, int64_t> recycled_bytes();

}  // namespace cpu
}  // namespace moe_dist
