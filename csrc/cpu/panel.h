// The product of one ISA as a template: expand a few macro tiles into a panel that stays in L1, multiply it with every
// token from there, go on. The weights are decoded once for all tokens.
#pragma once

#include <type_traits>

#include "convert.h"
#include "kernel.h"

namespace alphaprune {
namespace {

template <class T>
inline const T* tile_values(const sbt::View& weight, int64_t tile) {
  return static_cast<const T*>(weight.values) + static_cast<int64_t>(weight.offsets[tile]) * sbt::kUnit;
}

// Kept over all weights, but for what fills up tiles.
inline double density_of(const sbt::View& weight) {
  const auto kept = static_cast<double>(weight.offsets[weight.row_tiles() * weight.col_tiles()]) * sbt::kUnit;
  return kept / (static_cast<double>(weight.rows) * static_cast<double>(weight.cols));
}

// The scales of the rows of one macro tile of int8; 1 for rows past the last.
inline void tile_scales(const sbt::View& weight, int64_t row_tile, int64_t col_tile, float* scales) {
  for (int64_t r = 0; r < sbt::kTileRows; ++r) {
    const int64_t row = row_tile * sbt::kTileRows + r;
    scales[r] = row < weight.rows ? weight.scale_at(row, col_tile * sbt::kTileCols) : 1.0f;
  }
}

// One token's sums of the rows of a row tile, scaled, with bias, into y.
inline void store_rows(const Product& p, int64_t row_tile, int64_t token, float* out) {
  const int64_t row = row_tile * sbt::kTileRows, left = p.weight.rows - row;
  const int64_t count = left < sbt::kTileRows ? left : sbt::kTileRows;
  if (p.weight.groups == 1)
    for (int64_t i = 0; i < count; ++i) out[i] *= p.weight.scale[row + i];
  if (p.bias)
    for (int64_t i = 0; i < count; ++i) out[i] += load_float(p.bias, row + i, p.bias_dtype);
  for (int64_t i = 0; i < count; ++i) store_float(p.y, token * p.y_stride + row + i, p.y_dtype, out[i]);
}

// `Math` describes one vector width and one kind of multiplication:
//   Element of panel and activations; Vector, load, store of accumulators;
//   kLanes float lanes per accumulator, kVectors vectors of weights per step, kStep columns per step,
//   kPanelTiles macro tiles per panel, kBlock tokens that fit the registers beside kGroup vectors of weights;
//   weights(p), activations(p), multiply(w, x, sum) -> sum;
//   expand(view, tile, panel): one macro tile, integers unscaled;
//   finish(p, row_tile, token, accumulators): adds up their lanes and stores the 16 sums of one token.
template <class Math>
struct Panel {
  using Element = typename Math::Element;
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

  // Scales that change along the rows, applied to an expanded tile: [step][16 rows][kStep].
  static void scale(const sbt::View& weight, int64_t row_tile, int64_t col_tile, Element* tile) {
    float scales[sbt::kTileRows];
    tile_scales(weight, row_tile, col_tile, scales);
    for (int64_t at = 0; at < kTileElements; at += Math::kStep)
      for (int64_t i = 0; i < Math::kStep; ++i) tile[at + i] *= scales[at / Math::kStep % sbt::kTileRows];
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
          for (int64_t c = 0; c < width; ++c) {
            Math::expand(p.weight, row_tile * tiles + first + c, panel + c * kTileElements);
            if constexpr (std::is_same_v<Element, float>)
              if (p.weight.grouped()) scale(p.weight, row_tile, first + c, panel + c * kTileElements);
          }
          const Element* x = static_cast<const Element*>(p.x) + token * p.x_stride + first * sbt::kTileCols;
          blocks(panel, width * (sbt::kTileCols / Math::kStep), x, p.x_stride, pass, sums);
        }
        for (int64_t t = 0; t < pass; ++t) Math::finish(p, row_tile, token + t, sums + t * kSums);
      }
    }
  }
};

template <class T>
void copy_rows(const sbt::View& weight, const T* tile, int64_t col_tile, int64_t rows, T* to) {
  const int64_t cols_left = weight.cols - col_tile * sbt::kTileCols;
  for (int64_t step = 0; step < sbt::kSteps; ++step) {
    const int64_t here = cols_left - step * sbt::kStepCols;
    if (here <= 0) break;
    const T* from = tile + step * sbt::kTileRows * sbt::kStepCols;
    T* at = to + col_tile * sbt::kTileCols + step * sbt::kStepCols;
    if (here >= sbt::kStepCols) {
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(at + r * weight.cols, from + r * sbt::kStepCols, sbt::kStepCols * sizeof(T));
    } else {
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(at + r * weight.cols, from + r * sbt::kStepCols, static_cast<size_t>(here) * sizeof(T));
    }
  }
}

// Dense rows from tiles through Words::expand(view, tile, T* tile_values), which writes [step][pair][2][16]; of int8
// what `convert(value * scale)` makes of each.
template <class T, class Words, class Out, class Convert>
void expand_rows(const sbt::View& weight, int64_t begin, int64_t end, Out* out, Convert convert) {
  alignas(64) T tile[sbt::kTileRows * sbt::kTileCols];
  alignas(64) Out scaled[sbt::kTileRows * sbt::kTileCols];
  const int64_t tiles = weight.col_tiles();
  for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
    const int64_t rows_left = weight.rows - row_tile * sbt::kTileRows;
    const int64_t rows = rows_left < sbt::kTileRows ? rows_left : sbt::kTileRows;
    Out* to = out + (row_tile - begin) * sbt::kTileRows * weight.cols;
    for (int64_t c = 0; c < tiles; ++c) {
      Words::expand(weight, row_tile * tiles + c, tile);
      if constexpr (std::is_same_v<T, Out>) {
        copy_rows(weight, tile, c, rows, to);
      } else {
        float scales[sbt::kTileRows];
        tile_scales(weight, row_tile, c, scales);
        for (int64_t at = 0; at < sbt::kTileRows * sbt::kTileCols; at += sbt::kStepCols)
          for (int64_t i = 0; i < sbt::kStepCols; ++i)
            scaled[at + i] = convert(static_cast<float>(static_cast<int8_t>(tile[at + i])) *
                                     scales[at / sbt::kStepCols % sbt::kTileRows]);
        copy_rows(weight, scaled, c, rows, to);
      }
    }
  }
}

// Isa::expand through Words::expand for the unsigned integers of 8, 16 and 32 bits.
template <class Words>
void expand_any(const sbt::View& weight, int64_t begin, int64_t end, Dtype out_dtype, void* out) {
  const auto keep = [](auto v) { return v; };
  auto* bytes = static_cast<uint8_t*>(out);
  auto* halves = static_cast<uint16_t*>(out);
  if (weight.dtype == Dtype::float32)
    return expand_rows<uint32_t, Words>(weight, begin, end, static_cast<uint32_t*>(out), keep);
  if (weight.dtype != Dtype::int8) return expand_rows<uint16_t, Words>(weight, begin, end, halves, keep);
  if (out_dtype == Dtype::int8) return expand_rows<uint8_t, Words>(weight, begin, end, bytes, keep);
  if (out_dtype == Dtype::float32)
    return expand_rows<uint8_t, Words>(weight, begin, end, static_cast<float*>(out), keep);
  if (out_dtype == Dtype::float16) return expand_rows<uint8_t, Words>(weight, begin, end, halves, float_to_float16);
  expand_rows<uint8_t, Words>(weight, begin, end, halves, float_to_bfloat16);
}

// Activations as rows of float32, the caller's own where they are that already.
inline int64_t row_bytes(const Activations& x, const sbt::View& weight) {
  const int64_t padded = weight.padded_cols();
  if (padded == weight.cols && x.dtype == Dtype::float32) return 0;
  return x.tokens * padded * static_cast<int64_t>(sizeof(float));
}

// Isa::prepare through convert(from, dtype, count, padded, to), one token's activations as float32 with zeros past
// `count`.
template <void (*convert)(const void*, Dtype, int64_t, int64_t, float*)>
void prepare_rows(const Activations& x, const sbt::View& weight, int64_t first, int64_t last, void* to) {
  const int64_t padded = weight.padded_cols();
  for (int64_t t = first; t < last; ++t) {
    const char* from = static_cast<const char*>(x.data) + t * x.stride * size_of(x.dtype);
    convert(from, x.dtype, weight.cols, padded, static_cast<float*>(to) + t * padded);
  }
}

}  // namespace
}  // namespace alphaprune
