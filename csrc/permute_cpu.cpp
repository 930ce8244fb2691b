// permute and unpermute on the CPU: the row map, the choice of instruction set and of stores, the threads.
//
// Threads share out tokens; what a token adds up to is one loop of one thread, so the number of threads changes no bit.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>

#include "permute.h"
#include "vec.h"

#define MOE_DIST_ISA portable
#define MOE_DIST_TARGET
#include "permute_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_TARGET

#ifdef MOE_DIST_X86
#define MOE_DIST_ISA avx2
#define MOE_DIST_TARGET __attribute__((target("avx2,fma")))
#include "permute_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_TARGET

#define MOE_DIST_ISA avx512
#define MOE_DIST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#include "permute_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_TARGET
#endif

namespace moe_dist {
namespace cpu {
namespace {

enum class Isa { portable, avx2, avx512 };

// MOE_DIST_ISA lowers the choice: the tests run every variant that way.
Isa isa() {
  static const Isa chosen = [] {
    const char* wish = std::getenv("MOE_DIST_ISA");
    Isa widest = Isa::portable;
#ifdef MOE_DIST_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) widest = Isa::avx2;
    if (widest == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      widest = Isa::avx512;
    }
#endif
    if (wish && !std::strcmp(wish, "portable")) return Isa::portable;
    if (wish && !std::strcmp(wish, "avx2")) return std::min(widest, Isa::avx2);
    return widest;
  }();
  return chosen;
}

// Outputs larger than this pass by the caches; smaller ones are likely to be read from there again.
constexpr int64_t kStreamBytes = int64_t{8} << 20;
// Work that makes a thread worth waking.
constexpr int64_t kGrainBytes = int64_t{128} << 10;
constexpr int64_t kSlotsPerChunk = int64_t{8} << 10;

bool streams(Matrix out, int64_t rows, int64_t row_bytes) {
  return isa() != Isa::portable && rows * row_bytes > kStreamBytes && out.stride % 64 == 0 && row_bytes % 64 == 0 &&
         reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
}

template <class F>
void for_tokens(const Slots& slots, int64_t row_bytes, const F& body) {
  const int64_t token_bytes = std::max<int64_t>(row_bytes * (slots.top_k + 1), 1);
  torch::stable::parallel_for(0, slots.tokens, std::max<int64_t>(kGrainBytes / token_bytes, 1), body);
}

// Calls body with the kernels of the instruction set and whether they stream, both known at compile time.
template <class F>
void with_kernels(bool stream, const F& body) {
  switch (isa()) {
#ifdef MOE_DIST_X86
    case Isa::avx512: return stream ? body(avx512::Kernels{}, std::true_type{}) : body(avx512::Kernels{}, std::false_type{});
    case Isa::avx2: return stream ? body(avx2::Kernels{}, std::true_type{}) : body(avx2::Kernels{}, std::false_type{});
#endif
    default: return body(portable::Kernels{}, std::false_type{});
  }
}

// Calls body with a value of each of the two element types.
template <class F>
void with_dtypes(Dtype from, Dtype to, const F& body) {
  const auto with_source = [&](auto source) { return to == Dtype::f32 ? body(source, float{}) : body(source, bf16{}); };
  return from == Dtype::f32 ? with_source(float{}) : with_source(bf16{});
}

int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::f32 ? 4 : 2;
}

void clear_pads(const Slots& slots, Matrix rows, int64_t row_bytes) {
  if (!slots.slot_of_row) return;
  torch::stable::parallel_for(0, slots.rows, kSlotsPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (slots.slot_of_row[row] < 0) std::memset(rows.data + row * rows.stride, 0, row_bytes);
    }
  });
}

// Fetches the line of an address that will be read, or written, soon.
inline void fetch(const void* address) {
  __builtin_prefetch(address, 0, 3);
}
inline void fetch_to_write(const void* address) {
#ifdef MOE_DIST_X86
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(address)));  // does nothing where it is not known
#else
  __builtin_prefetch(address, 1, 3);
#endif
}

constexpr int64_t kLine = 64 / sizeof(int32_t);  // rows in a cache line
constexpr int64_t kAhead = 4096;                 // bytes: processors fetch ahead by themselves, but not across pages
// So many experts' lines, and the next of each, lie in the first cache while slots are placed.
constexpr int64_t kFewExperts = 192;

// Counts the experts of slots [begin, end) -> the largest id that is not below E, else -1. Fetches the lines of
// row_of_slot that place_slots will write.
template <class Id>
int64_t count_experts(
    const Id* id_of, int64_t begin, int64_t end, int64_t num_experts, int32_t* count, const int32_t* row_of_slot) {
  int64_t worst = -1;
  const auto visit = [&](int64_t id) {
    if (static_cast<uint64_t>(id) < static_cast<uint64_t>(num_experts)) {
      ++count[id];
    } else {
      worst = std::max(worst, id);  // a dropped slot is negative
    }
  };
  int64_t slot = begin;
  for (; slot + kLine <= end; slot += kLine) {
    for (size_t byte = 0; byte < kLine * sizeof(Id); byte += 64) {
      fetch(reinterpret_cast<const char*>(id_of + slot) + kAhead + byte);
    }
    fetch_to_write(reinterpret_cast<const char*>(row_of_slot + slot) + kAhead);
    for (int64_t j = 0; j < kLine; ++j) visit(id_of[slot + j]);
  }
  for (; slot < end; ++slot) visit(id_of[slot]);
  return std::max<int64_t>(worst, -1);
}

// Gives slots [begin, end) their rows, in order; next holds the next row of each expert. Eight slots at a time where
// none of them is dropped: all rows are taken before the first is written, so that the writes, which the compiler must
// take to change the ids and counters, hold nothing up.
template <bool kFetch, class Id>
void place_slots(
    const Id* id_of, int64_t begin, int64_t end, int32_t* next, int32_t* row_of_slot, int32_t* slot_of_row) {
  constexpr int64_t kGroup = 8;
  int64_t slot = begin;
  while (slot < end) {
    if (slot + kGroup <= end) {
      Id any = 0;
      for (int64_t j = 0; j < kGroup; ++j) any |= id_of[slot + j];
      if (any >= 0) {
        int32_t row[kGroup];
        for (int64_t j = 0; j < kGroup; ++j) row[j] = next[id_of[slot + j]]++;
        for (int64_t j = 0; kFetch && j < kGroup; ++j) fetch_to_write(slot_of_row + row[j] + kLine);
        for (int64_t j = 0; j < kGroup; ++j) row_of_slot[slot + j] = row[j];
        for (int64_t j = 0; j < kGroup; ++j) slot_of_row[row[j]] = static_cast<int32_t>(slot + j);
        slot += kGroup;
        continue;
      }
    }
    const int64_t id = id_of[slot];
    const int32_t row = id < 0 ? -1 : next[id]++;
    row_of_slot[slot] = row;
    if (row >= 0) slot_of_row[row] = static_cast<int32_t>(slot);
    ++slot;
  }
}

// Each chunk of slots counts its experts; a scan over (expert, chunk) turns the counts into the first row of each
// expert in each chunk; then each chunk hands out rows in order. Any cut into chunks gives the same, stable, sort.
template <class Id>
void sort_slots(const Ids& ids, int64_t num_experts, int64_t align, const RowMap& out) {
  const Id* id_of = static_cast<const Id*>(ids.data);
  // Two chunks a thread; the rows of an expert in a chunk fill a few lines.
  const int64_t least = std::max(kSlotsPerChunk, 4 * kLine * num_experts);
  const int64_t chunks = std::clamp<int64_t>(ids.slots / least, 1, 2 * torch::stable::get_num_threads());
  const int64_t stride = num_experts + 2 * kLine;  // threads' counters two lines apart: processors fetch in pairs
  std::vector<int32_t> cursor(chunks * stride, 0);
  std::vector<int64_t> worst(chunks, -1);
  const auto for_chunks = [&](const auto& body) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t chunk = first; chunk < last; ++chunk) {
        body(chunk, ids.slots * chunk / chunks, ids.slots * (chunk + 1) / chunks);
      }
    });
  };

  for_chunks([&](int64_t chunk, int64_t begin, int64_t end) {
    worst[chunk] = count_experts(id_of, begin, end, num_experts, cursor.data() + chunk * stride, out.row_of_slot);
  });
  out.status[1] = *std::max_element(worst.begin(), worst.end());
  if (out.status[1] >= 0) return;

  int32_t row = 0;
  int64_t kept = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int32_t first = row;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int32_t& here = cursor[chunk * stride + e];
      const int32_t count = here;
      here = row;
      row += count;
    }
    out.counts[e] = row - first;
    kept += row - first;
    for (; row % align != 0; ++row) out.slot_of_row[row] = -1;
  }
  out.status[0] = kept;
  out.status[2] = row;

  for_chunks([&](int64_t chunk, int64_t begin, int64_t end) {
    int32_t* next = cursor.data() + chunk * stride;
    if (num_experts <= kFewExperts) {
      place_slots<true>(id_of, begin, end, next, out.row_of_slot, out.slot_of_row);
      return;
    }
    for (int64_t e = 0, first = 0; e < num_experts; ++e) {  // about where this chunk's rows of e will lie
      const int64_t count = out.counts[e], end = first + count * (chunk + 1) / chunks;
      for (int64_t r = first + count * chunk / chunks; r < end; r += kLine) fetch_to_write(out.slot_of_row + r);
      first += (count + align - 1) / align * align;
    }
    place_slots<false>(id_of, begin, end, next, out.row_of_slot, out.slot_of_row);
  });
}

}  // namespace

const char* instruction_set() {
  constexpr const char* names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
}

void row_map(const Ids& ids, int64_t num_experts, int64_t align, const RowMap& out) {
  if (ids.wide) {
    sort_slots<int64_t>(ids, num_experts, align, out);
  } else {
    sort_slots<int32_t>(ids, num_experts, align, out);
  }
}

void permute(const Slots& slots, int64_t hidden, Dtype from, Matrix x, Dtype to, Matrix rows) {
  clear_pads(slots, rows, hidden * bytes_of(to));
  with_dtypes(from, to, [&](auto source, auto target) {
    const int64_t row_bytes = hidden * sizeof(target);
    with_kernels(streams(rows, slots.tokens * slots.top_k, row_bytes), [&](auto kernels, auto stream) {
      for_tokens(slots, row_bytes, [&](int64_t begin, int64_t end) {
        decltype(kernels)::template permute_tokens<decltype(stream)::value, decltype(source), decltype(target)>(
            slots, hidden, x, rows, begin, end);
      });
    });
  });
}

void unpermute(
    const Slots& slots, int64_t hidden, Dtype from, Matrix rows, const float* probs, Dtype to, Matrix y) {
  with_dtypes(from, to, [&](auto source, auto target) {
    with_kernels(streams(y, slots.tokens, hidden * sizeof(target)), [&](auto kernels, auto stream) {
      for_tokens(slots, hidden * sizeof(source), [&](int64_t begin, int64_t end) {
        decltype(kernels)::template unpermute_tokens<decltype(stream)::value, decltype(source), decltype(target)>(
            slots, hidden, rows, probs, y, begin, end);
      });
    });
  });
}

void unpermute_backward(
    const Slots& slots, int64_t hidden, Dtype from, Matrix dy, const float* probs, Dtype to, Matrix rows, Matrix drows,
    float* dprobs) {
  clear_pads(slots, drows, hidden * bytes_of(to));
  with_dtypes(from, to, [&](auto source, auto target) {
    using From = decltype(source);
    using To = decltype(target);
    const int64_t row_bytes = hidden * sizeof(To);
    with_kernels(streams(drows, slots.tokens * slots.top_k, row_bytes), [&](auto kernels, auto stream) {
      for_tokens(slots, row_bytes, [&](int64_t begin, int64_t end) {
        using Kernels = decltype(kernels);
        constexpr bool kStream = decltype(stream)::value;
        if (dprobs) {
          Kernels::template unpermute_backward_tokens<kStream, true, From, To>(
              slots, hidden, dy, probs, rows, drows, dprobs, begin, end);
        } else {
          Kernels::template unpermute_backward_tokens<kStream, false, From, To>(
              slots, hidden, dy, probs, rows, drows, dprobs, begin, end);
        }
      });
    });
  });
}

}  // namespace cpu
}  // namespace moe_dist
