// The product of int8 weights with several tokens on AVX2: activations are rounded to integers of 16 bits, and vpmaddwd
// multiplies two columns of eight rows at a time, twice as many as an FMA of floats does.
//
// Of each 128 columns of a row tile a panel is made, [two columns][16 rows][2] in 16 bits, so that rows lie in the
// lanes and no sums are left to be added along a vector; of the activations two columns are broadcast.
#pragma once

#include <algorithm>
#include <cstring>

#include "rounded8.h"

namespace alphaprune {
namespace {

namespace words {

using Made = Rounded<2>;  // a column's two bytes are one number here

inline RoundedGroup round_group(const void* from, Dtype dtype, int64_t first, int64_t cols, int64_t, uint8_t* to) {
  const GroupColumns columns(from, dtype, first, cols, kLargestOf2);
  for (int64_t i = 0; i < kGroupCols; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * i), narrow(columns.eight(i), columns.eight(i + 8)));
  return {columns.unit(), {}};
}

inline void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  const Made rounded(weight, x.tokens);
  for (int64_t t = first; t < last; ++t) rounded.prepare(x, weight.cols, t, to, round_group);
}

// Rows of pairs of bytes to columns of them, in each half.
inline void transpose(__m256i* v) {
  __m256i a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[2 * i] = _mm256_unpacklo_epi16(v[2 * i], v[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi16(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      b[4 * i + 2 * k] = _mm256_unpacklo_epi32(a[4 * i + k], a[4 * i + 2 + k]);
      b[4 * i + 2 * k + 1] = _mm256_unpackhi_epi32(a[4 * i + k], a[4 * i + 2 + k]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = _mm256_unpacklo_epi64(b[i], b[4 + i]);
    v[2 * i + 1] = _mm256_unpackhi_epi64(b[i], b[4 + i]);
  }
}

struct Words {
  using Made = words::Made;
  static constexpr int kBlock = 4;  // tokens of which all sums are in registers; with more GCC keeps some in memory
  static constexpr int64_t kTilePanel = 2 * sbt::kTileRows * sbt::kTileCols;

  static void expand_tile(const sbt::View& weight, int64_t tile, uint8_t* to) {
    Notes notes;
    notes.take(weight, tile);
    for (int64_t s = 0; s < sbt::kSteps; ++s) {
      __m256i v[8];
      prefetch(notes.value(4 * s));
      prefetch(notes.value(4 * s) + 64);
      two_by_two<8>(notes, 4 * s, v);
      transpose(v);
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i, to += 64) {
        auto* at = reinterpret_cast<__m256i*>(to);
        _mm256_store_si256(at, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(v[i])));
        _mm256_store_si256(at + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v[i], 1)));
      }
    }
  }

  static void exact(const Product& p, int64_t row_tile, int64_t token) {
    exact_token<Words8>(p, row_tile, token, convert);
  }

  template <int T>
  __attribute__((noinline)) static void block(const uint8_t* panel, int64_t cols, const Made& rounded, const void* x,
                                              int64_t group, int64_t token, const float* scales, float* sums) {
    const auto* at = reinterpret_cast<const int16_t*>(rounded.columns(x, group, token));
    __m256i sum[2][T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[0][t] = sum[1][t] = _mm256_setzero_si256();
    for (int64_t q = 0; q < cols; q += 2, panel += 64) {
      const __m256i low = load32(panel), high = load32(panel + 32);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        int32_t two;
        std::memcpy(&two, at + t * kGroupCols + q, sizeof two);
        const __m256i a = _mm256_set1_epi32(two);
        sum[0][t] = _mm256_add_epi32(sum[0][t], _mm256_madd_epi16(low, a));
        sum[1][t] = _mm256_add_epi32(sum[1][t], _mm256_madd_epi16(high, a));
      }
    }
    const float* units = rounded.units(x, group, token);
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t)
      for (int half = 0; half < 2; ++half) fold_rows(sum[half][t], units[t], scales, half, sums + t * sbt::kTileRows);
  }
};

inline void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  IntegerPanel<Words>::product(p, begin, end, scratch);
}

inline bool takes(const Activations& x, const sbt::View& weight) {
  return weight.dtype == Dtype::int8 && x.dtype != Dtype::float32;
}

}  // namespace words

}  // namespace
}  // namespace alphaprune
