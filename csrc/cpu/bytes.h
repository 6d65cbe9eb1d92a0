// The product of int8 weights on AVX2 with VNNI: activations are rounded to integers of 16 bits, or of 8 where that is
// allowed, and vpdpbusd multiplies four columns of eight rows at a time, four times as many as an FMA of floats does.
// Few tokens are multiplied straight from the registers that the weights are expanded in, 16 columns of two rows; for
// more a panel is made of each 128 columns of a row tile, [four columns][16 rows][4].
#pragma once

#include <algorithm>
#include <cstring>

#include "rounded8.h"

namespace alphaprune {
namespace {

namespace bytes {

inline __m256i flip() { return _mm256_set1_epi8(static_cast<char>(0x80)); }

// sum + the products of four bytes in each lane. By GCC's intrinsic sums are vectors of another type around a loop, see
// rounded512.h.
inline __m256i add_products(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
#if defined(__AVXVNNI__)
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
  return sum;
#else
  return _mm256_dpbusd_avx_epi32(sum, unsigned_bytes, signed_bytes);
#endif
}

template <int kBytes>
inline RoundedGroup round_group(const void* from, Dtype dtype, int64_t first, int64_t cols, int64_t, uint8_t* to) {
  const GroupColumns columns(from, dtype, first, cols, kBytes == 2 ? kLargestOf2 : kLargestOf1);
  __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  for (int64_t i = 0; i < kGroupCols; i += 32, to += 32) {
    __m256i low[2], high[2];
    for (int h = 0; h < 2; ++h) {
      __m256i q[2];
      for (int e = 0; e < 2; ++e) {
        q[e] = columns.eight(i + 16 * h + 8 * e);
        sums[e] = _mm256_add_epi32(sums[e], q[e]);
      }
      const __m256i both = narrow(q[0], q[1]);  // 256 * high + low, both signed
      low[h] = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8);
      high[h] = _mm256_srai_epi16(_mm256_add_epi16(both, _mm256_set1_epi16(128)), 8);
    }
    const auto store = [](uint8_t* at, const __m256i* words) {
      const __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi16(words[0], words[1]), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), all);
    };
    store(to, low);
    if (kBytes == 2) store(to + kGroupCols, high);
  }
  RoundedGroup made = {columns.unit(), {}};
  alignas(32) int32_t lanes[2][8];
  for (int e = 0; e < 2; ++e) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[e]), sums[e]);
    for (int i = 0; i < 8; ++i) made.offsets[2 * e + i / 4] -= 128 * lanes[e][i];
  }
  return made;
}

template <int kBytes>
struct Bytes {
  using Made = Rounded<kBytes>;
  static constexpr int kBlock = 6 / kBytes;  // tokens of which all sums are in registers
  static constexpr int64_t kTilePanel = sbt::kTileRows * sbt::kTileCols;
  static constexpr int kFew = 4 / kBytes;                      // tokens that are fused
  static constexpr int64_t kRowSums = sbt::kTileRows / 2 * 8;  // floats of a token there, four lanes a row

  // The sum of products from those of each byte of the activations.
  static __m256i total(const __m256i* sum) {
    return kBytes == 1 ? sum[0] : _mm256_add_epi32(_mm256_slli_epi32(sum[kBytes - 1], 8), sum[0]);
  }

  static void expand_tile(const sbt::View& weight, int64_t tile, uint8_t* to) {
    Notes notes;
    notes.take(weight, tile);
    for (int64_t s = 0; s < sbt::kSteps; ++s) {
#pragma GCC unroll 2
      for (int eight = 0; eight < 2; ++eight) {
        __m256i w[4];
        prefetch(notes.value(4 * s + 2 * eight));
        two_by_two<4>(notes, 4 * s + 2 * eight, w);
        const __m256i a = _mm256_unpacklo_epi32(w[0], w[1]), b = _mm256_unpackhi_epi32(w[0], w[1]);
        const __m256i c = _mm256_unpacklo_epi32(w[2], w[3]), d = _mm256_unpackhi_epi32(w[2], w[3]);
        const __m256i fours[] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                                 _mm256_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q)
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + 64 * q + 32 * eight), _mm256_xor_si256(fours[q], flip()));
      }
      to += 256;
    }
  }

  static void exact(const Product& p, int64_t row_tile, int64_t token) {
    exact_token<Words8>(p, row_tile, token, convert);
  }

  template <int T>
  __attribute__((noinline)) static void block(const uint8_t* panel, int64_t cols, const Made& rounded, const void* x,
                                              int64_t group, int64_t token, const float* scales, float* sums) {
    const uint8_t* at = rounded.columns(x, group, token);
    __m256i sum[2][T][kBytes];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        sum[half][t][kBytes - 1] = _mm256_setzero_si256();
        sum[half][t][0] = _mm256_set1_epi32(*rounded.offset(x, group, token + t));
      }
    for (int64_t q = 0; q < cols; q += 4, panel += 64, at += 4) {
      const __m256i low = load32(panel), high = load32(panel + 32);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < kBytes; ++b) {
          int32_t four;
          std::memcpy(&four, at + t * Made::kTokenBytes + b * kGroupCols, sizeof four);
          const __m256i a = _mm256_set1_epi32(four);
          sum[0][t][b] = add_products(sum[0][t][b], low, a);
          sum[1][t][b] = add_products(sum[1][t][b], high, a);
        }
    }
    const float* units = rounded.units(x, group, token);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      for (int half = 0; half < 2; ++half)
        fold_rows(total(sum[half][t]), units[t], scales, half, sums + t * sbt::kTileRows);
  }

  // Few tokens. The rows of a tile are gone through in parts, so that the sums of one are in registers: where each
  // four rows of a step begin is known beforehand.
  template <int T>
  struct Fused {
    static constexpr int kSums = T * kBytes;  // of two rows
    static constexpr int kPartRows = kSums <= 1 ? 16 : kSums <= 3 ? 8 : 4;
    static constexpr int kPairs = kPartRows / 2;
    using Sums = __m256i[kPairs][T][kBytes];

    static inline void begin_sums(const Made& rounded, const void* x, int64_t group, Sums& sum) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m128i offsets = load16(rounded.offsets(x, group, t));
#pragma GCC unroll 8
        for (int v = 0; v < kPairs; ++v) {
          sum[v][t][kBytes - 1] = _mm256_setzero_si256();
          sum[v][t][0] = _mm256_broadcastsi128_si256(offsets);
        }
      }
    }

    static inline void fold(const Sums& sum, int part, const float* units, const float* scales, float* sums) {
#pragma GCC unroll 8
      for (int v = 0; v < kPairs; ++v) {
        const float* scale = scales + part * kPartRows + 2 * v;
        const __m256 rows = _mm256_set_m128(_mm_set1_ps(scale[1]), _mm_set1_ps(scale[0]));
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
          float* to = sums + t * kRowSums + (part * kPairs + v) * 8;
          const __m256 factor = _mm256_mul_ps(_mm256_set1_ps(units[t]), rows);
          _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total(sum[v][t])), factor, _mm256_load_ps(to)));
        }
      }
    }

    // A step of a part: `shifted` of its mask bytes; `x` points to the tokens' bytes of its columns.
    static inline void step(const uint8_t* value, const uint16_t* shifted, const uint8_t* x, Sums& sum) {
      __m256i a[T][kBytes];
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < kBytes; ++b)
          a[t][b] = _mm256_broadcastsi128_si256(load16(x + t * Made::kTokenBytes + b * kGroupCols));
#pragma GCC unroll 8
      for (int v = 0; v < kPairs; ++v, shifted += 4) {
        const __m128i even = sixteen(value, shifted), odd = sixteen(value, shifted + 2);
        const __m256i w = _mm256_xor_si256(_mm256_inserti128_si256(_mm256_castsi128_si256(even), odd, 1), flip());
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
          for (int b = 0; b < kBytes; ++b) sum[v][t][b] = add_products(sum[v][t][b], w, a[t][b]);
      }
    }

    static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
      const Made rounded(p.weight, p.tokens);
      const int64_t tiles = p.weight.col_tiles();
      auto* sums = static_cast<float*>(scratch);
      alignas(32) float scales[sbt::kTileRows];
      std::fill(scales, scales + sbt::kTileRows, 1.0f);
      for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
        std::memset(sums, 0, T * kRowSums * sizeof(float));
        for (int64_t c = 0; c < tiles; c += 2) {
          const int64_t width = std::min(tiles - c, int64_t{2}), first = row_tile * tiles + c;
          if (p.weight.grouped()) tile_scales(p.weight, row_tile, c, scales);
          Notes notes[2];
          for (int64_t i = 0; i < width; ++i) notes[i].take(p.weight, first + i);
          const uint8_t* x = rounded.columns(p.x, c / 2, 0);
          const float* units = rounded.units(p.x, c / 2, 0);
          for (int part = 0; part < sbt::kTileRows / kPartRows; ++part) {
            Sums sum;
            begin_sums(rounded, p.x, c / 2, sum);
            for (int64_t i = 0; i < width; ++i)
              for (int64_t s = 0; s < sbt::kSteps; ++s) {
                const int64_t four = 4 * s + part * kPartRows / 4;
                prefetch(notes[i].value(four));
                step(notes[i].value(four), notes[i].mask(four), x + i * sbt::kTileCols + s * sbt::kStepCols, sum);
              }
            fold(sum, part, units, scales, sums);
          }
        }
        for (int t = 0; t < T; ++t) {
          float out[sbt::kTileRows];
          for (int64_t r = 0; r < sbt::kTileRows; ++r) {
            const float* lanes = sums + t * kRowSums + 4 * r;
            out[r] = lanes[0] + lanes[1] + (lanes[2] + lanes[3]);
          }
          store_rows(p, row_tile, t, out);
          if (rounded.exact(p.x, t)) exact(p, row_tile, t);
        }
      }
    }
  };

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    if (p.tokens > kFew) return IntegerPanel<Bytes>::product(p, begin, end, scratch);
    known<1, kFew>(p.tokens, [&](auto tokens) { Fused<decltype(tokens)::value>::product(p, begin, end, scratch); });
  }
};

inline void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (p.weight.to_bytes) return Bytes<1>::product(p, begin, end, scratch);
  Bytes<2>::product(p, begin, end, scratch);
}

inline void prepare(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  prepare_rounded(x, weight, first, last, to, [](auto bytes) { return round_group<decltype(bytes)::value>; });
}

}  // namespace bytes

}  // namespace
}  // namespace alphaprune
