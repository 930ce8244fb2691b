// The loops of lora_cpu.cpp, included once for each instruction set (see permute_simd.h for how).

namespace moe_dist {
namespace MOE_DIST_ISA {

struct Lora {

// Tokens that share a reading of the expert's rows, as many as the registers hold.
static constexpr int kTokens = Vec::kLanes == 32 ? 4 : 2;

// out[t][r] += x[t] * p[r] for kT tokens and kR rows of p.
template <int kT, int kR, class T>
MOE_DIST_TARGET static void dot(
    const T* const* x, int64_t from, int64_t to, const T* p, int64_t p_stride, float* const* out, int64_t row) {
  Vec sum[kT][kR];
  for (int t = 0; t < kT; ++t) {
    for (int r = 0; r < kR; ++r) sum[t][r] = Vec::zero();
  }
  int64_t i = from;
  for (; i + Vec::kLanes <= to; i += Vec::kLanes) {
    Vec tokens[kT];
    for (int t = 0; t < kT; ++t) tokens[t] = Vec::load(x[t] + i);
    for (int r = 0; r < kR; ++r) {
      const Vec weights = Vec::load(p + r * p_stride + i);
      for (int t = 0; t < kT; ++t) sum[t][r].add_product(tokens[t], weights);
    }
  }
  for (int t = 0; t < kT; ++t) {
    for (int r = 0; r < kR; ++r) {
      float total = sum[t][r].sum();
      for (int64_t j = i; j < to; ++j) total += to_float(x[t][j]) * to_float(p[r * p_stride + j]);
      out[t][row + r] += total;
    }
  }
}

// out[t][r] = x[t] * p[r] for kT tokens and all rows of p, in spans of columns that stay in the nearest cache.
template <int kT, class T>
MOE_DIST_TARGET static void down(
    const T* const* x, int64_t width, const T* p, int64_t p_stride, int64_t rank, float* const* out) {
  constexpr int64_t kSpan = 1024;
  for (int t = 0; t < kT; ++t) memset(out[t], 0, rank * sizeof(float));
  for (int64_t from = 0; from < width; from += kSpan) {
    const int64_t to = from + kSpan < width ? from + kSpan : width;
    int64_t r = 0;
    for (; r + 2 <= rank; r += 2) dot<kT, 2>(x, from, to, p + r * p_stride, p_stride, out, r);
    if (r < rank) dot<kT, 1>(x, from, to, p + r * p_stride, p_stride, out, r);
  }
}

// y[t] += sum over r of v[t][r] * q[r] for kT tokens.
template <int kT, class T>
MOE_DIST_TARGET static void up(
    T* const* y, int64_t width, const T* q, int64_t q_stride, int64_t rank, const float* const* v) {
  int64_t i = 0;
  for (; i + Vec::kLanes <= width; i += Vec::kLanes) {
    Vec sum[kT];
    for (int t = 0; t < kT; ++t) sum[t] = Vec::load(y[t] + i);
    for (int64_t r = 0; r < rank; ++r) {
      const Vec weights = Vec::load(q + r * q_stride + i);
      for (int t = 0; t < kT; ++t) sum[t].add_scaled(weights, v[t][r]);
    }
    for (int t = 0; t < kT; ++t) sum[t].store(y[t] + i);
  }
  for (; i < width; ++i) {
    for (int t = 0; t < kT; ++t) {
      float total = to_float(y[t][i]);
      for (int64_t r = 0; r < rank; ++r) total += v[t][r] * to_float(q[r * q_stride + i]);
      from_float(total, y[t] + i);
    }
  }
}

};  // struct Lora

}  // namespace MOE_DIST_ISA
}  // namespace moe_dist
