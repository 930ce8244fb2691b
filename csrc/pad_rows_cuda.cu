// Zeros into the rows that belong to no slot. They are few: a warp looks at 32 rows and writes to those that are.
#include "cuda_common.h"

namespace moe_dist {
namespace cuda {
namespace {

template <int kCount>
__global__ void __launch_bounds__(kBlock) pad_rows_kernel(Slots slots, Matrix rows, int64_t packs) {
  const int lane = threadIdx.x % kWarp;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x - lane; base < slots.rows; base += stride) {
    const int slot = base + lane < slots.rows ? slots.slot_of_row[base + lane] : 0;
    for (int i = 0; i < kWarp; ++i) {
      if (__shfl_sync(kAllLanes, slot, i) >= 0) continue;
      for (int64_t c = lane; c < packs; c += kWarp) store(rows, base + i, c, Pack<bf16, kCount>{});
    }
  }
}

}  // namespace

void zero_pad_rows(const Slots& slots, Matrix rows, int64_t row_bytes, cudaStream_t stream) {
  if (!slots.slot_of_row || slots.rows * row_bytes == 0) return;
  const int64_t halves = row_bytes / sizeof(bf16);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((slots.rows + kBlock - 1) / kBlock, int64_t{1} << 30));
  with_pack<bf16>(pack_elements<bf16>(rows), halves, [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    MOE_DIST_LAUNCH(pad_rows_kernel<kCount>, blocks, kBlock, 0, stream, slots, rows, halves / kCount);
  });
}

}  // namespace cuda
}  // namespace moe_dist
