// permute and unpermute on the CPU: the choice of instruction set and of stores, the threads.
//
// Threads share out tokens; what a token adds up to is one loop of one thread, so the number of threads changes no bit.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

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
constexpr int64_t kRowsPerChunk = int64_t{8} << 10;

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
  torch::stable::parallel_for(0, slots.rows, kRowsPerChunk, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (slots.slot_of_row[row] < 0) std::memset(rows.data + row * rows.stride, 0, row_bytes);
    }
  });
}

}  // namespace

const char* instruction_set() {
  constexpr const char* names[] = {"portable", "avx2", "avx512"};
  return names[static_cast<int>(isa())];
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
