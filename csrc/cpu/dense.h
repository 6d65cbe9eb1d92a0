// The product of a few tokens with a dense weight whose rows lie one after the other: each thread reads its rows as one
// stream. The library's product, which is made for many tokens, reads at half of the memory's speed on a Zen 4.
#pragma once

#include "ahead.h"

namespace alphaprune {
namespace {

// `Math` has Element; kStep columns of a vector; vector(p) of that many, unaligned; multiply(w, x, sum). kRows rows are
// read at a time: activations of several tokens do not stay in L1.
template <class Math, int T>
void dense_tokens(const Product& p, int64_t row_tile, int64_t token) {
  using Element = typename Math::Element;
  constexpr int kRows = T <= 2 ? 1 : T <= 4 ? 4 : 2;
  constexpr int kSums = kRows == 1 ? 4 : 1;  // of a row and a token: products of one would wait for each other
  constexpr int64_t kStep = Math::kStep;
  const int64_t cols = p.weight.cols, row = row_tile * sbt::kTileRows, last = p.weight.rows - 1;
  const Element* x[T];
  for (int t = 0; t < T; ++t) x[t] = static_cast<const Element*>(p.x) + (token + t) * p.x_stride;
  __m512 sums[T][sbt::kTileRows];
  for (int64_t first = 0; first < sbt::kTileRows; first += kRows) {
    const Element* w[kRows];  // past the last row that one again, whose sums are not stored
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = row + first + r;
      w[r] = static_cast<const Element*>(p.weight.values) + (at < last ? at : last) * cols;
    }
    __m512 sum[kRows][T][kSums];
    for (auto& of_row : sum)
      for (auto& of_token : of_row)
        for (auto& v : of_token) v = _mm512_setzero_ps();
    const int64_t ahead = kRows == 1 ? kFarBytes / static_cast<int64_t>(sizeof(Element)) : kRows * cols;
    int64_t k = 0;
    for (; k + kSums * kStep <= cols; k += kSums * kStep) {
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        __m512i a[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) a[t] = Math::vector(x[t] + k + i * kStep);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const Element* at = w[r] + k + i * kStep;
          _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T1);
          const __m512i v = Math::vector(at);
#pragma GCC unroll 8
          for (int t = 0; t < T; ++t) sum[r][t][i] = Math::multiply(v, a[t], sum[r][t][i]);
        }
      }
    }
    for (; k < cols; k += kStep) {
      const auto bytes = static_cast<size_t>((cols - k < kStep ? cols - k : kStep)) * sizeof(Element);
      alignas(64) Element some[kStep] = {}, given[kStep] = {};
      for (int r = 0; r < kRows; ++r) {
        std::memcpy(some, w[r] + k, bytes);
        for (int t = 0; t < T; ++t) {
          std::memcpy(given, x[t] + k, bytes);
          sum[r][t][0] = Math::multiply(Math::vector(some), Math::vector(given), sum[r][t][0]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < T; ++t) {
        sums[t][first + r] = sum[r][t][0];
        for (int i = 1; i < kSums; ++i) sums[t][first + r] = _mm512_add_ps(sums[t][first + r], sum[r][t][i]);
      }
  }
  for (int t = 0; t < T; ++t) store_sums(p, row_tile, token + t, sum_rows(sums[t]));
}

template <class Math, int T = 8>
void dense_left(const Product& p, int64_t row_tile, int64_t token) {
  if (p.tokens - token == T) return dense_tokens<Math, T>(p, row_tile, token);
  if constexpr (T > 1) dense_left<Math, T - 1>(p, row_tile, token);
}

// Row tiles [begin, end), eight tokens at a time, for which the rows are then in L2.
template <class Math>
void dense_product(const Product& p, int64_t begin, int64_t end, void*) {
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    int64_t t = 0;
    for (; t + 8 < p.tokens; t += 8) dense_tokens<Math, 8>(p, row_tile, t);
    dense_left<Math>(p, row_tile, t);
  }
}

}  // namespace
}  // namespace alphaprune
