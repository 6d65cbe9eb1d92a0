// What the files of AVX-512 share, whatever comes beside BW, DQ and VL: activations as floats, the store of 16 rows.
#pragma once

#include <immintrin.h>

#include "panel.h"

namespace alphaprune {
namespace {

// Asks for what lies `kAhead` bytes on, one cache line per 64 bytes of values at half density: exactly the lines to
// come.
constexpr int64_t kAhead = 4096;
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p) + kAhead, _MM_HINT_T0); }

struct Bfloat16 {
  static __m512 widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
};
struct Float16 {
  static __m512 widen(__m256i v) { return _mm512_cvtph_ps(v); }
};

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

// Elements [at, at + 16) as float32, zeros from `end` on.
inline __m512 widen16(const void* from, int64_t at, int64_t end, Dtype dtype) {
  const __mmask16 mask = first_lanes(end - at);
  if (dtype == Dtype::float32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(from) + at);
  const __m256i v = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(from) + at);
  return dtype == Dtype::bfloat16 ? Bfloat16::widen(v) : Float16::widen(v);
}

// tile_scales in a register; 0 for rows past the last.
inline __m512 row_scales(const sbt::View& weight, int64_t row_tile, int64_t col_tile) {
  const int64_t row = row_tile * sbt::kTileRows;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(weight.groups)));
  const float* first = weight.scale + row * weight.groups + col_tile * sbt::kTileCols / sbt::kScaleCols;
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), first_lanes(weight.rows - row), index, first, 4);
}

// float_to_bfloat16 of 16 numbers.
inline __m256i round_to_bfloat16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i half = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __m512i quiet = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet));
}

// store_rows of 16 sums in a register.
inline void store_sums(const Product& p, int64_t row_tile, int64_t token, __m512 sums) {
  const int64_t row = row_tile * sbt::kTileRows, end = p.weight.rows;
  const __mmask16 mask = first_lanes(end - row);
  if (p.weight.groups == 1) sums = _mm512_mul_ps(sums, widen16(p.weight.scale, row, end, Dtype::float32));
  if (p.bias) sums = _mm512_add_ps(sums, widen16(p.bias, row, end, p.bias_dtype));
  const int64_t at = token * p.y_stride + row;
  if (p.y_dtype == Dtype::float32) return _mm512_mask_storeu_ps(static_cast<float*>(p.y) + at, mask, sums);
  const __m256i halves = p.y_dtype == Dtype::bfloat16
                             ? round_to_bfloat16(sums)
                             : _mm512_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.y) + at, mask, halves);
}

// `Count` vectors as they lie in memory.
template <int kCount>
struct Vectors {
  __m512 v[kCount];
  explicit Vectors(const float* from) {
    for (int i = 0; i < kCount; ++i) v[i] = _mm512_load_ps(from + i * 16);
  }
};

// Two quarters of one vector and two of another.
template <int kControl>
inline __m512 quarters(__m512 a, __m512 b) {
  return _mm512_castsi512_ps(_mm512_shuffle_i32x4(_mm512_castps_si512(a), _mm512_castps_si512(b), kControl));
}

// Two lanes of each row from 4 lanes of each, in 2 vectors of four rows; and all 16 sums from two of these.
inline __m512 half_fours(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
// 16 rows in their order from [row % 4][row / 4], or the other way round.
inline __m512 turned(__m512 rows) {
  return _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), rows);
}
inline __m512 sum_halves(__m512 a, __m512 b) {
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  return turned(_mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), _mm512_castpd_ps(_mm512_unpackhi_pd(c, d))));
}

// The sums of 16 rows from 4 lanes of each, in 4 vectors of four rows.
inline __m512 sum_fours(const __m512* v) { return sum_halves(half_fours(v[0], v[1]), half_fours(v[2], v[3])); }

// 4 lanes of each row from 8 lanes of each, in 2 vectors of two rows.
inline __m512 half_eights(__m512 a, __m512 b) { return _mm512_add_ps(quarters<0x88>(a, b), quarters<0xdd>(a, b)); }

// From 8 lanes of each, in 8 vectors of two rows.
inline __m512 sum_eights(const __m512* pair) {
  __m512 four[4];
  for (int i = 0; i < 4; ++i) four[i] = half_eights(pair[2 * i], pair[2 * i + 1]);
  return sum_fours(four);
}

// From a vector of each.
inline __m512 sum_rows(const __m512* row) {
  __m512 pair[8];
  for (int q = 0; q < 8; ++q)
    pair[q] = _mm512_add_ps(quarters<0x44>(row[2 * q], row[2 * q + 1]), quarters<0xee>(row[2 * q], row[2 * q + 1]));
  return sum_eights(pair);
}

}  // namespace
}  // namespace alphaprune
