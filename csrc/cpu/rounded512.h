// How AVX-512 rounds the activations of int8 weights to integers, and what its products of them share.
//
// An expansion, Expanded(weight, begin, end, notes), goes once through macro tiles [begin, end); `notes` is its memory.
// After start(tile), for each in order, next<kNarrow>(v) gives the weights of the next two words, 4 rows x 16 columns,
// where v counts from 0 to 7, twice, and is known to the compiler; kNarrow, which may be the faster one, of all words
// of a tile of which narrow() says so. apart() hides from the compiler what both kinds of tiles have alike: it would do
// that before the branch, and keep it in memory.
#pragma once

#include "avx512.h"
#include "rounded.h"

namespace alphaprune {
namespace {

// The two halves of a register and its four quarters of int8 as float32.
inline __m512 quarter(__m512i weights, int which) {
  const __m128i bytes = which == 0   ? _mm512_castsi512_si128(weights)
                        : which == 1 ? _mm512_extracti32x4_epi32(weights, 1)
                        : which == 2 ? _mm512_extracti32x4_epi32(weights, 2)
                                     : _mm512_extracti32x4_epi32(weights, 3);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

// Rounds the columns of a group from `first` on to one byte each, or to two, of which the high ones go kGroupCols on;
// kPlus128: bytes are unsigned then, 128 more.
template <int kBytes, bool kPlus128 = false>
inline RoundedGroup round_group(const void* from, Dtype dtype, int64_t first, int64_t cols, int64_t padded,
                                uint8_t* to) {
  constexpr int64_t kVectors = kGroupCols / 16;
  __m512 v[kVectors];
  __m512i bits = _mm512_setzero_si512();
  for (int64_t i = 0; i < kVectors; ++i) {
    v[i] = widen16(from, first + i * 16, cols, dtype);
    const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(v[i]), _mm512_set1_epi32(0x7fffffff));
    bits = _mm512_max_epi32(bits, magnitude);
  }
  const Unit unit(static_cast<uint32_t>(_mm512_reduce_max_epi32(bits)), kBytes == 2 ? kLargestOf2 : kLargestOf1);
  __m512i sums = _mm512_setzero_si512();
  const auto store = [](uint8_t* at, __m512i q) {
    __m128i bytes = _mm512_cvtepi32_epi8(q);
    if (kPlus128) bytes = _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80)));
    _mm_store_si128(reinterpret_cast<__m128i*>(at), bytes);
  };
  for (int64_t i = 0; i < kVectors && first + i * 16 < padded; ++i, to += 16) {
    __m512i q = _mm512_setzero_si512();
    if (unit.usable()) q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(unit.inverse)));
    sums = _mm512_add_epi32(sums, q);
    store(to, q);
    if (kBytes == 2) store(to + kGroupCols, _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8));
  }
  RoundedGroup made = {unit.unit, {}};
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, sums);
  for (int i = 0; i < 16; ++i) made.offsets[i / 4] -= 128 * lanes[i];
  return made;
}

// Sixteen accumulators, one per row, into y.
inline void store_accumulators(const Product& p, int64_t row_tile, int64_t token, const __m512* sum) {
  store_sums(p, row_tile, token, sum_rows(sum));
}

// One token with int8 weights in float32 from the caller's own activations: what float32 asks for, and the way out for
// tokens that cannot be rounded.
template <class Expanded>
void exact_integers(const Product& p, int64_t begin, int64_t end, int64_t token) {
  const int64_t tiles = p.weight.col_tiles(), cols = p.weight.cols;
  typename Expanded::Notes notes;
  Expanded weights(p.weight, begin * tiles, end * tiles, notes);
  const void* x = static_cast<const char*>(p.given.data) + token * p.given.stride * size_of(p.given.dtype);
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    __m512 sum[sbt::kTileRows], scaled[sbt::kTileRows];
    for (int r = 0; r < sbt::kTileRows; ++r) sum[r] = scaled[r] = _mm512_setzero_ps();
    for (int64_t c = 0; c < tiles; ++c) {
      weights.start(row_tile * tiles + c);
      for (int64_t half = 0; half < 2; ++half) {
#pragma GCC unroll 2
        for (int s = 0; s < 2; ++s) {
          const __m512 a = widen16(x, c * sbt::kTileCols + (2 * half + s) * sbt::kStepCols, cols, p.given.dtype);
#pragma GCC unroll 4
          for (int v = 0; v < 4; ++v) {
            const __m512i w = weights.next(4 * s + v);
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r) sum[4 * v + r] = _mm512_fmadd_ps(quarter(w, r), a, sum[4 * v + r]);
          }
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

// sum + the products of four bytes in each lane. GCC's intrinsic has vectors of 32-bit integers where __m512i has such
// of 64, for which it copies sums around a loop or keeps them in memory: with 24 of them a Zen 5 made 0.7 products a
// cycle instead of 1.75.
inline __m512i add_products(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
#if defined(__AVX512VNNI__)
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
  return sum;
#else
  return _mm512_dpbusd_epi32(sum, unsigned_bytes, signed_bytes);
#endif
}

inline __m512i flip() { return _mm512_set1_epi8(static_cast<char>(0x80)); }

// The sum of products as a float, from those of each byte of the activations.
template <int kBytes>
inline __m512 total(const __m512i* sum) {
  if (kBytes == 1) return _mm512_cvtepi32_ps(sum[0]);
  return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[kBytes - 1], 8), sum[0]));
}

// The tokens that could not be rounded.
template <class Expanded, int kBytes>
void exact_tokens(const Product& p, int64_t begin, int64_t end, const Rounded<kBytes>& rounded) {
  for (int64_t t = 0; t < p.tokens; ++t)
    if (rounded.exact(p.x, t)) exact_integers<Expanded>(p, begin, end, t);
}

// Isa::layout of activations of 8 bits; of 16, and after it of 8 bits, 128 more.
constexpr int kBytesLayout = 3, kSlotsLayout = 4;

template <bool kPlus128 = false>
void prepare_integers(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  prepare_rounded(x, weight, first, last, to, [](auto bytes) { return round_group<decltype(bytes)::value, kPlus128>; });
}

}  // namespace
}  // namespace alphaprune
