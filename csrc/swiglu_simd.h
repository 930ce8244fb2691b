// The loops of swiglu_cpu.cpp, included once for each instruction set (see permute_simd.h for how), with
//   MOE_DIST_BYTES  the width of a vector register of MOE_DIST_TARGET.
// The arithmetic is written once, in the compiler's own vectors of fp32.

#define MOE_DIST_INLINE MOE_DIST_TARGET __attribute__((always_inline)) static inline

namespace moe_dist {
namespace MOE_DIST_ISA {

struct Swiglu {

static constexpr int64_t kLanes = MOE_DIST_BYTES / 4;
using Floats = float __attribute__((vector_size(MOE_DIST_BYTES)));
using Bits = uint32_t __attribute__((vector_size(MOE_DIST_BYTES)));
using Halves = uint16_t __attribute__((vector_size(MOE_DIST_BYTES / 2)));

MOE_DIST_INLINE void load(const float* source, Floats* out) {
  memcpy(out, source, sizeof(Floats));
}
MOE_DIST_INLINE void load(const bf16* source, Floats* out) {
  Halves halves;
  memcpy(&halves, source, sizeof halves);
  *out = (Floats)(__builtin_convertvector(halves, Bits) << 16);
}
MOE_DIST_INLINE void store(const Floats& value, float* target) {
  memcpy(target, &value, sizeof value);
}
MOE_DIST_INLINE void store(const Floats& value, bf16* target) {  // rounds as from_float(float, bf16*) does
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits is_nan = (Bits)(value != value);
  const Halves halves = __builtin_convertvector((is_nan & 0x7fc0u) | (~is_nan & rounded), Halves);
  memcpy(target, &halves, sizeof halves);
}

// 1 / (1 + e^-g). e^x to about one unit in the last place for |x| <= 87 and its value at 87 beyond, where a sigmoid
// is 0 or 1 to all digits that it has: x = n ln2 + r with |r| <= ln2 / 2, a polynomial for e^r, and n added to the
// exponent.
MOE_DIST_INLINE void sigmoid(const Floats& g, Floats* out) {
  Floats x = -g;
  x = x > 87.0f ? Floats{} + 87.0f : x;
  x = x < -87.0f ? Floats{} - 87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  Floats r = x - n * 0.693359375f;  // ln 2 in two parts; the product with the first is exact
  r = r + n * 2.12194440e-4f;
  Floats p = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats power = (Floats)(((Bits)shifted << 23) + 0x3f800000u);
  *out = 1.0f / (1.0f + p * power);
}

template <class T>
MOE_DIST_INLINE void forward_at(const T* gate, const T* up, float factor, T* a) {
  Floats g, u, s;
  load(gate, &g);
  load(up, &u);
  sigmoid(g, &s);
  store(g * s * u * factor, a);
}

// Everything is read before anything is written: da and a may be the same memory. <da, silu(gate) * up> is added to
// `dot`.
template <class T>
MOE_DIST_INLINE void backward_at(
    const T* da, const T* gate, const T* up, float factor, T* a, T* dgate, T* dup, Floats* dot) {
  Floats d, g, u, s;
  load(da, &d);
  load(gate, &g);
  load(up, &u);
  sigmoid(g, &s);
  const Floats silu = g * s, product = silu * u;
  *dot += d * product;
  d *= factor;
  store(d * silu, dup);
  store(d * u * (s + silu * (1.0f - s)), dgate);
  store(product * factor, a);
}

MOE_DIST_INLINE float sum(const Floats& value) {
  float out = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) out += value[i];
  return out;
}

// The columns beyond the last whole vector go through a padded copy.
template <class T>
MOE_DIST_TARGET static void forward_row(const T* gate, const T* up, float factor, T* a, int64_t width) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) forward_at(gate + i, up + i, factor, a + i);
  if (i == width) return;
  T in[2][kLanes] = {}, out[kLanes];
  const size_t bytes = (width - i) * sizeof(T);
  memcpy(in[0], gate + i, bytes);
  memcpy(in[1], up + i, bytes);
  forward_at(in[0], in[1], factor, out);
  memcpy(a + i, out, bytes);
}

// -> <da, silu(gate) * up>
template <class T>
MOE_DIST_TARGET static float backward_row(
    const T* da, const T* gate, const T* up, float factor, T* a, T* dgate, T* dup, int64_t width) {
  Floats dot{};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    backward_at(da + i, gate + i, up + i, factor, a + i, dgate + i, dup + i, &dot);
  }
  if (i == width) return sum(dot);
  T in[3][kLanes] = {}, out[3][kLanes];
  const size_t bytes = (width - i) * sizeof(T);
  memcpy(in[0], da + i, bytes);
  memcpy(in[1], gate + i, bytes);
  memcpy(in[2], up + i, bytes);
  backward_at(in[0], in[1], in[2], factor, out[0], out[1], out[2], &dot);
  memcpy(a + i, out[0], bytes);
  memcpy(dgate + i, out[1], bytes);
  memcpy(dup + i, out[2], bytes);
  return sum(dot);
}

};  // struct Swiglu

}  // namespace MOE_DIST_ISA
}  // namespace moe_dist

#undef MOE_DIST_INLINE
