// What AVX-VNNI adds to AVX2, for CPUs without it; forced into a file of csrc/cpu as avx512.h is.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace alphaprune {
namespace {

// Four products of an unsigned and a signed byte per lane, added without saturation.
inline __m256i _mm256_dpbusd_avx_epi32(__m256i sum, __m256i a, __m256i b) {
  uint32_t out[8];
  uint8_t x[32];
  int8_t y[32];
  std::memcpy(out, &sum, sizeof out);
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < 32; ++i) out[i / 4] += static_cast<uint32_t>(x[i] * y[i]);
  std::memcpy(&sum, out, sizeof out);
  return sum;
}

}  // namespace
}  // namespace alphaprune
