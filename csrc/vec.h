// Vec: a group of fp32 lanes that is read from and written to fp32 or bfloat16 memory, once for each instruction
// set. One group of bfloat16 is one cache line with AVX-512, half of one with AVX2. Of bfloat16, one register holds the
// even and one the odd elements: as 32-bit numbers, pairs need no shuffle to come apart. So a Vec that was read from one
// type is combined with and written to that type alone, unless it goes through joined() (bfloat16's order becomes
// fp32's) or parted() (the other way).
#pragma once

#include <cstring>

#include "bf16.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MOE_DIST_X86 1
#include <immintrin.h>
#endif

namespace moe_dist {
namespace portable {

struct Vec {
  static constexpr int64_t kLanes = 16;
  float lane[kLanes];

  static Vec zero() {
    return Vec{};
  }
  template <class T>
  static Vec load(const T* source) {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = to_float(source[i]);
    return out;
  }
  template <class T>
  void store(T* target) const {
    for (int i = 0; i < kLanes; ++i) from_float(lane[i], target + i);
  }
  template <class T>
  void stream(T* target) const {
    store(target);
  }
  Vec joined() const {
    return *this;
  }
  Vec parted() const {
    return *this;
  }
  Vec scaled(float factor) const {
    Vec out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = lane[i] * factor;
    return out;
  }
  void add_scaled(const Vec& other, float factor) {
    for (int i = 0; i < kLanes; ++i) lane[i] += other.lane[i] * factor;
  }
  void add_product(const Vec& a, const Vec& b) {
    for (int i = 0; i < kLanes; ++i) lane[i] += a.lane[i] * b.lane[i];
  }
  float sum() const {
    float out = 0.0f;
    for (int i = 0; i < kLanes; ++i) out += lane[i];
    return out;
  }
};

inline void prefetch_span(const void*, int64_t) {}
inline void stream_fence() {}
inline void stream_bytes(char* target, const char* source, int64_t bytes) {
  memcpy(target, source, bytes);
}

}  // namespace portable

#ifdef MOE_DIST_X86

inline void prefetch_lines(const void* address, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(address) + i, _MM_HINT_T0);
}

namespace avx512 {
#define MOE_DIST_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define MOE_DIST_INLINE MOE_DIST_TARGET __attribute__((always_inline)) inline

// bfloat16 in the high half of each lane, by the same rounding as from_float(float, bf16*); the low half is anything.
// The instruction for it flushes denormals: not used.
MOE_DIST_INLINE __m512i rounded(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i round = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  return _mm512_add_epi32(bits, round);
}

// The same where there may be NaN.
MOE_DIST_INLINE __m512i rounded_nan(__m512 value) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded(value), is_nan, _mm512_set1_epi32(0x7fc00000));
}

struct Vec {
  static constexpr int64_t kLanes = 32;
  __m512 a, b;

  MOE_DIST_INLINE static Vec zero() {
    return {_mm512_setzero_ps(), _mm512_setzero_ps()};
  }
  MOE_DIST_INLINE static Vec load(const float* source) {
    return {_mm512_loadu_ps(source), _mm512_loadu_ps(source + 16)};
  }
  MOE_DIST_INLINE static Vec load(const bf16* source) {
    const __m512i bits = _mm512_loadu_si512(source);
    const __m512i odd = _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)), _mm512_castsi512_ps(odd)};
  }
  MOE_DIST_INLINE __m512i packed() const {
    if (__builtin_expect(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) == 0, 1)) return pair(rounded(a), rounded(b));
    return pair(rounded_nan(a), rounded_nan(b));
  }
  MOE_DIST_INLINE static __m512i pair(__m512i even, __m512i odd) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(even, 16), odd);
  }
  MOE_DIST_INLINE void store(float* target) const {
    _mm512_storeu_ps(target, a);
    _mm512_storeu_ps(target + 16, b);
  }
  MOE_DIST_INLINE void store(bf16* target) const {
    _mm512_storeu_si512(target, packed());
  }
  MOE_DIST_INLINE void stream(float* target) const {
    _mm512_stream_ps(target, a);
    _mm512_stream_ps(target + 16, b);
  }
  MOE_DIST_INLINE void stream(bf16* target) const {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), packed());
  }
  MOE_DIST_INLINE Vec joined() const {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    return {_mm512_permutex2var_ps(a, low, b), _mm512_permutex2var_ps(a, high, b)};
  }
  MOE_DIST_INLINE Vec parted() const {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)};
  }
  MOE_DIST_INLINE Vec scaled(float factor) const {
    const __m512 wide = _mm512_set1_ps(factor);
    return {_mm512_mul_ps(a, wide), _mm512_mul_ps(b, wide)};
  }
  MOE_DIST_INLINE void add_scaled(const Vec& other, float factor) {
    const __m512 wide = _mm512_set1_ps(factor);
    a = _mm512_fmadd_ps(other.a, wide, a);
    b = _mm512_fmadd_ps(other.b, wide, b);
  }
  MOE_DIST_INLINE void add_product(const Vec& x, const Vec& y) {
    a = _mm512_fmadd_ps(x.a, y.a, a);
    b = _mm512_fmadd_ps(x.b, y.b, b);
  }
  MOE_DIST_INLINE float sum() const {
    return _mm512_reduce_add_ps(_mm512_add_ps(a, b));
  }
};

MOE_DIST_INLINE void prefetch_span(const void* address, int64_t bytes) {
  prefetch_lines(address, bytes);
}
MOE_DIST_INLINE void stream_fence() {
  _mm_sfence();
}
MOE_DIST_INLINE void stream_bytes(char* target, const char* source, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
  }
}

#undef MOE_DIST_INLINE
#undef MOE_DIST_TARGET
}  // namespace avx512

namespace avx2 {
#define MOE_DIST_TARGET __attribute__((target("avx2,fma")))
#define MOE_DIST_INLINE MOE_DIST_TARGET __attribute__((always_inline)) inline

MOE_DIST_INLINE __m256i rounded(__m256 value) {  // as above
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i round = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_add_epi32(bits, round);
}

MOE_DIST_INLINE __m256i rounded_nan(__m256 value) {
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded(value), _mm256_set1_epi32(0x7fc00000), is_nan);
}

struct Vec {
  static constexpr int64_t kLanes = 16;
  __m256 a, b;

  MOE_DIST_INLINE static Vec zero() {
    return {_mm256_setzero_ps(), _mm256_setzero_ps()};
  }
  MOE_DIST_INLINE static Vec load(const float* source) {
    return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)};
  }
  MOE_DIST_INLINE static Vec load(const bf16* source) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    const __m256i odd = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), _mm256_castsi256_ps(odd)};
  }
  MOE_DIST_INLINE __m256i packed() const {
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)) == 0, 1)) {
      return pair(rounded(a), rounded(b));
    }
    return pair(rounded_nan(a), rounded_nan(b));
  }
  MOE_DIST_INLINE static __m256i pair(__m256i even, __m256i odd) {
    return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
  }
  MOE_DIST_INLINE void store(float* target) const {
    _mm256_storeu_ps(target, a);
    _mm256_storeu_ps(target + 8, b);
  }
  MOE_DIST_INLINE void store(bf16* target) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), packed());
  }
  MOE_DIST_INLINE void stream(float* target) const {
    _mm256_stream_ps(target, a);
    _mm256_stream_ps(target + 8, b);
  }
  MOE_DIST_INLINE void stream(bf16* target) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), packed());
  }
  MOE_DIST_INLINE Vec joined() const {
    const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
    return {_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)};
  }
  MOE_DIST_INLINE Vec parted() const {
    return {in_order(_mm256_shuffle_ps(a, b, 0x88)), in_order(_mm256_shuffle_ps(a, b, 0xdd))};
  }
  MOE_DIST_INLINE static __m256 in_order(__m256 pairs) {  // the pairs 0, 2, 1, 3 of lanes
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8));
  }
  MOE_DIST_INLINE Vec scaled(float factor) const {
    const __m256 wide = _mm256_set1_ps(factor);
    return {_mm256_mul_ps(a, wide), _mm256_mul_ps(b, wide)};
  }
  MOE_DIST_INLINE void add_scaled(const Vec& other, float factor) {
    const __m256 wide = _mm256_set1_ps(factor);
    a = _mm256_fmadd_ps(other.a, wide, a);
    b = _mm256_fmadd_ps(other.b, wide, b);
  }
  MOE_DIST_INLINE void add_product(const Vec& x, const Vec& y) {
    a = _mm256_fmadd_ps(x.a, y.a, a);
    b = _mm256_fmadd_ps(x.b, y.b, b);
  }
  MOE_DIST_INLINE float sum() const {
    const __m256 both = _mm256_add_ps(a, b);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  }
};

MOE_DIST_INLINE void prefetch_span(const void* address, int64_t bytes) {
  prefetch_lines(address, bytes);
}
MOE_DIST_INLINE void stream_fence() {
  _mm_sfence();
}
MOE_DIST_INLINE void stream_bytes(char* target, const char* source, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 32) {
    const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i), value);
  }
}

#undef MOE_DIST_INLINE
#undef MOE_DIST_TARGET
}  // namespace avx2
#endif  // MOE_DIST_X86
}  // namespace moe_dist
