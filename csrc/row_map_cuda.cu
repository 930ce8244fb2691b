// The row map on CUDA: a stable counting sort. The slots are cut into tiles, one block each, and a tile into shares,
// one warp each; a warp walks its share in order, so the rows of an expert keep the order of their slots.
//
// One launch for up to kOneTile slots, two beyond. Not one, because an expert's first row depends on the counts of all
// tiles, and blocks that wait for each other must all be on the device at once: a cooperative launch would have to wait
// until nothing else (an exchange on another stream, say) holds its places, to save the two microseconds of a launch.
#include <cstdio>

#include "cuda_common.h"

namespace moe_dist {
namespace cuda {
namespace {

constexpr int kMapWarps = 16;
constexpr int64_t kOneTile = 4096;  // up to here a single block is done before a second launch would begin
constexpr int64_t kTileUnit = kMapWarps * kWarp;
constexpr int64_t kMinTile = 2 * kTileUnit;
constexpr int64_t kMaxTiles = 128;  // about a block for each multiprocessor; each adds up the counts of all tiles

int64_t tile_length(int64_t slots) {
  if (slots <= kOneTile) return kOneTile;
  const int64_t even = (slots + kMaxTiles - 1) / kMaxTiles;
  return std::max(kMinTile, (even + kTileUnit - 1) / kTileUnit * kTileUnit);
}

int64_t tile_count(int64_t slots) {
  return std::max<int64_t>(1, (slots + tile_length(slots) - 1) / tile_length(slots));
}

// Warps in a block: each has E + 1 counters in the 48 KiB of shared memory.
int warps_for(int64_t num_experts) {
  return static_cast<int>(std::clamp<int64_t>(12288 / (num_experts + 1), 1, kMapWarps));
}

__device__ inline int64_t id_at(const Ids& ids, int64_t slot) {
  return ids.wide ? static_cast<const int64_t*>(ids.data)[slot] : static_cast<const int32_t*>(ids.data)[slot];
}

// One more in the counter of the id. Counter E is that of wrong ids; dropped slots have none.
__device__ inline void count(int* counter, int64_t id, int64_t num_experts) {
  if (id >= 0) atomicAdd(counter + (id < num_experts ? id : num_experts), 1);
}

// Every row belongs to no slot, until one is placed there. Called where there may be pad rows.
__device__ inline void forget_slots(const Ids& ids, int64_t num_experts, int64_t align, int32_t* slot_of_row) {
  const int64_t room = ids.slots + min(num_experts, ids.slots) * (align - 1);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; r < room; r += stride) slot_of_row[r] = -1;
}

// histogram[tile][e] = slots of expert e in the tile; [tile][E] = wrong ids in it.
__global__ void histogram_kernel(
    Ids ids, int64_t num_experts, int64_t align, int64_t length, int32_t* histogram, RowMap out) {
  MOE_DIST_SHARED(int, counter);
  for (int64_t e = threadIdx.x; e <= num_experts; e += blockDim.x) counter[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * length;
  const int64_t end = begin + length < ids.slots ? begin + length : ids.slots;
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += blockDim.x) count(counter, id_at(ids, slot), num_experts);
  __syncthreads();
  int32_t* mine = histogram + blockIdx.x * (num_experts + 1);
  for (int64_t e = threadIdx.x; e <= num_experts; e += blockDim.x) mine[e] = counter[e];
  if (blockIdx.x == 0 && threadIdx.x == 0) out.status[1] = -1;
  if (align > 1) forget_slots(ids, num_experts, align, out.slot_of_row);
}

__device__ inline int sum_of_tiles(const int32_t* histogram, int64_t tiles, int64_t columns, int64_t e) {
  int sum = 0;
#pragma unroll 8
  for (int64_t tile = 0; tile < tiles; ++tile) sum += histogram[tile * columns + e];
  return sum;
}

// Turns the experts' counts into their first rows, by one warp -> {slots placed, rows with pad rows} in each lane.
struct Sums {
  int slots, rows;
};

__device__ inline Sums first_rows(int* number, int64_t num_experts, int align) {
  const int lane = threadIdx.x % kWarp;
  int total = 0, slots = 0;
  for (int64_t base = 0; base < num_experts; base += kWarp) {
    const int64_t e = base + lane;
    const int count = e < num_experts ? number[e] : 0;
    const int own = (count + align - 1) / align * align;
    int upto = own;
    slots += count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += other;
    }
    if (e < num_experts) number[e] = total + upto - own;
    total += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) slots += __shfl_xor_sync(kAllLanes, slots, step);
  return {slots, total};
}

__global__ void place_kernel(Ids ids, int64_t num_experts, int64_t align, int64_t expected, int64_t length,
                             int64_t tiles, const int32_t* histogram, RowMap out) {
  MOE_DIST_SHARED(int, next);  // [warps][E + 1]: slots in each warp's share, then the row that its next slot gets
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t columns = num_experts + 1;
  const int64_t share = (length / kWarp + warps - 1) / warps * kWarp;
  const int64_t tile_end = min((blockIdx.x + 1) * length, ids.slots);
  const int64_t begin = blockIdx.x * length + warp * share;
  const int64_t end = min(begin + share, tile_end);
  int* mine = next + warp * columns;

  for (int64_t e = lane; e < columns; e += kWarp) mine[e] = 0;
  if (tiles == 1) {  // else the histogram has done this
    if (threadIdx.x == 0) out.status[1] = -1;
    if (align > 1) forget_slots(ids, num_experts, align, out.slot_of_row);
  }
  __syncwarp();
  for (int64_t slot = begin + lane; slot < end; slot += kWarp) count(mine, id_at(ids, slot), num_experts);
  __syncthreads();

  // What earlier warps of this block hold goes into each warp's counters; those of the first, which nothing is before,
  // take the slots of all tiles.
  for (int64_t e = threadIdx.x; e < columns; e += blockDim.x) {
    int sum = 0;
    for (int w = 0; w < warps; ++w) {
      const int held = next[w * columns + e];
      next[w * columns + e] = sum;
      sum += held;
    }
    if (tiles > 1) sum = sum_of_tiles(histogram, tiles, columns, e);
    next[e] = sum;
    if (blockIdx.x == 0 && e < num_experts) out.counts[e] = sum;
  }
  __syncthreads();
  if (warp == 0) {
    const int wrong = next[num_experts];
    const Sums sums = first_rows(next, num_experts, static_cast<int>(align));
    if (blockIdx.x == 0 && lane == 0) {
      out.status[0] = sums.slots;
      out.status[2] = sums.rows;
      if (expected >= 0 && (wrong > 0 || sums.slots != expected)) {
        printf("moe_dist: %d of the expert ids are in [0, %d), %d were promised\n", sums.slots,
               static_cast<int>(num_experts), static_cast<int>(expected));
        __trap();
      }
    }
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
    const int first = next[e] + sum_of_tiles(histogram, blockIdx.x, columns, e);
    next[e] = first;
    for (int w = 1; w < warps; ++w) next[w * columns + e] += first;
  }
  __syncthreads();

  for (int64_t base = begin; base < end; base += kWarp) {  // 32 slots at a time: lanes of one expert, in lane order
    const int64_t slot = base + lane;
    const int64_t id = slot < end ? id_at(ids, slot) : -1;
    const bool valid = id >= 0 && id < num_experts;
    const unsigned same = __match_any_sync(kAllLanes, valid ? static_cast<int>(id) : -1);
    const int before = __popc(same & ((1u << lane) - 1u));
    const int first = valid ? mine[id] : 0;
    __syncwarp();
    if (valid && before == 0) mine[id] = first + __popc(same);
    __syncwarp();
    if (slot >= end) continue;
    out.row_of_slot[slot] = valid ? first + before : -1;
    if (valid) out.slot_of_row[first + before] = static_cast<int32_t>(slot);
    if (id >= num_experts) atomicMax(reinterpret_cast<long long*>(out.status + 1), static_cast<long long>(id));
  }
}

}  // namespace

int64_t row_map_scratch(int64_t slots, int64_t num_experts) {
  return tile_count(slots) * (num_experts + 1);
}

const char* row_map(
    const Ids& ids, int64_t num_experts, int64_t align, int64_t expected, const RowMap& out, int32_t* scratch,
    void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const int64_t length = tile_length(ids.slots), tiles = tile_count(ids.slots);
  const unsigned blocks = static_cast<unsigned>(tiles);
  const size_t counters = (num_experts + 1) * sizeof(int);
  if (tiles > 1) {
    MOE_DIST_LAUNCH(
        histogram_kernel, blocks, kMapWarps * kWarp, counters, stream, ids, num_experts, align, length, scratch, out);
  }
  const int warps = warps_for(num_experts);
  MOE_DIST_LAUNCH(
      place_kernel, blocks, warps * kWarp, warps * counters, stream, ids, num_experts, align, expected, length, tiles,
      scratch, out);
  return launched();
}

}  // namespace cuda
}  // namespace moe_dist
