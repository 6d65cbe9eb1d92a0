// The product with a dense weight of 16-bit floats in float32, for CPUs whose libraries have no fast one.
#pragma once

#include <algorithm>
#include <cstring>

#include "panel.h"

namespace alphaprune {
namespace {

constexpr int64_t kFarColumns = 2048;  // asked for ahead, where a row is one stream

// A Math of Panel with weights that come from rows [N, K] of 16 bits: Value::load(p) widens kStep of them. A tile is
// 16 rows x 64 columns, numbered as macro tiles are.
template <class Math, class Value>
struct FromRows : Math {
  static constexpr int64_t kStepElements = sbt::kTileRows * Math::kStep;
  static constexpr int64_t kAheadColumns = 512;  // of the same row: each is a stream of its own

  static void expand(const sbt::View& weight, int64_t tile, float* panel) {
    const int64_t tiles = weight.col_tiles(), row = tile / tiles * sbt::kTileRows, col = tile % tiles * sbt::kTileCols;
    const int64_t left = weight.cols - col;
    for (int64_t r = 0; r < sbt::kTileRows; ++r) {
      const bool inside = row + r < weight.rows;
      const auto* from = static_cast<const uint16_t*>(weight.values) + (inside ? (row + r) * weight.cols + col : 0);
      float* to = panel + r * Math::kStep;
      if (inside && left >= sbt::kTileCols) {
        __builtin_prefetch(from + kAheadColumns);
        __builtin_prefetch(from + kAheadColumns + 32);
#pragma GCC unroll 8
        for (int64_t k = 0; k < sbt::kTileCols; k += Math::kStep)
          Math::store(to + k / Math::kStep * kStepElements, Value::load(from + k));
        continue;
      }
      for (int64_t k = 0; k < sbt::kTileCols; k += Math::kStep) {
        uint16_t some[Math::kStep] = {};
        const int64_t here = inside ? left - k : 0;
        if (here > 0) std::memcpy(some, from + k, static_cast<size_t>(here < Math::kStep ? here : Math::kStep) * 2);
        Math::store(to + k / Math::kStep * kStepElements, Value::load(some));
      }
    }
  }
};

// T tokens straight from the rows, each of which is a stream then. From three on the activations no longer stay in L1:
// two rows at a time share what is loaded of them, where 32 registers hold the sums.
template <class Math, class Value, int T>
void row_streams(const Product& p, int64_t begin, int64_t end, void* scratch) {
  using Vector = typename Math::Vector;
  constexpr int64_t kStep = Math::kStep, kSums = sbt::kTileRows * Math::kLanes;
  constexpr int kRows = T <= 2 || Math::kLanes < 16 ? 1 : 2;
  constexpr int kChains = kRows == 1 ? 4 : 2;  // products of one sum would wait for each other
  const int64_t cols = p.weight.cols, last = p.weight.rows - 1;
  auto* sums = static_cast<float*>(scratch);
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    for (int64_t r = 0; r < sbt::kTileRows; r += kRows) {
      const uint16_t* from[kRows];  // past the last row that one again, whose sums are not stored
      for (int i = 0; i < kRows; ++i)
        from[i] =
            static_cast<const uint16_t*>(p.weight.values) + std::min(row_tile * sbt::kTileRows + r + i, last) * cols;
      Vector sum[kChains][kRows][T] = {};
      const auto add = [&](const uint16_t* const* at, int64_t k, int chain) {
        Vector w[kRows];
        for (int i = 0; i < kRows; ++i) w[i] = Value::load(at[i]);
        for (int t = 0; t < T; ++t) {
          const Vector x = Math::activations(p.rows() + t * p.x_stride + k);
          for (int i = 0; i < kRows; ++i) sum[chain][i][t] = Math::multiply(w[i], x, sum[chain][i][t]);
        }
      };
      int64_t k = 0;
      for (; k + kChains * kStep <= cols; k += kChains * kStep) {
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) {
          const uint16_t* at[kRows];
          for (int i = 0; i < kRows; ++i) at[i] = from[i] + k + c * kStep;
          if (c * kStep % 32 == 0)
            for (int i = 0; i < kRows; ++i) __builtin_prefetch(at[i] + kFarColumns);
          add(at, k + c * kStep, c);
        }
      }
      for (; k < cols; k += kStep) {
        uint16_t some[kRows][kStep] = {};
        const uint16_t* at[kRows];
        for (int i = 0; i < kRows; ++i) {
          std::memcpy(some[i], from[i] + k, static_cast<size_t>(std::min(cols - k, kStep)) * sizeof(uint16_t));
          at[i] = some[i];
        }
        add(at, k, 0);
      }
      for (int i = 0; i < kRows; ++i)
        for (int t = 0; t < T; ++t) {
          Vector all = sum[0][i][t];
          for (int c = 1; c < kChains; ++c) all = all + sum[c][i][t];
          Math::store(sums + t * kSums + (r + i) * Math::kLanes, all);
        }
    }
    for (int t = 0; t < T; ++t) Math::finish(p, row_tile, t, sums + t * kSums);
  }
}

// Isa::dense through Math, by what widens bfloat16 and float16.
template <class Math, class OfBfloat16, class OfFloat16>
void dense_floats(const Product& p, int64_t begin, int64_t end, void* scratch) {
  const auto product = [&](auto value) {
    using Value = decltype(value);
    if (p.tokens > 4) return Panel<FromRows<Math, Value>>::product(p, begin, end, scratch);
    known<1, 4>(p.tokens,
                [&](auto tokens) { row_streams<Math, Value, decltype(tokens)::value>(p, begin, end, scratch); });
  };
  if (p.weight.dtype == Dtype::bfloat16) return product(OfBfloat16());
  product(OfFloat16());
}

inline DenseRows dense_as_floats(Dtype dtype) {
  return dtype == Dtype::bfloat16 || dtype == Dtype::float16 ? DenseRows::floats : DenseRows::none;
}

}  // namespace
}  // namespace alphaprune
