// The product of int8 weights with activations that were rounded to integers of 16 or of 8 bits, on AVX-512 with VNNI;
// a template over the expansion of mask words, which takes different instructions where there is VBMI2 and where there
// is not.
#pragma once

#include "rounded512.h"

namespace alphaprune {
namespace {

template <class Expanded, int kBytes>
struct Integer {
  using Made = Rounded<kBytes>;
  using There = typename Expanded::There;
  static constexpr int kFew = kBytes == 1 ? 6 : 2;   // tokens that are fused, of which all sums are in registers,
  static constexpr int kTurn = kBytes == 1 ? 6 : 3;  // take turns of so many,
  static constexpr int kTurns = 8;                   // up to so many,
  static constexpr int kBlock = 8 / kBytes;          // and beyond go with two row tiles, so many at a time
  static constexpr int64_t kPass = 128;              // for one expansion
  static constexpr int kVectors = 4;                 // of 4 rows x 4 lanes, all rows of a tile
  static constexpr int64_t kSums = kVectors * 16;    // floats per token
  static constexpr int64_t kPanelBytes = sbt::kTileRows * kGroupCols;  // of a row tile

  template <int T>
  using Sums = __m512i[kVectors][T][kBytes];

  // Weights + 128, straight from the expansion and from a panel.
  template <bool kNarrow>
  struct Fresh {
    explicit Fresh(Expanded& all) : weights(all) { all.apart(); }
    __m512i next(int v) { return _mm512_xor_si512(weights.template next<kNarrow>(v), flip()); }
    Expanded& weights;
  };
  // use(Fresh) of the tile that the weights are at.
  template <class Use>
  __attribute__((always_inline)) static inline void fresh(Expanded& weights, const Use& use) {
    if (weights.narrow()) {
      use(Fresh<true>(weights));
    } else {
      use(Fresh<false>(weights));
    }
  }
  struct Stored {
    __m512i next(int) {
      const __m512i w = _mm512_load_si512(at);
      at += 64;
      return w;
    }
    const uint8_t* at;
  };

  // One macro tile; `x` points to the tokens' bytes of its columns.
  template <int T, class Weights>
  static inline void tile(Weights& weights, const uint8_t* x, Sums<T>& sum) {
    for (int64_t half = 0; half < 2; ++half, x += 2 * sbt::kStepCols) {
#pragma GCC unroll 2
      for (int s = 0; s < 2; ++s) {
        __m512i a[T][kBytes];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
          for (int b = 0; b < kBytes; ++b) {
            const uint8_t* at = x + t * Made::kTokenBytes + b * kGroupCols + s * sbt::kStepCols;
            a[t][b] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(at)));
          }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const __m512i w = weights.next(s * kVectors + v);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
            for (int b = 0; b < kBytes; ++b) sum[v][t][b] = add_products(sum[v][t][b], w, a[t][b]);
        }
      }
    }
  }

  // What the sums of a group begin with.
  template <int T>
  static inline void begin_sums(const Made& rounded, const void* x, int64_t group, int64_t token, Sums<T>& sum) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      __m128i offsets;
      std::memcpy(&offsets, rounded.offsets(x, group, token + t), sizeof offsets);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sum[v][t][kBytes - 1] = _mm512_setzero_si512();
        sum[v][t][0] = _mm512_broadcast_i32x4(offsets);
      }
    }
  }

  // Adds a group's sums to those of the tokens; `scales` of the rows, where the weight has some of this group.
  template <int T>
  static inline void fold(const Sums<T>& sum, const float* units, const sbt::View& weight, int64_t row_tile, int64_t c,
                          float* sums) {
    if (T > 1 && !weight.grouped()) {  // of one token the code for both is the faster one
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512 unit = _mm512_set1_ps(units[t]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* to = sums + t * kSums + v * 16;
          _mm512_store_ps(to, _mm512_fmadd_ps(total<kBytes>(sum[v][t]), unit, _mm512_load_ps(to)));
        }
      }
      return;
    }
    const __m512 scales = weight.grouped() ? row_scales(weight, row_tile, c) : _mm512_set1_ps(1);
    const __m512i row_of_lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m512 scale = _mm512_permutexvar_ps(_mm512_add_epi32(row_of_lane, _mm512_set1_epi32(4 * v)), scales);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        float* to = sums + t * kSums + v * 16;
        const __m512 factor = _mm512_mul_ps(_mm512_set1_ps(units[t]), scale);
        _mm512_store_ps(to, _mm512_fmadd_ps(total<kBytes>(sum[v][t]), factor, _mm512_load_ps(to)));
      }
    }
  }

  // Tokens whose sums are in registers, straight from the expansion.
  template <int T>
  __attribute__((noinline)) static void fused(const Product& p, int64_t begin, int64_t end, void* scratch) {
    const Made rounded(p.weight, p.tokens);
    const int64_t tiles = p.weight.col_tiles();
    typename Expanded::Notes notes;
    Expanded weights(p.weight, begin * tiles, end * tiles, notes);
    auto* sums = static_cast<float*>(scratch);
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      std::memset(sums, 0, T * kSums * sizeof(float));
      for (int64_t c = 0; c < tiles; c += 2) {
        Sums<T> sum;
        begin_sums<T>(rounded, p.x, c / 2, 0, sum);
        for (int64_t i = c; i < tiles && i < c + 2; ++i) {
          weights.start(row_tile * tiles + i);
          const uint8_t* at = rounded.columns(p.x, c / 2, 0) + (i - c) * sbt::kTileCols;
          fresh(weights, [&](auto here) __attribute__((always_inline)) { tile<T>(here, at, sum); });
        }
        fold<T>(sum, rounded.units(p.x, c / 2, 0), p.weight, row_tile, c, sums);
      }
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) store_sums(p, row_tile, t, sum_fours(Vectors<kVectors>(sums + t * kSums).v));
    }
  }

  // The same from a panel of one group, for tokens that take turns: up to where transposing it pays.
  template <int T>
  __attribute__((noinline)) static void turn(const uint8_t* panel, int64_t tiles, const Made& rounded, const Product& p,
                                             int64_t row_tile, int64_t c, int64_t token, float* sums) {
    Sums<T> sum;
    begin_sums<T>(rounded, p.x, c / 2, token, sum);
    Stored stored{panel};
    for (int64_t i = 0; i < tiles; ++i) tile<T>(stored, rounded.columns(p.x, c / 2, token) + i * sbt::kTileCols, sum);
    fold<T>(sum, rounded.units(p.x, c / 2, token), p.weight, row_tile, c, sums);
  }
  static void turns(const Product& p, int64_t begin, int64_t end, void* scratch) {
    const Made rounded(p.weight, p.tokens);
    const int64_t tiles = p.weight.col_tiles(), some = ceil_div(p.tokens, ceil_div(p.tokens, kTurn));
    typename Expanded::Notes notes;
    Expanded weights(p.weight, begin * tiles, end * tiles, notes);
    auto* panel = static_cast<uint8_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(panel + kPanelBytes);
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      std::memset(sums, 0, kTurns * kSums * sizeof(float));
      for (int64_t c = 0; c < tiles; c += 2) {
        const int64_t width = std::min(tiles - c, int64_t{2});
        for (int64_t i = 0; i < width; ++i) {
          weights.start(row_tile * tiles + c + i);
          uint8_t* at = panel + i * kPanelBytes / 2;
          for (int64_t half = 0; half < 2; ++half, at += 8 * 64) {
#pragma GCC unroll 8
            for (int v = 0; v < 8; ++v) _mm512_store_si512(at + v * 64, _mm512_xor_si512(weights.next(v), flip()));
          }
        }
        for (int64_t t = 0; t < p.tokens; t += some) {
          known<1, kTurn>(std::min(some, p.tokens - t), [&](auto count) {
            turn<decltype(count)::value>(panel, width, rounded, p, row_tile, c, t, sums + t * kSums);
          });
        }
      }
      for (int64_t t = 0; t < p.tokens; ++t)
        store_sums(p, row_tile, t, sum_fours(Vectors<kVectors>(sums + t * kSums).v));
    }
  }

  // Many tokens, from a panel of one group of up to two row tiles, [four columns][row tile][row][column]: a load of
  // four columns of a token serves all its rows, and so does a sum.
  // The rows stand in the order that transposing leaves them in, row 4 v + r in lane 4 r + v.
  template <int R>
  static inline void expand(const sbt::View& weight, There* weights, int64_t first, int64_t c, int64_t width,
                            uint8_t* to) {
    const int64_t tiles = weight.col_tiles(), last = weight.row_tiles() - 1;
    constexpr int64_t kFour = R * 64;
    for (int r = 0; r < R; ++r) {
      for (int64_t i = 0; i < width; ++i) {
        const int64_t at_col = c + i;
        weights[r].start((first + r) * tiles + at_col, std::min(first + R + r, last) * tiles + at_col);
        uint8_t* at = to + (i * sbt::kTileCols / 4 * R + r) * 64;
        for (int64_t half = 0; half < 2; ++half, at += 8 * kFour) {
#pragma GCC unroll 2
          for (int s = 0; s < 2; ++s) {
            __m512i w[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) w[v] = _mm512_xor_si512(weights[r].next(s * kVectors + v), flip());
            transpose(w);
#pragma GCC unroll 4
            for (int q = 0; q < kVectors; ++q) _mm512_store_si512(at + (s * kVectors + q) * kFour, w[q]);
          }
        }
      }
    }
  }

  static inline void transpose(__m512i* v) {
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(a, c);
    v[1] = _mm512_unpackhi_epi64(a, c);
    v[2] = _mm512_unpacklo_epi64(b, d);
    v[3] = _mm512_unpackhi_epi64(b, d);
  }

  // A group's panel, `fours` times four columns, times T tokens. Sums are [token][row tile][row]; `scales` of each row
  // tile, or null. Not inlined: among others the loop would not have the registers to itself.
  template <int R, int T>
  __attribute__((noinline)) static void block(const uint8_t* panel, int64_t fours, const Made& rounded, const void* x,
                                              int64_t group, int64_t token, const __m512* scales, float* sums) {
    __m512i sum[R][T][kBytes];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        sum[r][t][kBytes - 1] = _mm512_setzero_si512();
        sum[r][t][0] = _mm512_set1_epi32(*rounded.offset(x, group, token + t));
      }
    const uint8_t* at = rounded.columns(x, group, token);
    for (int64_t q = 0; q < fours; ++q, panel += R * 64, at += 4) {
      __m512i w[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) w[r] = _mm512_load_si512(panel + r * 64);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < kBytes; ++b) {
          int32_t four;
          std::memcpy(&four, at + t * Made::kTokenBytes + b * kGroupCols, sizeof four);
          const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) sum[r][t][b] = add_products(sum[r][t][b], w[r], a);
        }
    }
    const float* units = rounded.units(x, group, token);
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512 unit = _mm512_set1_ps(units[t]), factor = scales ? _mm512_mul_ps(unit, scales[r]) : unit;
        float* to = sums + (t * R + r) * 16;
        _mm512_store_ps(to, _mm512_fmadd_ps(total<kBytes>(sum[r][t]), factor, _mm512_load_ps(to)));
      }
    }
  }

  template <int R>
  static void panel(const Product& p, int64_t first, void* scratch) {
    constexpr int64_t kPanels = R * kPanelBytes, kAll = R * kPass * 16;
    static_assert(kPanels + kAll * sizeof(float) <= kScratchBytes, "panel and sums fit");
    const Made rounded(p.weight, p.tokens);
    const int64_t tiles = p.weight.col_tiles();
    auto* to = static_cast<uint8_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(to + kPanels);
    for (int64_t token = 0; token < p.tokens; token += kPass) {
      const int64_t pass = std::min(p.tokens - token, kPass);
      const int64_t some = ceil_div(pass, ceil_div(pass, kBlock));
      typename There::Notes notes[2];
      const auto of = [&](int r) { return There(p.weight, (first + r) * tiles, (first + r + 1) * tiles, notes[r]); };
      There weights[2] = {of(0), of(R - 1)};  // of one row tile there is no second
      std::memset(sums, 0, kAll * sizeof(float));
      for (int64_t c = 0; c < tiles; c += 2) {
        const int64_t width = std::min(tiles - c, int64_t{2});
        expand<R>(p.weight, weights, first, c, width, to);
        __m512 scales[R];
        for (int r = 0; r < R; ++r)
          if (p.weight.grouped()) scales[r] = turned(row_scales(p.weight, first + r, c));
        for (int64_t t = 0; t < pass; t += some) {
          known<1, kBlock>(std::min(some, pass - t), [&](auto count) {
            block<R, decltype(count)::value>(to, width * sbt::kTileCols / 4, rounded, p.x, c / 2, token + t,
                                             p.weight.grouped() ? scales : nullptr, sums + t * R * 16);
          });
        }
      }
      for (int r = 0; r < R; ++r)
        for (int64_t t = 0; t < pass; ++t)
          store_sums(p, first + r, token + t, turned(_mm512_load_ps(sums + (t * R + r) * 16)));
    }
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    if (begin == end) return;
    if (p.tokens <= kFew) {
      known<1, kFew>(p.tokens, [&](auto count) { fused<decltype(count)::value>(p, begin, end, scratch); });
    } else if (p.tokens <= kTurns) {
      turns(p, begin, end, scratch);
    } else {
      int64_t row_tile = begin;
      for (; row_tile + 1 < end; row_tile += 2) panel<2>(p, row_tile, scratch);
      if (row_tile < end) panel<1>(p, row_tile, scratch);
    }
    exact_tokens<Expanded>(p, begin, end, Made(p.weight, p.tokens));
  }
};
static_assert(kGroupCols == 2 * sbt::kTileCols, "a group is two macro tiles");

// Of either kind, as `rounds` has it.
template <class Expanded>
void integer_product(const Product& p, int64_t begin, int64_t end, void* scratch) {
  if (p.weight.to_bytes) return Integer<Expanded, 1>::product(p, begin, end, scratch);
  Integer<Expanded, 2>::product(p, begin, end, scratch);
}

}  // namespace
}  // namespace alphaprune
