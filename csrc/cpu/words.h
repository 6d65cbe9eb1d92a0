// The product of int8 weights with several tokens on AVX2: activations are rounded to integers of 16 bits, and vpmaddwd
// multiplies two columns of eight rows at a time, twice as many as an FMA of floats does.
//
// Of each 128 columns of a row tile a panel is made, [two columns][16 rows][2] in 16 bits, so that rows lie in the
// lanes and no sums are left to be added along a vector; of the activations two columns are broadcast.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "expand8.h"
#include "rounding.h"

namespace alphaprune {
namespace {

namespace words {

constexpr int64_t kGroupTiles = kGroupCols / sbt::kTileCols;
constexpr int kBlock = 4;       // tokens of which all sums are in registers; with more GCC keeps some in memory
constexpr int64_t kPass = 128;  // for which a panel is made once

// Activations are [group of 128 columns][token][column]; after them [group][token] units, and per token whether it has
// to be computed exactly.
struct Rounded {
  int64_t tokens, padded, groups;

  Rounded(const sbt::View& weight, int64_t tokens)
      : tokens(tokens), padded(weight.padded_cols()), groups(ceil_div(padded, kGroupCols)) {}
  int64_t bytes() const { return groups * tokens * kGroupCols * 2 + ceil_div((groups + 1) * tokens * 4, 64) * 64; }
  template <class Base>
  auto* columns(Base* base, int64_t group, int64_t token) const {
    using Word = std::conditional_t<std::is_const_v<Base>, const int16_t, int16_t>;
    return static_cast<Word*>(base) + (group * tokens + token) * kGroupCols;
  }
  template <class Base>
  auto* units(Base* base, int64_t group, int64_t token) const {
    using Float = std::conditional_t<std::is_const_v<Base>, const float, float>;
    return reinterpret_cast<Float*>(columns(base, groups, 0)) + group * tokens + token;
  }
};

// Rounds the columns of a group; returns their unit, NaN where they cannot be rounded.
inline float round_group(const void* from, Dtype dtype, int64_t count, int16_t* to) {
  alignas(32) float v[kGroupCols];
  convert(from, dtype, count, kGroupCols, v);
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256i bits = _mm256_setzero_si256();  // of the largest: NaN and infinities are larger than numbers
  for (int64_t i = 0; i < kGroupCols; i += 8)
    bits = _mm256_max_epi32(bits, _mm256_castps_si256(_mm256_and_ps(_mm256_load_ps(v + i), magnitude)));
  alignas(32) uint32_t each[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(each), bits);
  const Unit unit(*std::max_element(each, each + 8), kLargestOf2);
  const __m256 inverse = _mm256_set1_ps(unit.inverse);
  for (int64_t i = 0; i < kGroupCols; i += 16) {
    const auto q = [&](int64_t at) { return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v + at), inverse)); };
    __m256i both = _mm256_setzero_si256();
    if (unit.usable()) both = _mm256_permute4x64_epi64(_mm256_packs_epi32(q(i), q(i + 8)), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), both);
  }
  return unit.unit;
}

inline void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  const Rounded rounded(weight, x.tokens);
  for (int64_t t = first; t < last; ++t) {
    const char* from = static_cast<const char*>(x.data) + t * x.stride * size_of(x.dtype);
    float exact = 0;
    for (int64_t g = 0; g < rounded.groups; ++g) {
      const int64_t col = g * kGroupCols, count = std::min(kGroupCols, weight.cols - col);
      const float unit = round_group(from + col * size_of(x.dtype), x.dtype, count, rounded.columns(to, g, t));
      if (unit != unit) exact = 1;
      *rounded.units(to, g, t) = unit;
    }
    *rounded.units(to, rounded.groups, t) = exact;
  }
}

// The bytes of 16 rows and 16 columns, row r in the lower and row r + 8 in the upper half of rows[r].
inline void expand_step(const uint8_t*& value, const uint8_t* mask, __m256i* rows) {
  __m128i upper[8], lower[8];
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    const uint32_t low = mask[2 * r], high = mask[2 * r + 1];
    const __m128i a = _mm_shuffle_epi8(load8(value), load8(kTables.bytes[low]));
    value += __builtin_popcount(low);
    const __m128i b = _mm_shuffle_epi8(load8(value), load8(kTables.bytes[high]));
    value += __builtin_popcount(high);
    (r < 8 ? lower[r] : upper[r - 8]) = _mm_unpacklo_epi64(a, b);
  }
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r) rows[r] = _mm256_inserti128_si256(_mm256_castsi128_si256(lower[r]), upper[r], 1);
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

// A macro tile's part of a panel.
inline void expand_tile(const sbt::View& weight, int64_t tile, int16_t* to) {
  const auto* value = tile_values<uint8_t>(weight, tile);
  const auto* mask = reinterpret_cast<const uint8_t*>(weight.mask + tile * sbt::kWords);
  prefetch(mask);
  prefetch(mask + 64);
  for (int64_t step = 0; step < sbt::kSteps; ++step, mask += 32) {
    for (int64_t line = 0; line < 2; ++line) prefetch(value + line * 64);
    __m256i v[8];
    expand_step(value, mask, v);
    transpose(v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, to += 32) {
      auto* at = reinterpret_cast<__m256i*>(to);
      _mm256_store_si256(at, _mm256_cvtepi8_epi16(_mm256_castsi256_si128(v[i])));
      _mm256_store_si256(at + 1, _mm256_cvtepi8_epi16(_mm256_extracti128_si256(v[i], 1)));
    }
  }
}

// T tokens times a panel, `pairs` times two columns; sums are [token][row].
template <int T>
__attribute__((noinline)) void block(const int16_t* panel, int64_t pairs, const int16_t* x, const float* units,
                                     const float* scales, float* sums) {
  __m256i sum[2][T];
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) sum[0][t] = sum[1][t] = _mm256_setzero_si256();
  for (int64_t q = 0; q < pairs; ++q, panel += 32, x += 2) {
    const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel));
    const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 16));
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      int32_t two;
      std::memcpy(&two, x + t * kGroupCols, sizeof two);
      const __m256i a = _mm256_set1_epi32(two);
      sum[0][t] = _mm256_add_epi32(sum[0][t], _mm256_madd_epi16(low, a));
      sum[1][t] = _mm256_add_epi32(sum[1][t], _mm256_madd_epi16(high, a));
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256 factor = _mm256_set1_ps(units[t]);
      if (scales) factor = _mm256_mul_ps(factor, _mm256_load_ps(scales + 8 * half));
      float* to = sums + t * sbt::kTileRows + 8 * half;
      _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[half][t]), factor, _mm256_load_ps(to)));
    }
  }
}

// A token that could not be rounded, in float32.
inline void exact(const Product& p, int64_t row_tile, int64_t token) {
  const void* x = static_cast<const char*>(p.given.data) + token * p.given.stride * size_of(p.given.dtype);
  const int64_t tiles = p.weight.col_tiles();
  __m256 sum[sbt::kTileRows];
  for (auto& each : sum) each = _mm256_setzero_ps();
  for (int64_t c = 0; c < tiles; ++c) {
    alignas(32) uint8_t weights[sbt::kTileRows * sbt::kTileCols];  // [step][row][16]
    alignas(32) float a[sbt::kTileCols], scales[sbt::kTileRows];
    const int64_t col = c * sbt::kTileCols;
    Words8::expand(p.weight, row_tile * tiles + c, weights);
    convert(static_cast<const char*>(x) + col * size_of(p.given.dtype), p.given.dtype,
            std::min(p.weight.cols - col, sbt::kTileCols), sbt::kTileCols, a);
    if (p.weight.grouped()) tile_scales(p.weight, row_tile, c, scales);
    for (int64_t r = 0; r < sbt::kTileRows; ++r) {
      __m256 of_tile = _mm256_setzero_ps();
      for (int64_t k = 0; k < sbt::kTileCols; k += 8) {
        const uint8_t* eight = weights + (k / sbt::kStepCols * sbt::kTileRows + r) * sbt::kStepCols + k % 16;
        const __m256 w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(eight)));
        of_tile = _mm256_fmadd_ps(w, _mm256_load_ps(a + k), of_tile);
      }
      const __m256 scale = _mm256_set1_ps(p.weight.grouped() ? scales[r] : 1.0f);
      sum[r] = _mm256_fmadd_ps(of_tile, scale, sum[r]);
    }
  }
  float out[sbt::kTileRows];
  for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = sum8(sum[r]);
  store_rows(p, row_tile, token, out);
}

inline void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  auto* panel = static_cast<int16_t*>(scratch);
  constexpr int64_t kTilePanel = sbt::kTileRows * sbt::kTileCols;
  auto* sums = reinterpret_cast<float*>(panel + kGroupTiles * kTilePanel);
  const Rounded rounded(p.weight, p.tokens);
  const int64_t tiles = p.weight.col_tiles();
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    for (int64_t token = 0; token < p.tokens; token += kPass) {
      const int64_t pass = std::min(p.tokens - token, kPass), some = ceil_div(pass, ceil_div(pass, kBlock));
      std::fill(sums, sums + pass * sbt::kTileRows, 0.0f);
      for (int64_t c = 0; c < tiles; c += kGroupTiles) {
        const int64_t width = std::min(tiles - c, kGroupTiles), g = c / kGroupTiles;
        for (int64_t i = 0; i < width; ++i) expand_tile(p.weight, row_tile * tiles + c + i, panel + i * kTilePanel);
        alignas(32) float scales[sbt::kTileRows];
        if (p.weight.grouped()) tile_scales(p.weight, row_tile, c, scales);
        for (int64_t t = 0; t < pass; t += some) {
          known<1, kBlock>(std::min(some, pass - t), [&](auto count) {
            block<decltype(count)::value>(panel, width * sbt::kTileCols / 2, rounded.columns(p.x, g, token + t),
                                          rounded.units(p.x, g, token + t), p.weight.grouped() ? scales : nullptr,
                                          sums + t * sbt::kTileRows);
          });
        }
      }
      for (int64_t t = 0; t < pass; ++t) store_rows(p, row_tile, token + t, sums + t * sbt::kTileRows);
      for (int64_t t = 0; t < pass; ++t)
        if (*rounded.units(p.x, rounded.groups, token + t) != 0) exact(p, row_tile, token + t);
    }
  }
}

inline bool takes(const Activations& x, const sbt::View& weight) {
  return weight.dtype == Dtype::int8 && x.dtype != Dtype::float32;
}

}  // namespace words

}  // namespace
}  // namespace alphaprune
