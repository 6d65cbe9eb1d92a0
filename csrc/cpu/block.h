// A block of tokens times half of the rows of a row tile, the sums in registers: what the products of several tokens
// with weights as 16-bit numbers on AVX-512 share.
#pragma once

#include "vbmi2.h"

namespace alphaprune {
namespace {

// `Math` as Panel has it, with 8 vectors of weights per step of 16 columns, each two rows, of which a group is half;
// but
//   Value, narrow(mask), whether the words of a tile may be expanded from halves of vectors (values_at), and
//   two<kNarrow>(value, mask, vectors): from two mask words two vectors of weights, where `value` goes on;
//   finish(p, row_tile, token, v): stores the 16 sums of one token.
template <class Math>
struct Block {
  using Element = uint16_t;
  using Vector = typename Math::Vector;
  static constexpr int kGroup = Math::kGroup;
  static constexpr int64_t kTileElements = sbt::kTileRows * sbt::kTileCols;
  static constexpr int64_t kSums = Math::kVectors * Math::kLanes;  // floats per token
  static constexpr int64_t kHalves = 2 * Math::kLanes;             // at last
  static_assert(Math::kVectors == 2 * kGroup && kGroup == 4 && Math::kStep == sbt::kStepCols, "two groups of a step");

  template <int T>
  using Sums = Vector[kGroup][T];

  const Element* x;  // of the first token and the first column
  int64_t x_stride;
  bool fresh, last;  // whether sums begin here; end here
  float *all, *halves;

  Block from(int64_t token) const {
    return {x + token * x_stride, x_stride, fresh, last, all + token * kSums, halves + token * kHalves};
  }

  // group: 0 or 1.
  template <int T>
  __attribute__((always_inline)) inline void begin(int group, Sums<T>& sum) const {
    const float* from = all + group * kGroup * Math::kLanes;
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        sum[g][t] = fresh ? _mm512_setzero_ps() : Math::load(from + t * kSums + g * Math::kLanes);
  }
  template <int T>
  __attribute__((always_inline)) inline void end(int group, const Sums<T>& sum) const {
    if (last) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        Math::store(halves + t * kHalves + group * Math::kLanes,
                    half_fours(half_eights(sum[0][t], sum[1][t]), half_eights(sum[2][t], sum[3][t])));
      return;
    }
    float* to = all + group * kGroup * Math::kLanes;
#pragma GCC unroll 8
    for (int g = 0; g < kGroup; ++g)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) Math::store(to + t * kSums + g * Math::kLanes, sum[g][t]);
  }

  // Adds 16 columns of T tokens from `at` on.
  template <int T>
  __attribute__((always_inline)) static inline void step(const __m512i (&w)[kGroup], const Element* at,
                                                         int64_t x_stride, Sums<T>& sum) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const auto a = Math::activations(at + t * x_stride);
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) sum[g][t] = Math::multiply(w[g], a, sum[g][t]);
    }
  }

  // The outputs of tokens [first, first + tokens) of the product, of a row tile whose sums have ended.
  void finish(const Product& p, int64_t row_tile, int64_t first, int64_t tokens) const {
    for (int64_t t = 0; t < tokens; ++t) {
      const float* of_token = halves + t * kHalves;
      Math::finish(p, row_tile, first + t, sum_halves(Math::load(of_token), Math::load(of_token + Math::kLanes)));
    }
  }
};

}  // namespace
}  // namespace alphaprune
