// How AVX2 rounds the activations of int8 weights to integers; and a token that cannot be rounded.
#pragma once

#include <algorithm>

#include "expand8.h"
#include "rounded.h"

namespace alphaprune {
namespace {

// The columns of a group from `first` on, zeros past the last, and what they are rounded by.
class GroupColumns {
 public:
  GroupColumns(const void* from, Dtype dtype, int64_t first, int64_t cols, float most) {
    const char* at = static_cast<const char*>(from) + first * size_of(dtype);
    convert(at, dtype, std::min(kGroupCols, cols - first), kGroupCols, v_);
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256i bits = _mm256_setzero_si256();  // of the largest: NaN and infinities are larger than numbers
    for (int64_t i = 0; i < kGroupCols; i += 8)
      bits = _mm256_max_epi32(bits, _mm256_castps_si256(_mm256_and_ps(_mm256_load_ps(v_ + i), magnitude)));
    alignas(32) uint32_t each[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(each), bits);
    const Unit by(*std::max_element(each, each + 8), most);
    unit_ = by.unit;
    inverse_ = by.inverse;
    usable_ = by.usable();
  }

  float unit() const { return unit_; }
  // Eight integers from column `at` of the group on; zeros where it cannot be rounded.
  __m256i eight(int64_t at) const {
    if (!usable_) return _mm256_setzero_si256();
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(v_ + at), _mm256_set1_ps(inverse_)));
  }

 private:
  alignas(32) float v_[kGroupCols];
  float unit_, inverse_;
  bool usable_;
};

// Sixteen integers of 16 bits in their order.
inline __m256i narrow(__m256i low, __m256i high) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
}

// A token that could not be rounded, in float32.
inline void exact_token(const Product& p, int64_t row_tile, int64_t token) {
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

constexpr int64_t kPanelPass = 128;  // tokens that a panel is made for

// The product with many tokens by panels of one group. `Way` has
//   Made: the layout of its activations; kBlock: tokens at once; kTilePanel: bytes of a macro tile's part of a panel;
//   expand_tile(view, tile, panel);
//   block<T>(panel, columns, layout, x, group, token, scales, sums): T tokens times a panel, sums [token][row].
template <class Way>
struct IntegerPanel {
  static constexpr int64_t kGroupTiles = kGroupCols / sbt::kTileCols, kPass = kPanelPass;
  static constexpr int64_t kPanelBytes = kGroupTiles * Way::kTilePanel;
  static_assert(kPanelBytes + kPass * sbt::kTileRows * sizeof(float) <= kScratchBytes, "panel and sums fit");

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* panel = static_cast<uint8_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(panel + kPanelBytes);
    const typename Way::Made rounded(p.weight, p.tokens);
    const int64_t tiles = p.weight.col_tiles();
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      for (int64_t token = 0; token < p.tokens; token += kPass) {
        const int64_t pass = std::min(p.tokens - token, kPass), some = ceil_div(pass, ceil_div(pass, Way::kBlock));
        std::fill(sums, sums + pass * sbt::kTileRows, 0.0f);
        for (int64_t c = 0; c < tiles; c += kGroupTiles) {
          const int64_t width = std::min(tiles - c, kGroupTiles);
          for (int64_t i = 0; i < width; ++i)
            Way::expand_tile(p.weight, row_tile * tiles + c + i, panel + i * Way::kTilePanel);
          alignas(32) float scales[sbt::kTileRows];
          if (p.weight.grouped()) tile_scales(p.weight, row_tile, c, scales);
          for (int64_t t = 0; t < pass; t += some) {
            known<1, Way::kBlock>(std::min(some, pass - t), [&](auto count) {
              Way::template block<decltype(count)::value>(panel, width * sbt::kTileCols, rounded, p.x, c / kGroupTiles,
                                                          token + t, p.weight.grouped() ? scales : nullptr,
                                                          sums + t * sbt::kTileRows);
            });
          }
        }
        for (int64_t t = 0; t < pass; ++t) store_rows(p, row_tile, token + t, sums + t * sbt::kTileRows);
        for (int64_t t = 0; t < pass; ++t)
          if (rounded.exact(p.x, token + t)) exact_token(p, row_tile, token + t);
      }
    }
  }
};

}  // namespace
}  // namespace alphaprune
