// The product of int8 weights with activations of 16 bits that were rounded to integers, on AVX-512 with VNNI; a
// template over the expansion of mask words, which takes different instructions where there is VBMI2 and where there is
// not.
//
// An expansion, Expanded(weight, begin, end, notes), goes once through macro tiles [begin, end); `notes` is its memory.
// After start(tile), for each in order, next(v) gives the weights of the next two words, 4 rows x 16 columns, where v
// counts from 0 to 7, twice, and is known to the compiler.
#pragma once

#include "avx512.h"

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

// Activations of 16 bits beside int8 weights are rounded to integers of 16 bits, in units of 1 / 32767 of the largest
// among 128 columns of a token: an error of at most 0.504 units each, and exact sums. An integer is 256 * high + low,
// bytes that multiply weights as they come out of the expansion: two instructions of 64 products, where weights widened
// to 16 bits cost three shuffles on top. Sums of 128 products stay below 128 * 127 * 32768 < 2^30.
// vpdpbusd wants one side unsigned. The low bytes are; for the high ones, a few tokens add 128 to the weights, zeros
// among them, and begin with -128 * sum(high bytes), which is of x alone; many tokens carry + 128 themselves and take
// 128 * sum(weights), a third product that all of them share, off again. Both in each lane, where sums are exact.
constexpr int64_t kGroupCols = sbt::kScaleCols;
constexpr uint32_t kLeastLargest = 0x0d800000;  // 2^-100: below it the unit or its inverse leaves the normal floats

struct RoundedGroup {
  float unit;          // NaN where a number is not finite or all are too small; the bytes are then those of zeros
  int32_t offsets[4];  // -128 * sum(high bytes), of each four columns of 16: of a lane of the product
};

// Rounds the columns of a group from `first` on. `kFlip` is 0x80 for the high byte + 128.
template <uint8_t kFlip>
inline RoundedGroup round_group(const void* from, Dtype dtype, int64_t first, int64_t cols, int64_t padded,
                                uint8_t* high, uint8_t* low) {
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
  __m512i highs = _mm512_setzero_si512();
  for (int64_t i = 0; i < kVectors && first + i * 16 < padded; ++i) {
    __m512i q = _mm512_setzero_si512();
    if (usable) q = _mm512_cvtps_epi32(_mm512_mul_ps(v[i], _mm512_set1_ps(inverse)));
    const __m512i h = _mm512_srai_epi32(q, 8);
    highs = _mm512_add_epi32(highs, h);
    _mm_store_si128(reinterpret_cast<__m128i*>(high + i * 16), _mm_xor_si128(_mm512_cvtepi32_epi8(h), flip));
    _mm_store_si128(reinterpret_cast<__m128i*>(low + i * 16), _mm512_cvtepi32_epi8(q));
  }
  RoundedGroup made = {usable ? bits_to_float(largest) / 32767.0f : bits_to_float(0x7fc00000), {}};
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, highs);
  for (int i = 0; i < 16; ++i) made.offsets[i / 4] -= 128 * lanes[i];
  return made;
}

inline bool is_nan(float v) { return v != v; }

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

// Rounded activations, [group of 128 columns][token][high bytes + 128, low bytes]: what a panel meets lies together.
// After them [group][token] units, per token whether it must be computed exactly, and [group][token] four offsets.
struct Rounded {
  static constexpr int64_t kTokenBytes = 2 * kGroupCols;

  Rounded(const sbt::View& weight, int64_t tokens)
      : tokens(tokens), padded(weight.padded_cols()), groups(ceil_div(padded, kGroupCols)) {}

  int64_t bytes() const { return groups * tokens * kTokenBytes + ceil_div((5 * groups + 1) * tokens * 4, 64) * 64; }
  const uint8_t* high(const void* base, int64_t group, int64_t token) const {
    return static_cast<const uint8_t*>(base) + (group * tokens + token) * kTokenBytes;
  }
  const float* units(const void* base, int64_t group, int64_t token) const {
    return reinterpret_cast<const float*>(high(base, groups, 0)) + group * tokens + token;
  }
  bool exact(const void* base, int64_t token) const { return *units(base, groups, token) != 0; }
  const float* offsets(const void* base, int64_t group, int64_t token) const {
    return units(base, groups + 1, 0) + (group * tokens + token) * 4;
  }

  void prepare(const Activations& x, int64_t cols, int64_t token, void* base) const {
    const char* from = static_cast<const char*>(x.data) + token * x.stride * size_of(x.dtype);
    float exact = 0;
    for (int64_t g = 0; g < groups; ++g) {
      auto* high_bytes = const_cast<uint8_t*>(high(base, g, token));
      auto* unit = const_cast<float*>(units(base, g, token));
      const RoundedGroup made =
          round_group<0x80>(from, x.dtype, g * kGroupCols, cols, padded, high_bytes, high_bytes + kGroupCols);
      std::memcpy(const_cast<float*>(offsets(base, g, token)), made.offsets, sizeof made.offsets);
      *unit = made.unit;
      if (!is_nan(*unit)) continue;
      *unit = 0;
      exact = 1;
    }
    *const_cast<float*>(units(base, groups, token)) = exact;
  }

  int64_t tokens, padded, groups;
};

// int8 weights and rounded activations, a group of 128 columns at a time. A vector of weights is 4 rows x 16 columns,
// so an accumulator has 4 lanes per row, and all 16 rows are 4 accumulators.
template <class Expanded>
struct Integer {
  static constexpr int kVectors = 4;
  static constexpr int64_t kSums = kVectors * 16;                      // floats per token
  static constexpr int64_t kGroupBytes = sbt::kTileRows * kGroupCols;  // of the panel

  // Expanded weights from a panel.
  struct Stored {
    __m512i next(int64_t) {
      const __m512i w = _mm512_load_si512(at);
      at += 64;
      return w;
    }
    const uint8_t* at;
  };

  template <int T>
  struct Accumulators {
    __m512i high[kVectors][T], low[kVectors][T];
  };

  static __m512i offset(__m512i sum, __m512i w) { return _mm512_dpbusd_epi32(sum, flip(), w); }
  static __m512i flip() { return _mm512_set1_epi8(static_cast<char>(0x80)); }

  // One macro tile; `x` points to the tokens' high bytes of its columns.
  template <int T, class Weights>
  static inline void tile(Weights& weights, const uint8_t* x, Accumulators<T>& sum) {
    constexpr bool kSigned = !std::is_same_v<Weights, Stored>;  // of a few tokens, whose high bytes are taken signed
    for (int64_t half = 0; half < 2; ++half, x += 2 * sbt::kStepCols) {
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        __m512i h[T], l[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          const uint8_t* at = x + t * Rounded::kTokenBytes + s * sbt::kStepCols;
          h[t] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
          if (kSigned) h[t] = _mm512_xor_si512(h[t], flip());
          l[t] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(at + kGroupCols)));
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const __m512i w = weights.next(s * kVectors + v);
          const __m512i above = kSigned ? _mm512_xor_si512(w, flip()) : w;
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) {
            sum.high[v][t] = kSigned ? _mm512_dpbusd_epi32(sum.high[v][t], above, h[t])
                                     : _mm512_dpbusd_epi32(sum.high[v][t], h[t], w);
            sum.low[v][t] = _mm512_dpbusd_epi32(sum.low[v][t], l[t], w);
          }
        }
      }
    }
  }

  // Adds a group's sums to those of the tokens; `scales` of the rows or null.
  template <int T>
  static inline void fold(const Accumulators<T>& sum, const float* units, const __m512* scales, float* sums) {
    const __m512i row_of_lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      __m512 scale = _mm512_set1_ps(1);
      if (scales) scale = _mm512_permutexvar_ps(_mm512_add_epi32(row_of_lane, _mm512_set1_epi32(4 * v)), *scales);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const __m512i high = _mm512_slli_epi32(sum.high[v][t], 8);
        const __m512 total = _mm512_cvtepi32_ps(_mm512_add_epi32(high, sum.low[v][t]));
        const __m512 unit = _mm512_set1_ps(units[t]);
        float* to = sums + t * kSums + v * 16;
        const __m512 factor = scales ? _mm512_mul_ps(unit, scale) : unit;
        _mm512_store_ps(to, _mm512_fmadd_ps(total, factor, _mm512_load_ps(to)));
      }
    }
  }

  template <int T>
  static inline void clear(Accumulators<T>& sum) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum.high[v][t] = sum.low[v][t] = _mm512_setzero_si512();
  }

  // A few tokens straight from the expansion.
  template <int T>
  static void fused(const Product& p, int64_t begin, int64_t end, void* scratch) {
    const Rounded rounded(p.weight, p.tokens);
    const int64_t tiles = p.weight.col_tiles();
    typename Expanded::Notes notes;
    Expanded weights(p.weight, begin * tiles, end * tiles, notes);
    auto* sums = static_cast<float*>(scratch);
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      std::memset(sums, 0, T * kSums * sizeof(float));
      for (int64_t c = 0; c < tiles; c += 2) {
        Accumulators<T> sum;
        clear(sum);
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
          __m128i offsets;
          std::memcpy(&offsets, rounded.offsets(p.x, c / 2, t), sizeof offsets);
          const __m512i first = _mm512_broadcast_i32x4(offsets);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum.high[v][t] = first;
        }
        for (int64_t i = c; i < tiles && i < c + 2; ++i) {
          weights.start(row_tile * tiles + i);
          tile<T>(weights, rounded.high(p.x, c / 2, 0) + (i - c) * sbt::kTileCols, sum);
        }
        const __m512 scales = p.weight.grouped() ? row_scales(p.weight, row_tile, c) : _mm512_setzero_ps();
        fold<T>(sum, rounded.units(p.x, c / 2, 0), p.weight.grouped() ? &scales : nullptr, sums);
      }
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) store_sums(p, row_tile, t, sum_fours(Vectors<kVectors>(sums + t * kSums).v));
    }
  }

  template <int T>
  static void block(const uint8_t* panel, const __m512i* offsets, int64_t tiles, const Rounded& rounded, const void* x,
                    int64_t token, int64_t col_tile, const __m512* scales, float* sums) {
    Accumulators<T> sum;
    clear(sum);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 4
      for (auto& high : sum.high[v]) high = offsets[v];
    Stored weights{panel};
    for (int64_t i = 0; i < tiles; ++i)
      tile<T>(weights, rounded.high(x, col_tile / 2, token) + i * sbt::kTileCols, sum);
    fold<T>(sum, rounded.units(x, col_tile / 2, token), scales, sums);
  }

  // Many tokens, from a panel of one group.
  static void panel(const Product& p, int64_t begin, int64_t end, void* scratch) {
    static_assert(kGroupBytes + kTokensPerPass * kSums * 4 <= kScratchBytes, "panel and sums fit");
    const Rounded rounded(p.weight, p.tokens);
    const int64_t tiles = p.weight.col_tiles();
    typename Expanded::Notes notes;
    auto* to = static_cast<uint8_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(to + kGroupBytes);
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      for (int64_t token = 0; token < p.tokens; token += kTokensPerPass) {
        const int64_t pass = p.tokens - token < kTokensPerPass ? p.tokens - token : kTokensPerPass;
        Expanded weights(p.weight, row_tile * tiles, (row_tile + 1) * tiles, notes);
        std::memset(sums, 0, static_cast<size_t>(pass * kSums) * sizeof(float));
        for (int64_t c = 0; c < tiles; c += 2) {
          const int64_t width = tiles - c < 2 ? 1 : 2;
          __m512i offsets[kVectors];
#pragma GCC unroll 4
          for (auto& v : offsets) v = _mm512_setzero_si512();
          for (int64_t i = 0; i < width; ++i) {
            weights.start(row_tile * tiles + c + i);
            uint8_t* at = to + i * sbt::kWords * 32;
            for (int64_t half = 0; half < 2; ++half, at += 8 * 64) {
#pragma GCC unroll 8
              for (int v = 0; v < 8; ++v) {
                const __m512i w = weights.next(v);
                offsets[v % kVectors] = offset(offsets[v % kVectors], w);
                _mm512_store_si512(at + v * 64, w);
              }
            }
          }
#pragma GCC unroll 4
          for (auto& v : offsets) v = _mm512_sub_epi32(_mm512_setzero_si512(), v);
          const __m512 scales = p.weight.grouped() ? row_scales(p.weight, row_tile, c) : _mm512_setzero_ps();
          const __m512* factor = p.weight.grouped() ? &scales : nullptr;
          int64_t t = 0;
          for (; t + 3 <= pass; t += 3)
            block<3>(to, offsets, width, rounded, p.x, token + t, c, factor, sums + t * kSums);
          if (t + 2 == pass) block<2>(to, offsets, width, rounded, p.x, token + t, c, factor, sums + t * kSums);
          if (t + 1 == pass) block<1>(to, offsets, width, rounded, p.x, token + t, c, factor, sums + t * kSums);
        }
        for (int64_t t = 0; t < pass; ++t)
          store_sums(p, row_tile, token + t, sum_fours(Vectors<kVectors>(sums + t * kSums).v));
      }
    }
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    if (begin == end) return;
    if (p.tokens == 1) {
      fused<1>(p, begin, end, scratch);
    } else if (p.tokens == 2) {
      fused<2>(p, begin, end, scratch);
    } else {
      panel(p, begin, end, scratch);
    }
    const Rounded rounded(p.weight, p.tokens);
    for (int64_t t = 0; t < p.tokens; ++t)
      if (rounded.exact(p.x, t)) exact_integers<Expanded>(p, begin, end, t);
  }
};
static_assert(kGroupCols == 2 * sbt::kTileCols, "a group is two macro tiles");

// Whether the product is taken from rounded activations.
inline bool rounds(const Activations& x, const sbt::View& weight) {
  return weight.dtype == Dtype::int8 && x.dtype != Dtype::float32;
}

}  // namespace
}  // namespace alphaprune
