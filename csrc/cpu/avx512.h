// What the files of AVX-512 with VBMI2 and VNNI share: expansion of mask words, activations as floats and as integers,
// the products of int8 weights and float32, and the store of 16 rows.
#pragma once

#include <immintrin.h>

#include "panel.h"

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

inline float sum8(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// The two halves of a register and its four quarters of int8 as float32.
inline __m512 quarter(__m512i weights, int which) {
  const __m128i bytes = which == 0   ? _mm512_castsi512_si128(weights)
                        : which == 1 ? _mm512_extracti32x4_epi32(weights, 1)
                        : which == 2 ? _mm512_extracti32x4_epi32(weights, 2)
                                     : _mm512_extracti32x4_epi32(weights, 3);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// Activations of 16 bits beside int8 weights are rounded to integers of 16 bits, in units of 1 / 32767 of the largest
// among 128 columns of a token: an error of at most 0.504 units each, and exact sums. An integer is 256 * high + low,
// bytes that multiply weights as they come out of the expansion: two instructions of 64 products, where weights widened
// to 16 bits cost three shuffles on top. Sums of 128 products stay below 128 * 127 * 32768 < 2^30.
constexpr int64_t kGroupCols = sbt::kScaleCols;
constexpr uint32_t kLeastLargest = 0x0d800000;  // 2^-100: below it the unit or its inverse leaves the normal floats

// Rounds the columns of a group from `first` on. Returns the unit; if a number is not finite or all are too small, NaN,
// and the bytes are those of zeros. `kFlip` is 0x80 for the high byte + 128.
template <uint8_t kFlip>
inline float round_group(const void* from, Dtype dtype, int64_t first, int64_t cols, int64_t padded, uint8_t* high,
                         uint8_t* low) {
  constexpr int64_t kVectors = kGroupCols / 16;
  __m512 v[kVectors];
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < kVectors; ++i) {
    v[i] = widen16(from, first + i * 16, cols, dtype);
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7fffffff));
    bits = _mm512_max_epi32(bits, magnitude);
  }
  const auto largest = static_cast<uint32_t>(_mm512_reduce_max_epi32(bits));
  const bool usable = largest == 0 || (largest >= kLeastLargest && largest < 0x7f800000);
  const float inverse = usable && largest ? 32767.0f / bits_to_float(largest) : 0.0f;
  const __m128i flip = _mm_set1_epi8(static_cast<char>(kFlip));
  for (int64_t i = 0; i < kVectors && first + i * 16 < padded; ++i) {
    __m512i q = _mm512_setzero_si512();
    if (usable) q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(inverse)));
    const __m128i h = _mm_xor_si128(_mm512_cvtepi32_epi8(_mm512_srai_epi32(q, 8)), flip);
    _mm_store_si128(reinterpret_cast<__m128i*>(high + i * 16), h);
    _mm_store_si128(reinterpret_cast<__m128i*>(low + i * 16), _mm512_cvtepi32_epi8(q));
  }
  return usable ? bits_to_float(largest) / 32767.0f : bits_to_float(0x7fc00000);
}

inline bool is_nan(float v) { return v != v; }

// Sixteen accumulators, one per row, into y.
inline void store_accumulators(const Product& p, int64_t row_tile, int64_t token, const __m512* sum) {
  alignas(64) float out[sbt::kTileRows];
  for (int64_t r = 0; r < sbt::kTileRows; ++r)
    out[r] = sum8(_mm256_add_ps(_mm512_castps512_ps256(sum[r]), _mm512_extractf32x8_ps(sum[r], 1)));
  store_sums(p, row_tile, token, _mm512_load_ps(out));
}

// One token with int8 weights in float32 from the caller's own activations: what float32 asks for, and the way out for
// tokens that cannot be rounded.
inline void exact_integers(const Product& p, int64_t begin, int64_t end, int64_t token) {
  const int64_t tiles = p.weight.col_tiles(), cols = p.weight.cols;
  const void* x = static_cast<const char*>(p.given.data) + token * p.given.stride * size_of(p.given.dtype);
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    __m512 sum[sbt::kTileRows], scaled[sbt::kTileRows];
    for (int r = 0; r < sbt::kTileRows; ++r) sum[r] = scaled[r] = _mm512_setzero_ps();
    const uint32_t* mask = p.weight.mask + row_tile * tiles * sbt::kWords;
    for (int64_t c = 0; c < tiles; ++c, mask += sbt::kWords) {
      const uint8_t* value = tile_values<uint8_t>(p.weight, row_tile * tiles + c);
      prefetch(mask);
      prefetch(mask + 16);
      for (int64_t s = 0; s < sbt::kSteps; ++s) {
        const __m512 a = widen16(x, c * sbt::kTileCols + s * sbt::kStepCols, cols, p.given.dtype);
        prefetch(value);
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const __m512i w = expand8(value, mask + s * sbt::kPairs + 2 * v);
#pragma GCC unroll 4
          for (int r = 0; r < 4; ++r) sum[4 * v + r] = _mm512_fmadd_ps(quarter(w, r), a, sum[4 * v + r]);
        }
      }
      if (!p.weight.grouped() || (c % 2 == 0 && c + 1 < tiles)) continue;
      alignas(64) float scales[sbt::kTileRows];
      _mm512_store_ps(scales, row_scales(p.weight, row_tile, c));
      for (int r = 0; r < sbt::kTileRows; ++r) {
        scaled[r] = _mm512_fmadd_ps(sum[r], _mm512_set1_ps(scales[r]), scaled[r]);
        sum[r] = _mm512_setzero_ps();
      }
    }
    store_accumulators(p, row_tile, token, p.weight.grouped() ? scaled : sum);
  }
}

}  // namespace
}  // namespace alphaprune
