// How AVX2 rounds the activations of int8 weights to integers, and what its products of them share.
#pragma once

#include <algorithm>

#include "expand8.h"
#include "integer_panel.h"

namespace alphaprune {
namespace {

// The columns of a group from `first` on, zeros past the last, and what they are rounded by.
class GroupColumns {
 public:
  GroupColumns(const void* from, Dtype dtype, int64_t first, int64_t cols, float most)
      : by_(load(from, dtype, first, cols), most) {}

  float unit() const { return by_.unit; }
  // Eight integers from column `at` of the group on; zeros where it cannot be rounded.
  __m256i eight(int64_t at) const {
    if (!by_.usable()) return _mm256_setzero_si256();
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v_ + at), _mm256_set1_ps(by_.inverse)));
  }

 private:
  // The bits of the largest magnitude: those of NaN and infinities are larger than those of numbers.
  uint32_t load(const void* from, Dtype dtype, int64_t first, int64_t cols) {
    const char* at = static_cast<const char*>(from) + first * size_of(dtype);
    convert(at, dtype, std::min(kGroupCols, cols - first), kGroupCols, v_);
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256i bits = _mm256_setzero_si256();
    for (int64_t i = 0; i < kGroupCols; i += 8)
      bits = _mm256_max_epi32(bits, _mm256_castps_si256(_mm256_and_ps(_mm256_load_ps(v_ + i), magnitude)));
    alignas(32) uint32_t each[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), bits);
    return *std::max_element(each, each + 8);
  }

  alignas(32) float v_[kGroupCols];  // before by_, which is made of it
  Unit by_;
};

// Sixteen integers of 16 bits in their order.
inline __m256i narrow(__m256i low, __m256i high) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
}

// The weights of a row in a step, of two mask bytes.
inline __m128i sixteen(const uint8_t*& value, const uint16_t* shifted) {
  const __m128i low = _mm_shuffle_epi8(load8(value), control(kTables.bytes, shifted[0]));
  value += __builtin_popcountll(shifted[0]);
  const __m128i high = _mm_shuffle_epi8(load8(value), control(kTables.bytes, shifted[1]));
  value += __builtin_popcountll(shifted[1]);
  return _mm_unpacklo_epi64(low, high);
}

// What is known of a macro tile before its values are looked at; `four` counts four rows of a step.
class Notes {
 public:
  void take(const sbt::View& weight, int64_t tile) {
    const uint32_t* words = weight.mask + tile * sbt::kWords;
    prefetch(words);
    prefetch(words + 16);
    shift_bytes<kHalfRowShift>(words, shifted_);
    values_ = tile_values<uint8_t>(weight, tile);
    int32_t next = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kFours; ++i) {
      uint64_t four;
      std::memcpy(&four, words + 2 * i, sizeof four);
      start_[i] = next;
      next += __builtin_popcountll(four);
    }
  }
  const uint8_t* value(int64_t four) const { return values_ + start_[four]; }
  const uint16_t* mask(int64_t four) const { return shifted_ + 8 * four; }

 private:
  static constexpr int kFours = sbt::kWords / 2;
  alignas(32) uint16_t shifted_[4 * sbt::kWords];
  int32_t start_[kFours];
  const uint8_t* values_;
};

// 2 kApart rows of a step of 16 columns from `four` on, each with the one kApart after it in one vector.
template <int kApart>
inline void two_by_two(const Notes& notes, int64_t four, __m256i* rows) {
  __m128i half[2][kApart];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 2
    for (int i = 0; i < kApart / 4; ++i, ++four) {
      const uint8_t* value = notes.value(four);
      const uint16_t* shifted = notes.mask(four);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) half[h][4 * i + r] = sixteen(value, shifted + 2 * r);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kApart; ++r) rows[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(half[0][r]), half[1][r], 1);
}

// Adds the integer sums of eight rows of a token, the first or the second of a row tile, to those before, in what they
// are units of; `scales` of 16 rows, or null.
inline void fold_rows(__m256i sum, float unit, const float* scales, int half, float* sums) {
  __m256 factor = _mm256_set1_ps(unit);
  if (scales) factor = _mm256_mul_ps(factor, _mm256_load_ps(scales + 8 * half));
  float* to = sums + 8 * half;
  _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), factor, _mm256_load_ps(to)));
}

}  // namespace
}  // namespace alphaprune
