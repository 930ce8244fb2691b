// The CPU loops over a range of tokens. permute_cpu.cpp includes this file once for each instruction set, with
//   MOE_DIST_ISA     a namespace that defines Vec (its lanes and how to load, store and stream them), and
//   MOE_DIST_TARGET  the attribute that lets the compiler use that instruction set.
// There is no include guard on purpose. The result is one struct, Kernels, in each namespace.

namespace moe_dist {
namespace MOE_DIST_ISA {

struct Kernels {

// A Vec of memory of type From in the order that belongs to type To.
template <class From, class To>
MOE_DIST_TARGET static inline Vec ordered(const Vec& value) {
  if (sizeof(From) < sizeof(To)) return value.joined();
  if (sizeof(From) > sizeof(To)) return value.parted();
  return value;
}

template <bool kStream, class T>
MOE_DIST_TARGET static inline void put(T* target, Vec value) {
  if (kStream) {
    value.stream(target);
  } else {
    value.store(target);
  }
}

template <class From, class To>
MOE_DIST_TARGET static void cast_row(const From* source, To* target, int64_t hidden) {
  int64_t c = 0;
  for (; c + Vec::kLanes <= hidden; c += Vec::kLanes) ordered<From, To>(Vec::load(source + c)).store(target + c);
  for (; c < hidden; ++c) from_float(to_float(source[c]), target + c);
}

// Streaming stores pass by the caches, so that a line is not read before it is overwritten. They need rows that
// start on a cache line: the caller sees to that. A token is cast once, into a row that stays in the cache.
template <bool kStream, class From, class To>
MOE_DIST_TARGET static void permute_tokens(
    const Slots& slots, int64_t hidden, Matrix x, Matrix rows, int64_t begin, int64_t end) {
  constexpr bool kCast = sizeof(From) != sizeof(To);
  const int64_t row_bytes = hidden * sizeof(To);
  std::vector<To> cast(kCast ? hidden : 0);
  for (int64_t t = begin; t < end; ++t) {
    const char* source = x.data + t * x.stride;
    if (kCast) {
      cast_row(reinterpret_cast<const From*>(source), cast.data(), hidden);
      source = reinterpret_cast<const char*>(cast.data());
    }
    for (int64_t k = 0; k < slots.top_k; ++k) {
      const int64_t row = slots.row_of_slot[t * slots.top_k + k];
      if (row < 0) continue;
      char* target = rows.data + row * rows.stride;
      if (kStream) {
        stream_bytes(target, source, row_bytes);
      } else {
        memcpy(target, source, row_bytes);
      }
    }
  }
  if (kStream) stream_fence();
}

template <bool kStream, class From, class To>
MOE_DIST_TARGET static void unpermute_tokens(
    const Slots& slots, int64_t hidden, Matrix rows, const float* probs, Matrix y, int64_t begin, int64_t end) {
  const int64_t top_k = slots.top_k;
  std::vector<const From*> now(top_k), next(top_k);
  std::vector<float> factor(top_k);
  constexpr int64_t kStep = 2 * Vec::kLanes;
  for (int64_t t = begin; t < end; ++t) {
    int64_t kept = 0, ahead = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      const int64_t slot = t * top_k + k;
      const int64_t row = slots.row_of_slot[slot];
      if (row >= 0) {
        now[kept] = reinterpret_cast<const From*>(rows.data + row * rows.stride);
        factor[kept++] = probs ? probs[slot] : 1.0f;
      }
      // The rows of the next token lie anywhere: they are fetched while this one is summed.
      const int64_t row_ahead = t + 1 < end ? slots.row_of_slot[slot + top_k] : -1;
      if (row_ahead >= 0) next[ahead++] = reinterpret_cast<const From*>(rows.data + row_ahead * rows.stride);
    }
    To* out = reinterpret_cast<To*>(y.data + t * y.stride);
    int64_t c = 0;
    for (; c + kStep <= hidden; c += kStep) {
      for (int64_t j = 0; j < ahead; ++j) prefetch_span(next[j] + c, kStep * sizeof(From));
      Vec low = Vec::zero(), high = Vec::zero();
      for (int64_t j = 0; j < kept; ++j) {
        low.add_scaled(Vec::load(now[j] + c), factor[j]);
        high.add_scaled(Vec::load(now[j] + c + Vec::kLanes), factor[j]);
      }
      put<kStream>(out + c, ordered<From, To>(low));
      put<kStream>(out + c + Vec::kLanes, ordered<From, To>(high));
    }
    for (; c < hidden; ++c) {
      float sum = 0.0f;
      for (int64_t j = 0; j < kept; ++j) sum += factor[j] * to_float(now[j][c]);
      from_float(sum, out + c);
    }
  }
  if (kStream) stream_fence();
}

// One row of the backward pass: target = factor * dy, and <dy, row> where kDot.
template <bool kStream, bool kDot, class From, class To>
MOE_DIST_TARGET static inline float scale_and_dot(
    To* target, const From* dy, const To* row, const To* next_row, float factor, int64_t hidden) {
  constexpr int64_t kStep = 2 * Vec::kLanes;
  Vec dot_low = Vec::zero(), dot_high = Vec::zero();
  int64_t c = 0;
  for (; c + kStep <= hidden; c += kStep) {
    const Vec low = ordered<From, To>(Vec::load(dy + c));
    const Vec high = ordered<From, To>(Vec::load(dy + c + Vec::kLanes));
    if (kDot) {
      if (next_row) prefetch_span(next_row + c, kStep * sizeof(To));
      dot_low.add_product(low, Vec::load(row + c));
      dot_high.add_product(high, Vec::load(row + c + Vec::kLanes));
    }
    put<kStream>(target + c, low.scaled(factor));
    put<kStream>(target + c + Vec::kLanes, high.scaled(factor));
  }
  float dot = kDot ? dot_low.sum() + dot_high.sum() : 0.0f;
  for (; c < hidden; ++c) {
    const float value = to_float(dy[c]);
    if (kDot) dot += value * to_float(row[c]);
    from_float(factor * value, target + c);
  }
  return dot;
}

template <bool kStream, bool kDot, class From, class To>
MOE_DIST_TARGET static void unpermute_backward_tokens(
    const Slots& slots, int64_t hidden, Matrix dy, const float* probs, Matrix rows, Matrix drows, float* dprobs,
    int64_t begin, int64_t end) {
  const int64_t last = end * slots.top_k;
  for (int64_t t = begin; t < end; ++t) {
    const From* dy_row = reinterpret_cast<const From*>(dy.data + t * dy.stride);
    for (int64_t slot = t * slots.top_k; slot < (t + 1) * slots.top_k; ++slot) {
      const int64_t row = slots.row_of_slot[slot];
      float dot = 0.0f;
      if (row >= 0) {
        const int64_t next = kDot && slot + 1 < last ? slots.row_of_slot[slot + 1] : -1;
        dot = scale_and_dot<kStream, kDot>(
            reinterpret_cast<To*>(drows.data + row * drows.stride), dy_row,
            kDot ? reinterpret_cast<const To*>(rows.data + row * rows.stride) : nullptr,
            next >= 0 ? reinterpret_cast<const To*>(rows.data + next * rows.stride) : nullptr,
            probs ? probs[slot] : 1.0f, hidden);
      }
      if (kDot) dprobs[slot] = dot;
    }
  }
  if (kStream) stream_fence();
}

};  // struct Kernels

}  // namespace MOE_DIST_ISA
}  // namespace moe_dist
