// The product of int8 weights with rounded activations by panels, for ISAs whose registers hold 4 or 8 rows of sums;
// and a token that cannot be rounded.
#pragma once

#include "panel.h"
#include "rounded.h"

namespace alphaprune {
namespace {

// A token that could not be rounded, in float32, from the caller's own activations. `Words` expands a macro tile as
// for expand_any; convert(from, dtype, count, padded, to) gives activations as float32.
template <class Words, class Convert>
void exact_token(const Product& p, int64_t row_tile, int64_t token, const Convert& convert) {
  constexpr int64_t kLanes = 8;  // sums of a row: what a compiler makes vectors of
  const char* x = static_cast<const char*>(p.given.data) + token * p.given.stride * size_of(p.given.dtype);
  const int64_t tiles = p.weight.col_tiles();
  float sum[sbt::kTileRows][kLanes] = {};
  for (int64_t c = 0; c < tiles; ++c) {
    alignas(64) uint8_t weights[sbt::kTileRows * sbt::kTileCols];  // [step][row][16]
    alignas(64) float a[sbt::kTileCols], scales[sbt::kTileRows];
    const int64_t col = c * sbt::kTileCols;
    Words::expand(p.weight, row_tile * tiles + c, weights);
    convert(x + col * size_of(p.given.dtype), p.given.dtype, std::min(p.weight.cols - col, sbt::kTileCols),
            sbt::kTileCols, a);
    std::fill(scales, scales + sbt::kTileRows, 1.0f);
    if (p.weight.grouped()) tile_scales(p.weight, row_tile, c, scales);
    for (int64_t r = 0; r < sbt::kTileRows; ++r) {
      float of_tile[kLanes] = {};
      for (int64_t k = 0; k < sbt::kTileCols; k += kLanes) {
        const uint8_t* w = weights + (k / sbt::kStepCols * sbt::kTileRows + r) * sbt::kStepCols + k % sbt::kStepCols;
        for (int64_t i = 0; i < kLanes; ++i) of_tile[i] += static_cast<float>(static_cast<int8_t>(w[i])) * a[k + i];
      }
      for (int64_t i = 0; i < kLanes; ++i) sum[r][i] += of_tile[i] * scales[r];
    }
  }
  float out[sbt::kTileRows] = {};
  for (int64_t r = 0; r < sbt::kTileRows; ++r)
    for (int64_t i = 0; i < kLanes; ++i) out[r] += sum[r][i];
  store_rows(p, row_tile, token, out);
}

constexpr int64_t kPanelPass = 128;  // tokens that a panel is made for

// The product with many tokens by panels of one group. `Way` has
//   Made: the layout of its activations; kBlock: tokens at once; kTilePanel: bytes of a macro tile's part of a panel;
//   expand_tile(view, tile, panel); exact(p, row_tile, token): exact_token;
//   block<T>(panel, columns, layout, x, group, token, scales, sums): T tokens times a panel, sums [token][row].
template <class Way>
struct IntegerPanel {
  static constexpr int64_t kGroupTiles = kGroupCols / sbt::kTileCols, kPass = kPanelPass;
  static constexpr int64_t kPanelBytes = kGroupTiles * Way::kTilePanel;
  static_assert(kPanelBytes + kPass * sbt::kTileRows * sizeof(float) <= kScratchBytes, "panel and sums fit");

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* panel = static_cast<uint8_t*>(scratch);
    auto* sums = reinterpret_cast<float*>(panel + kPanelBytes);
    const typename Way::Made rounded(p.weight, p.tokens);
    const int64_t tiles = p.weight.col_tiles();
    for (int64_t row_tile = begin; row_tile < end; ++row_tile) {
      for (int64_t token = 0; token < p.tokens; token += kPass) {
        const int64_t pass = std::min(p.tokens - token, kPass), some = ceil_div(pass, ceil_div(pass, Way::kBlock));
        std::fill(sums, sums + pass * sbt::kTileRows, 0.0f);
        for (int64_t c = 0; c < tiles; c += kGroupTiles) {
          const int64_t width = std::min(tiles - c, kGroupTiles);
          for (int64_t i = 0; i < width; ++i)
            Way::expand_tile(p.weight, row_tile * tiles + c + i, panel + i * Way::kTilePanel);
          alignas(32) float scales[sbt::kTileRows];
          if (p.weight.grouped()) tile_scales(p.weight, row_tile, c, scales);
          for (int64_t t = 0; t < pass; t += some) {
            known<1, Way::kBlock>(std::min(some, pass - t), [&](auto count) {
              Way::template block<decltype(count)::value>(panel, width * sbt::kTileCols, rounded, p.x, c / kGroupTiles,
                                                          token + t, p.weight.grouped() ? scales : nullptr,
                                                          sums + t * sbt::kTileRows);
            });
          }
        }
        for (int64_t t = 0; t < pass; ++t) store_rows(p, row_tile, token + t, sums + t * sbt::kTileRows);
        for (int64_t t = 0; t < pass; ++t)
          if (rounded.exact(p.x, token + t)) Way::exact(p, row_tile, token + t);
      }
    }
  }
};

}  // namespace
}  // namespace alphaprune
