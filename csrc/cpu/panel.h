// The product of one ISA as a template: expand a few macro tiles into a panel that stays in L1, multiply it with every
// token from there, go on. The weights are decoded once for all tokens.
//
// Each accumulator lane sees its products in the order of k whatever the number of tokens, threads or the panel width,
// so a row of y has the same bits in every batch.
#pragma once

#include "convert.h"
#include "kernel.h"

namespace alphaprune {
namespace {

// `Math` describes one vector width and one kind of multiplication:
//   Vector, load, store of accumulators;
//   kLanes float lanes per accumulator, kVectors vectors of weights per step, kStep columns per step,
//   kPanelTiles macro tiles per panel, kBlock tokens that fit the registers beside kGroup vectors of weights;
//   weights(p), activations(p), multiply(w, x, sum) -> sum;
//   expand(values, mask, panel) -> values past the macro tile;
//   rows(accumulators, out): the 16 sums of one token.
template <class Math>
struct Panel {
  using Element = float;
  static constexpr int64_t kTileElements = sbt::kTileRows * sbt::kTileCols;
  static constexpr int64_t kPanelBytes = Math::kPanelTiles * kTileElements * static_cast<int64_t>(sizeof(Element));
  static constexpr int64_t kSums = Math::kVectors * Math::kLanes;  // floats per token
  static constexpr int64_t kStepElements = sbt::kTileRows * Math::kStep;

  static_assert(kPanelBytes + kTokensPerPass * kSums * static_cast<int64_t>(sizeof(float)) <= kScratchBytes,
                "panel and sums fit the scratch");

  template <int T>
  static void block(const Element* panel, int64_t steps, const Element* x, int64_t x_stride, float* sums) {
    for (int64_t first = 0; first < Math::kVectors; first += Math::kGroup) {
      typename Math::Vector sum[Math::kGroup][T];
      for (int g = 0; g < Math::kGroup; ++g)
        for (int t = 0; t < T; ++t) sum[g][t] = Math::load(sums + t * kSums + (first + g) * Math::kLanes);
      const Element* w = panel + first * (kStepElements / Math::kVectors);
      for (int64_t s = 0; s < steps; ++s, w += kStepElements) {
        for (int t = 0; t < T; ++t) {
          const auto a = Math::activations(x + t * x_stride + s * Math::kStep);
          for (int g = 0; g < Math::kGroup; ++g)
            sum[g][t] = Math::multiply(Math::weights(w + g * (kStepElements / Math::kVectors)), a, sum[g][t]);
        }
      }
      for (int g = 0; g < Math::kGroup; ++g)
        for (int t = 0; t < T; ++t) Math::store(sums + t * kSums + (first + g) * Math::kLanes, sum[g][t]);
    }
  }

  static void blocks(const Element* panel, int64_t steps, const Element* x, int64_t x_stride, int64_t tokens,
                     float* sums) {
    const int64_t count = ceil_div(tokens, Math::kBlock);
    for (int64_t b = 0, t = 0; b < count; ++b) {
      const int64_t width = (tokens - t) / (count - b);  // spread evenly: 16 as 5 + 5 + 6, never 6 + 6 + 4
      const Element* xs = x + t * x_stride;
      float* s = sums + t * kSums;
      switch (width) {
        case 1:
          block<1>(panel, steps, xs, x_stride, s);
          break;
        case 2:
          block<2>(panel, steps, xs, x_stride, s);
          break;
        case 3:
          block<3>(panel, steps, xs, x_stride, s);
          break;
        case 4:
          block < Math::kBlock<4 ? 1 : 4>(panel, steps, xs, x_stride, s);
          break;
        case 5:
          block < Math::kBlock<5 ? 1 : 5>(panel, steps, xs, x_stride, s);
          break;
        default:
          block < Math::kBlock<6 ? 1 : 6>(panel, steps, xs, x_stride, s);
          break;
      }
      t += width;
    }
  }

  static void finish(const Product& p, int64_t row_tile, int64_t token, const float* sums) {
    alignas(64) float out[sbt::kTileRows];
    Math::rows(sums, out);
    const int64_t row = row_tile * sbt::kTileRows;
    const int64_t left = p.weight.rows - row;
    const int64_t count = left < sbt::kTileRows ? left : sbt::kTileRows;
    if (p.bias)
      for (int64_t i = 0; i < count; ++i) out[i] += load_float(p.bias, row + i, p.bias_dtype);
    for (int64_t i = 0; i < count; ++i) store_float(p.y, token * p.y_stride + row + i, p.y_dtype, out[i]);
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* panel = static_cast<Element*>(scratch);
    auto* sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + kPanelBytes);
    const int64_t tiles = p.weight.col_tiles();
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      for (int64_t token = 0; token < p.tokens; token += kTokensPerPass) {
        const int64_t left = p.tokens - token;
        const int64_t pass = left < kTokensPerPass ? left : kTokensPerPass;
        for (int64_t i = 0; i < pass * kSums; ++i) sums[i] = 0;
        for (int64_t first = 0; first < tiles; first += Math::kPanelTiles) {
          const int64_t rest = tiles - first;
          const int64_t width = rest < Math::kPanelTiles ? rest : Math::kPanelTiles;
          for (int64_t c = 0; c < width; ++c)
            Math::expand(p.weight, row_tile * tiles + first + c, panel + c * kTileElements);
          blocks(panel, width * (sbt::kTileCols / Math::kStep), p.x + token * p.x_stride + first * sbt::kTileCols,
                 p.x_stride, pass, sums);
        }
        for (int64_t t = 0; t < pass; ++t) finish(p, row_tile, token + t, sums + t * kSums);
      }
    }
  }
};

// Dense rows from tiles through Words::expand(view, tile, T* tile_values), which writes [step][pair][2][16].
template <class T, class Words>
void expand_rows(const sbt::View& weight, int64_t begin, int64_t end, T* out) {
  alignas(64) T tile[sbt::kTileRows * sbt::kTileCols];
  const int64_t tiles = weight.col_tiles();
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    const int64_t rows_left = weight.rows - row_tile * sbt::kTileRows;
    const int64_t rows = rows_left < sbt::kTileRows ? rows_left : sbt::kTileRows;
    T* to = out + (row_tile - begin) * sbt::kTileRows * weight.cols;
    for (int64_t c = 0; c < tiles; ++c) {
      Words::expand(weight, row_tile * tiles + c, tile);
      const int64_t cols_left = weight.cols - c * sbt::kTileCols;
      for (int64_t step = 0; step < sbt::kSteps; ++step) {
        const int64_t here = cols_left - step * sbt::kStepCols;
        if (here <= 0) break;
        const T* from = tile + step * sbt::kTileRows * sbt::kStepCols;
        T* at = to + c * sbt::kTileCols + step * sbt::kStepCols;
        if (here >= sbt::kStepCols) {
          for (int64_t r = 0; r < rows; ++r)
            std::memcpy(at + r * weight.cols, from + r * sbt::kStepCols, sbt::kStepCols * sizeof(T));
        } else {
          for (int64_t r = 0; r < rows; ++r)
            std::memcpy(at + r * weight.cols, from + r * sbt::kStepCols, static_cast<size_t>(here) * sizeof(T));
        }
      }
    }
  }
}

}  // namespace
}  // namespace alphaprune
