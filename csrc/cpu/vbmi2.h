// Expansion of mask words on AVX-512 with VBMI2.
#pragma once

#include "avx512.h"

namespace alphaprune {
namespace {

// The 32 weights of a word, zeros where the mask has none. The load is a whole vector: the values end in a readable
// tail of 64 bytes.
inline __m512i expand16(const uint16_t*& value, uint32_t mask) {
  const __m512i dense = _mm512_maskz_expand_epi16(mask, _mm512_loadu_si512(value));
  value += __builtin_popcount(mask);
  return dense;
}

inline __m512i expand32(const uint32_t*& value, uint32_t mask) {
  const __m512i dense = _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(value));
  value += __builtin_popcount(mask & 0xffffu);
  return dense;
}

// The 64 weights of two words of int8: 4 rows x 16 columns.
inline __m512i expand8(const uint8_t*& value, const uint32_t* words) {
  uint64_t mask;
  std::memcpy(&mask, words, 8);
  const __m512i dense = _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(value));
  value += __builtin_popcountll(mask);
  return dense;
}

// The int8 weights of a macro tile, 64 at a time: what integer.h wants of an expansion.
class ExpandedBytes {
 public:
  struct Notes {};
  ExpandedBytes(const sbt::View& weight, int64_t, int64_t, Notes&) : weight_(weight) {}

  void start(int64_t tile) {
    value_ = tile_values<uint8_t>(weight_, tile);
    mask_ = weight_.mask + tile * sbt::kWords;
    prefetch(mask_);
    prefetch(mask_ + 16);
  }
  __m512i next(int vector) {
    if (vector % 2 == 0) prefetch(value_);
    const __m512i w = expand8(value_, mask_);
    mask_ += 2;
    return w;
  }

 private:
  const sbt::View& weight_;
  const uint8_t* value_ = nullptr;
  const uint32_t* mask_ = nullptr;
};

}  // namespace
}  // namespace alphaprune
