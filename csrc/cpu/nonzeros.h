// The product with many tokens that touches non-zeros only, for CPUs without matrix instructions: tokens lie in the
// lanes, so that one kept weight is one broadcast, one column of activations and an FMA per vector of tokens, and zeros
// cost nothing. A macro tile is first turned into a list of values and columns per row, so that the loop over them
// runs without branches that depend on the mask.
//
// Activations are laid out in blocks of up to kMostTokens tokens, each [padded K][tokens of the block] in float32: the
// 64 columns of a macro tile then are 16 KB at most, and stay in L1 while the row tiles of a part pass by. A block
// whose activations are not all finite is marked, because a zero times infinity is NaN and zeros were skipped.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "panel.h"

namespace alphaprune {
namespace {

namespace nonzeros {

constexpr int64_t kMostTokens = 64;
constexpr int64_t kHeader = 64;   // bytes before the activations of a block: its mark
constexpr int64_t kMostSpan = 4;  // tiles along a row that are taken together where few tokens leave room in L1
constexpr int64_t kCapacity = kMostSpan * sbt::kTileCols + 16;  // of a row's list: 16 may be written past the last
constexpr int64_t kRun = 4;                                     // lists are filled up to a multiple of so many

// Blocks of equal width, a multiple of `lanes` tokens.
struct Blocks {
  int64_t tokens, count, width;

  Blocks(int64_t tokens, int64_t lanes)
      : tokens(tokens), count(ceil_div(tokens, kMostTokens)), width(ceil_div(ceil_div(tokens, count), lanes) * lanes) {}
  int64_t column() const { return width * static_cast<int64_t>(sizeof(float)); }
  int64_t span() const { return std::min(kMostSpan, kMostTokens / width); }
  int64_t bytes(int64_t padded) const { return kHeader + ceil_div((padded + 1) * column(), 64) * 64; }
};

// The non-zeros of a few macro tiles: per row, values and the byte offsets of their columns in a block of activations.
struct Lists {
  alignas(64) float value[sbt::kTileRows][kCapacity];
  alignas(64) int32_t offset[sbt::kTileRows][kCapacity];
  int32_t count[sbt::kTileRows];
};

// Cycles per 8 weights as measured on Cascade Lake, 16 lanes: the lists cost 4 and a mispredicted branch or two, a kept
// weight 2.25 and 0.3 per vector.
inline double cycles(const sbt::View& weight, int64_t tokens, int64_t lanes) {
  const Blocks blocks(tokens, lanes);
  const auto vectors = static_cast<double>(blocks.width / lanes);
  return static_cast<double>(blocks.count) * (4 + vectors + 8 * density_of(weight) * (2.25 + 0.3 * vectors));
}

// `Math`: Vector, kLanes, load, store, broadcast(p), multiply(w, x, sum);
//   Columns(column_bytes), and append(view, tile, columns, offset, lists): the non-zeros of a macro tile whose columns
//   begin `offset` bytes on, integers unscaled.
template <class Math>
struct Nonzeros {
  using Vector = typename Math::Vector;
  // Sums of the row tiles that wait in the scratch while their columns pass by.
  static constexpr int64_t kSums = (kScratchBytes - static_cast<int64_t>(sizeof(Lists))) / sizeof(float);
  static_assert(kSums >= 8 * sbt::kTileRows * kMostTokens, "a block of activations serves a few row tiles");

  static int64_t bytes(const Activations& x, const sbt::View& weight) {
    const Blocks blocks(x.tokens, Math::kLanes);
    return blocks.count * blocks.bytes(weight.padded_cols());
  }

  // convert(from, dtype, count, padded, to) gives a token's activations as float32.
  template <class Convert>
  static void prepare(const Activations& x, const sbt::View& weight, int64_t first, void* to, Convert convert) {
    constexpr int64_t kRows = 16, kCols = 256;
    const Blocks blocks(x.tokens, Math::kLanes);
    const int64_t padded = weight.padded_cols();
    alignas(64) float rows[kRows][kCols];
    // There are as many calls as blocks of kTokenBlock tokens, so more than blocks of ours: one each for the first
    // ones.
    const int64_t b = first / kTokenBlock;
    if (b >= blocks.count) return;
    char* block = static_cast<char*>(to) + b * blocks.bytes(padded);
    auto* out = reinterpret_cast<float*>(block + kHeader);
    const int64_t begin = b * blocks.width, end = std::min(begin + blocks.width, x.tokens);
    bool finite = true;
    for (int64_t col = 0; col < padded; col += kCols) {
      const int64_t width = std::min(kCols, padded - col), given = std::clamp(weight.cols - col, int64_t{0}, width);
      for (int64_t token = 0; token < blocks.width; token += kRows) {
        const int64_t some = std::min(kRows, blocks.width - token);
        for (int64_t t = 0; t < some; ++t) {
          const bool inside = begin + token + t < end;
          const int64_t at = inside ? (begin + token + t) * x.stride + col : 0;
          convert(static_cast<const char*>(x.data) + at * size_of(x.dtype), x.dtype, inside ? given : 0, width,
                  rows[t]);
          float sum = 0;
          for (int64_t k = 0; k < width; ++k) sum += rows[t][k] * 0.0f;
          finite &= sum == 0;
        }
        for (int64_t k = 0; k < width; ++k)
          for (int64_t t = 0; t < some; ++t) out[(col + k) * blocks.width + token + t] = rows[t][k];
      }
    }
    std::memset(out + padded * blocks.width, 0, static_cast<size_t>(blocks.column()));  // the column of no value
    *reinterpret_cast<int64_t*>(block) = finite;
  }

  // One row's list times V vectors of tokens; two sums each, or the FMAs would wait for one another.
  template <int V>
  static void row(const float* value, const int32_t* offset, int32_t count, const char* x, float* sums) {
    constexpr int kChains = V * 2 <= Math::kMostSums ? 2 : 1;
    Vector sum[kChains][V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      sum[0][v] = Math::load(sums + v * Math::kLanes);
      if (kChains == 2) sum[kChains - 1][v] = Math::zero();
    }
    for (int32_t i = 0; i < count; i += kRun) {
      uint64_t offsets[kRun / 2];  // two at a time: loads bound this loop on AVX-512
      std::memcpy(offsets, offset + i, sizeof offsets);
      asm("" : "+r"(offsets[0]), "+r"(offsets[1]));
#pragma GCC unroll 4
      for (int c = 0; c < kRun; ++c) {
        const Vector w = Math::broadcast(value + i + c);
        const auto* at = reinterpret_cast<const float*>(x + static_cast<uint32_t>(offsets[c / 2] >> 32 * (c % 2)));
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v)
          sum[c % kChains][v] = Math::multiply(w, Math::load(at + v * Math::kLanes), sum[c % kChains][v]);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      if (kChains == 2) sum[0][v] = Math::add(sum[0][v], sum[kChains - 1][v]);
      Math::store(sums + v * Math::kLanes, sum[0][v]);
    }
  }

  // The rows of a macro tile, each with its list.
  template <int V = 1>
  static void rows(int64_t vectors, const Lists& lists, const char* x, float* sums) {
    if (vectors == V) {
      for (int64_t r = 0; r < sbt::kTileRows; ++r, sums += V * Math::kLanes)
        row<V>(lists.value[r], lists.offset[r], lists.count[r], x, sums);
    } else if constexpr ((V + 1) * Math::kLanes <= kMostTokens) {
      rows<V + 1>(vectors, lists, x, sums);
    }
  }

  static void product(const Product& p, int64_t begin, int64_t end, void* scratch) {
    auto* lists = new (scratch) Lists;
    auto* sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + sizeof(Lists));
    const Blocks blocks(p.tokens, Math::kLanes);
    const int64_t tiles = p.weight.col_tiles(), padded = p.weight.padded_cols();
    const int64_t column = blocks.column(), span = blocks.span();
    const int64_t row_tiles = kSums / (sbt::kTileRows * blocks.width);
    const typename Math::Columns columns(static_cast<int32_t>(column));
    for (int64_t b = 0; b < blocks.count; ++b) {
      const char* block = static_cast<const char*>(p.x) + b * blocks.bytes(padded);
      for (int64_t first = begin; first < end; first += row_tiles) {
        const int64_t last = std::min(first + row_tiles, end);
        std::memset(sums, 0, static_cast<size_t>((last - first) * sbt::kTileRows * column));
        for (int64_t c = 0; c < tiles; c += span) {
          const char* x = block + kHeader + c * sbt::kTileCols * column;
          for (int64_t r = first; r < last; ++r) {
            gather(p.weight, r, c, std::min(span, tiles - c), columns, column, *lists);
            rows(blocks.width / Math::kLanes, *lists, x, sums + (r - first) * sbt::kTileRows * blocks.width);
          }
        }
        for (int64_t r = first; r < last; ++r)
          finish(p, b, blocks, r, block, sums + (r - first) * sbt::kTileRows * blocks.width);
      }
    }
  }

 private:
  // The lists of `span` tiles from column tile c on, filled up with zeros that meet the column of no value.
  static void gather(const sbt::View& weight, int64_t r, int64_t c, int64_t span, const typename Math::Columns& columns,
                     int64_t column, Lists& lists) {
    const int64_t tiles = weight.col_tiles();
    for (int32_t& count : lists.count) count = 0;
    for (int64_t i = 0; i < span; ++i) {
      const int64_t tile = r * tiles + c + i;
      if (c + span + i < tiles) ask_for(weight, tile + span);
      int32_t before[sbt::kTileRows];
      if (weight.grouped()) std::copy(lists.count, lists.count + sbt::kTileRows, before);
      Math::append(weight, tile, columns, static_cast<int32_t>(i * sbt::kTileCols * column), lists);
      if (weight.grouped()) scale(weight, r, c + i, before, lists);
    }
    const auto none = static_cast<int32_t>((weight.padded_cols() - c * sbt::kTileCols) * column);
    for (int64_t row = 0; row < sbt::kTileRows; ++row)
      for (int64_t i = 0; i < kRun; ++i) {
        lists.value[row][lists.count[row] + i] = 0;
        lists.offset[row][lists.count[row] + i] = none;
      }
  }

  // The next tile of a row is wanted after one tile of every other row: too many streams for the hardware to follow.
  // Inlined, because GCC takes a function that does nothing but ask for memory for one without effect, and drops calls.
  __attribute__((always_inline)) static inline void ask_for(const sbt::View& weight, int64_t tile) {
    const auto* mask = reinterpret_cast<const char*>(weight.mask + tile * sbt::kWords);
    const int64_t size = sbt::kUnit * size_of(weight.dtype);
    const char* value = static_cast<const char*>(weight.values) + weight.offsets[tile] * size;
    const char* end = static_cast<const char*>(weight.values) + weight.offsets[tile + 1] * size;
    __builtin_prefetch(mask);
    __builtin_prefetch(mask + 64);
    for (; value < end; value += 64) __builtin_prefetch(value);
  }

  static void scale(const sbt::View& weight, int64_t row_tile, int64_t col_tile, const int32_t* before, Lists& lists) {
    float scales[sbt::kTileRows];
    tile_scales(weight, row_tile, col_tile, scales);
    for (int64_t r = 0; r < sbt::kTileRows; ++r)
      for (int32_t i = before[r]; i < lists.count[r]; ++i) lists.value[r][i] *= scales[r];
  }

  static void finish(const Product& p, int64_t b, const Blocks& blocks, int64_t row_tile, const char* block,
                     float* sums) {
    if (!*reinterpret_cast<const int64_t*>(block))
      meet_zeros(p.weight, blocks.width, row_tile, reinterpret_cast<const float*>(block + kHeader), sums);
    const int64_t first = b * blocks.width, last = std::min(first + blocks.width, p.tokens);
    for (int64_t t = first; t < last; ++t) {
      float out[sbt::kTileRows];
      for (int64_t r = 0; r < sbt::kTileRows; ++r) out[r] = sums[r * blocks.width + t - first];
      store_rows(p, row_tile, t, out);
    }
  }

  // What the zeros of a row tile would have added to the sums: NaN where an activation is not finite.
  static void meet_zeros(const sbt::View& weight, int64_t width, int64_t row_tile, const float* x, float* sums) {
    for (int64_t k = 0; k < weight.cols; ++k) {
      const uint32_t* words = weight.mask + (row_tile * weight.col_tiles() + k / sbt::kTileCols) * sbt::kWords;
      for (int64_t t = 0; t < width; ++t) {
        if (std::isfinite(x[k * width + t])) continue;
        for (int64_t r = 0; r < sbt::kTileRows; ++r) {
          const int64_t col = k % sbt::kTileCols;
          if (!(words[sbt::word_of(r, col)] >> sbt::bit_of(r, col) & 1))
            sums[r * width + t] = std::numeric_limits<float>::quiet_NaN();
        }
      }
    }
  }
};

}  // namespace nonzeros

}  // namespace
}  // namespace alphaprune
