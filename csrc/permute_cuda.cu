// permute on CUDA: a thread reads one pack of a token and writes it to that token's rows.
#include "cuda_common.h"

namespace moe_dist {
namespace cuda {
namespace {

constexpr int kRowsAtOnce = 8;  // row numbers that are read before the first of them is used

template <class From, class To, int kCount>
__global__ void __launch_bounds__(kBlock) permute_kernel(Slots slots, Matrix x, Matrix rows, int64_t packs) {
  for_each_pack(slots.tokens, packs, [&](int64_t t, int64_t c) {
    const auto value = cast<To>(load_once<Pack<From, kCount>>(x, t, c));
    const int32_t* row_of = slots.row_of_slot + t * slots.top_k;
    for (int64_t k0 = 0; k0 < slots.top_k; k0 += kRowsAtOnce) {
      int64_t row[kRowsAtOnce];
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) row[j] = k0 + j < slots.top_k ? row_of[k0 + j] : -1;
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        if (row[j] >= 0) store(rows, row[j], c, value);
      }
    }
  });
}

}  // namespace

const char* permute(
    const Slots& slots, int64_t hidden, Dtype from, Matrix x, Dtype to, Matrix rows, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  zero_pad_rows(slots, rows, hidden * (to == Dtype::f32 ? 4 : 2), stream);
  if (slots.tokens * slots.top_k * hidden == 0) return launched();
  with_dtypes(from, to, [&](auto source, auto target) {
    using From = decltype(source);
    using To = decltype(target);
    const int limit = std::min(pack_elements<From>(x), pack_elements<To>(rows));
    with_pack<Wider<From, To>>(limit, hidden, [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      const int64_t packs = hidden / kCount;
      const Layout layout = layout_for(slots.tokens, packs);
      const auto kernel = permute_kernel<From, To, kCount>;
      MOE_DIST_LAUNCH(kernel, layout.grid, layout.block, 0, stream, slots, x, rows, packs);
    });
  });
  return launched();
}

}  // namespace cuda
}  // namespace moe_dist
