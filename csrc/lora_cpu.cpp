// The chosen LoRA experts on the CPU. First every slot's product with the `down` matrix of its expert (threads share
// out slots), then every slot's addition to its token's row (threads share out columns: what a token adds up to is one
// loop of one thread, so the number of threads changes no bit). The backward is the same with A and B in each other's
// place.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "lora.h"
#include "permute.h"
#include "vec.h"

#define MOE_DIST_ISA portable
#define MOE_DIST_TARGET
#include "lora_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_TARGET

#ifdef MOE_DIST_X86
#define MOE_DIST_ISA avx2
#define MOE_DIST_TARGET __attribute__((target("avx2,fma")))
#include "lora_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_TARGET

#define MOE_DIST_ISA avx512
#define MOE_DIST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#include "lora_simd.h"
#undef MOE_DIST_ISA
#undef MOE_DIST_TARGET
#endif

namespace moe_dist {
namespace cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kWork = 64 << 10;  // multiplications that make a thread worth waking

// Who is chosen, sorted.
struct Chosen {
  Chosen(const Tensor& mix_tensor, const Tensor& starts_tensor)
      : mix(static_cast<const float*>(mix_tensor.data_ptr())),
        starts(static_cast<const int64_t*>(starts_tensor.data_ptr())),
        experts(mix_tensor.size(1)),
        first(experts + 1, 0) {
    STD_TORCH_CHECK(
        mix_tensor.scalar_type() == ScalarType::Float && mix_tensor.is_contiguous() &&
            starts_tensor.scalar_type() == ScalarType::Long && starts_tensor.numel() == experts + 1,
        "mix: fp32, dense; starts: int64, one more than experts");
    std::vector<int64_t> pairs;
    const int64_t numel = mix_tensor.numel();
    for (int64_t i = 0; i < numel; ++i) {
      if (mix[i] != 0.0f) pairs.push_back(i);  // NaN is not zero: it is carried on
    }
    for (int64_t pair : pairs) ++first[pair % experts + 1];
    for (int64_t e = 0; e < experts; ++e) {
      first[e + 1] += first[e];
      largest = std::max(largest, rank(e));
    }
    token.resize(pairs.size());
    std::vector<int64_t> next(first);
    for (int64_t pair : pairs) token[next[pair % experts]++] = pair / experts;
  }
  int64_t slots() const {
    return static_cast<int64_t>(token.size());
  }
  int64_t rank(int64_t e) const {
    return starts[e + 1] - starts[e];
  }
  float weight(int64_t slot, int64_t e) const {
    return mix[token[slot] * experts + e];
  }

  const float* mix;
  const int64_t* starts;
  int64_t experts, largest = 0;
  std::vector<int64_t> first;  // of each expert's slots; [experts]: their number
  std::vector<int64_t> token;  // of each slot
};

int64_t grain(int64_t work_of_one) {
  return std::max<int64_t>(kWork / std::max<int64_t>(work_of_one, 1), 1);
}

// body(expert, begin, end) for the runs of one expert's slots within [from, to).
template <class F>
void for_runs(const Chosen& chosen, int64_t from, int64_t to, const F& body) {
  int64_t e = std::upper_bound(chosen.first.begin(), chosen.first.end(), from) - chosen.first.begin() - 1;
  for (; from < to; ++e) {
    const int64_t end = std::min(chosen.first[e + 1], to);
    if (end > from) body(e, from, end);
    from = end;
  }
}

// A matrix [R, width], dense.
template <class T>
struct Rows {
  explicit Rows(const Tensor& tensor) : data(static_cast<const T*>(tensor.data_ptr())), width(tensor.size(1)) {}
  const T* of(int64_t row) const {
    return data + row * width;
  }

  const T* data;
  int64_t width;
};

// u[slot] = p rows of its expert * x[token of the slot], then after(slot, expert) while u[slot] is near.
template <class Kernels, class T, class F>
void project(const Chosen& chosen, const T* x, const Rows<T>& p, float* u, const F& after) {
  constexpr int kTokens = Kernels::kTokens;
  torch::stable::parallel_for(0, chosen.slots(), grain(chosen.largest * p.width), [&](int64_t from, int64_t to) {
    for_runs(chosen, from, to, [&](int64_t e, int64_t begin, int64_t end) {
      const T* rows = p.of(chosen.starts[e]);
      const auto block = [&](auto count, int64_t slot) {
        const T* tokens[count];
        float* out[count];
        for (int t = 0; t < count; ++t) {
          tokens[t] = x + chosen.token[slot + t] * p.width;
          out[t] = u + (slot + t) * chosen.largest;
        }
        Kernels::template down<count>(tokens, p.width, rows, p.width, chosen.rank(e), out);
        for (int t = 0; t < count; ++t) after(slot + t, e);
      };
      int64_t slot = begin;
      for (; slot + kTokens <= end; slot += kTokens) block(std::integral_constant<int, kTokens>{}, slot);
      for (; slot + 2 <= end; slot += 2) block(std::integral_constant<int, 2>{}, slot);
      for (; slot < end; ++slot) block(std::integral_constant<int, 1>{}, slot);
    });
  });
}

// y[token of the slot] += sum over r of v[slot, r] * q row r of its expert.
template <class Kernels, class T>
void spread(const Chosen& chosen, const float* v, const Rows<T>& q, T* y) {
  constexpr int kTokens = Kernels::kTokens;
  if (!chosen.slots() || !chosen.largest) return;
  // Columns that leave an expert's part of q in the nearest cache, but some for each thread.
  constexpr int64_t kLeast = 64;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fair = (q.width / threads + kLeast - 1) / kLeast * kLeast;
  const int64_t panel = std::max(std::min(std::max<int64_t>(4096 / chosen.largest, 2 * kLeast), fair), kLeast);
  const int64_t panels = (q.width + panel - 1) / panel;
  const int64_t work = chosen.slots() * chosen.largest * panel;
  torch::stable::parallel_for(0, panels, grain(work), [&](int64_t begin_panel, int64_t end_panel) {
    for (int64_t column = begin_panel * panel; column < std::min(end_panel * panel, q.width); column += panel) {
      const int64_t width = std::min(panel, q.width - column);
      for_runs(chosen, 0, chosen.slots(), [&](int64_t e, int64_t begin, int64_t end) {
        const T* rows = q.of(chosen.starts[e]) + column;
        const auto block = [&](auto count, int64_t slot) {
          T* targets[count];
          const float* weights[count];
          for (int t = 0; t < count; ++t) {
            targets[t] = y + chosen.token[slot + t] * q.width + column;
            weights[t] = v + (slot + t) * chosen.largest;
          }
          Kernels::template up<count>(targets, width, rows, q.width, chosen.rank(e), weights);
        };
        int64_t slot = begin;
        for (; slot + kTokens <= end; slot += kTokens) block(std::integral_constant<int, kTokens>{}, slot);
        for (; slot + 2 <= end; slot += 2) block(std::integral_constant<int, 2>{}, slot);
        for (; slot < end; ++slot) block(std::integral_constant<int, 1>{}, slot);
      });
    }
  });
}

// Calls body with the kernels of the instruction set and a value of the element type.
template <class F>
void with_kernels(ScalarType type, const F& body) {
  const auto run = [&](auto kernels) {
    if (type == ScalarType::Float) {
      body(kernels, float{});
    } else {
      body(kernels, bf16{});
    }
  };
#ifdef MOE_DIST_X86
  if (!std::strcmp(instruction_set(), "avx512")) return run(avx512::Lora{});
  if (!std::strcmp(instruction_set(), "avx2")) return run(avx2::Lora{});
#endif
  return run(portable::Lora{});
}

void check(const Tensor& tokens, int64_t width, const Tensor& like, const Tensor& mix) {
  STD_TORCH_CHECK(
      tokens.is_contiguous() && tokens.scalar_type() == like.scalar_type() && tokens.dim() == 2 &&
          tokens.size(0) == mix.size(0) && tokens.size(1) == width,
      "a row for each token, in the dtype of the experts");
}

void check_experts(const Tensor& a, const Tensor& b, const Chosen& chosen) {
  const ScalarType type = a.scalar_type();
  STD_TORCH_CHECK(
      (type == ScalarType::Float || type == ScalarType::BFloat16) && b.scalar_type() == type && a.is_contiguous() &&
          b.is_contiguous() && a.size(0) == b.size(0) && chosen.starts[0] == 0 &&
          chosen.starts[chosen.experts] == a.size(0),
      "stacked experts");
}

// fp32, a row for each slot.
Tensor empty_slots(const Tensor& mix, const Chosen& chosen) {
  return torch::stable::new_empty(mix, {chosen.slots(), chosen.largest});
}

}  // namespace

Tensor lora_forward(
    const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& mix, const Tensor& starts, const Tensor& y) {
  const Chosen chosen(mix, starts);
  check_experts(a, b, chosen);
  check(x, a.size(1), a, mix);
  check(y, b.size(1), a, mix);
  const Tensor kept = empty_slots(mix, chosen), scaled = empty_slots(mix, chosen);
  float* u = static_cast<float*>(kept.data_ptr());
  float* v = static_cast<float*>(scaled.data_ptr());
  with_kernels(a.scalar_type(), [&](auto kernels, auto zero) {
    using K = decltype(kernels);
    using T = decltype(zero);
    project<K>(chosen, static_cast<const T*>(x.data_ptr()), Rows<T>(a), u, [&](int64_t slot, int64_t e) {
      const float weight = chosen.weight(slot, e);
      const int64_t at = slot * chosen.largest;
      for (int64_t r = 0; r < chosen.rank(e); ++r) v[at + r] = u[at + r] * weight;
    });
    spread<K>(chosen, v, Rows<T>(b), static_cast<T*>(y.data_ptr()));
  });
  return kept;
}

void lora_backward(
    const Tensor& dy, const Tensor& a, const Tensor& b, const Tensor& mix, const Tensor& starts,
    const std::optional<Tensor>& u, const std::optional<Tensor>& dx, const std::optional<Tensor>& dmix) {
  const Chosen chosen(mix, starts);
  check_experts(a, b, chosen);
  check(dy, b.size(1), a, mix);
  if (dx) check(*dx, a.size(1), a, mix);
  STD_TORCH_CHECK(
      !dmix || (u && u->scalar_type() == ScalarType::Float && u->is_contiguous() &&
                u->numel() == chosen.slots() * chosen.largest && dmix->scalar_type() == ScalarType::Float &&
                dmix->is_contiguous() && dmix->numel() == mix.numel()),
      "dmix: fp32, dense, from what the forward returned");
  const Tensor scaled = empty_slots(mix, chosen);
  float* v = static_cast<float*>(scaled.data_ptr());
  const float* kept = dmix ? static_cast<const float*>(u->data_ptr()) : nullptr;
  float* weights = dmix ? static_cast<float*>(dmix->data_ptr()) : nullptr;
  with_kernels(a.scalar_type(), [&](auto kernels, auto zero) {
    using K = decltype(kernels);
    using T = decltype(zero);
    project<K>(chosen, static_cast<const T*>(dy.data_ptr()), Rows<T>(b), v, [&](int64_t slot, int64_t e) {
      const float weight = chosen.weight(slot, e);
      const int64_t at = slot * chosen.largest;
      float sum = 0.0f;
      for (int64_t r = 0; r < chosen.rank(e); ++r) {
        if (kept) sum += kept[at + r] * v[at + r];
        v[at + r] *= weight;
      }
      if (kept) weights[chosen.token[slot] * chosen.experts + e] = sum;
    });
    if (dx) spread<K>(chosen, v, Rows<T>(a), static_cast<T*>(dx->data_ptr()));
  });
}

}  // namespace cpu
}  // namespace moe_dist
