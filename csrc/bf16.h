// bfloat16 as its 16 bits, with the conversions that torch uses (round to nearest, ties to even).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MOE_DIST_ANYWHERE __host__ __device__ inline
#else
#define MOE_DIST_ANYWHERE inline
#endif

namespace moe_dist {

struct bf16 {
  uint16_t bits;
};

MOE_DIST_ANYWHERE float to_float(float value) {
  return value;
}

MOE_DIST_ANYWHERE float to_float(bf16 value) {
  uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof out);
  return out;
}

MOE_DIST_ANYWHERE void from_float(float value, float* out) {
  *out = value;
}

MOE_DIST_ANYWHERE void from_float(float value, bf16* out) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace moe_dist
